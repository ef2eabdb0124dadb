"""Fourier analysis: known spectra come out as they are, layouts are recognised, the command draws and writes."""

import json
from pathlib import Path

import cv2
import numpy as np
import paddle
import pytest
from paddle import nn

from analysis.features import find_blocks, watching
from analysis.spectrum import analyse, log_amplitude, relative
from configs.load import load_config
from datasets.digits import read as read_digits
from errors import UserError
from models import create_model
from processes import command


@pytest.mark.parametrize("shape", [(8, 8), (9, 9), (32, 32), (8, 16)])
def test_a_power_law_comes_out_with_its_exponent(shape: tuple[int, int]) -> None:
    rows, columns = (2 * np.fft.fftfreq(side) for side in shape)
    amplitude = 100 / (1 + 10 * np.hypot(rows[:, None], columns)) ** 2
    phases = np.exp(1j * np.angle(np.fft.fft2(np.random.default_rng(0).standard_normal((3, *shape)))))  # of real maps
    maps = np.fft.ifft2(amplitude * phases).real[:, None]
    frequencies, values = relative(log_amplitude(maps).mean((0, 1)))
    assert frequencies[0] == 0
    assert frequencies[-1] == pytest.approx(shape[0] // 2 * 2 / shape[0])
    np.testing.assert_allclose(values, -2 * np.log(1 + 10 * np.sqrt(2) * frequencies), atol=1e-5)


@pytest.mark.parametrize(("name", "depth"), [
    ("iformer_small", 18), ("coatnet_0", 12), ("coatnet_0_simple", 12), ("convmixer_256_8", 8),
    ("mobileformer_26m", 9), ("mobileformer_26m_pvit", 8), ("dfformer_s18", 18), ("poolformer_s12", 12),
    ("paddle/resnet18", 8)])
def test_the_blocks_of_every_family_are_maps(name: str, depth: int) -> None:
    model = create_model(name, num_classes=3, image_size=64)
    model.eval()
    assert name.startswith("paddle/") or type(model).block_pattern
    seen = {}
    with paddle.no_grad(), watching(model, find_blocks(model), lambda block, maps, _: seen.update({block: maps.shape})):
        model(paddle.randn([2, 3, 64, 64]))
        count = len(seen)
    assert count == depth
    for batch, channels, height, width in seen.values():
        assert batch == 2
        assert height == width <= 32
        assert channels >= 12
    widths = [shape[1] for shape in seen.values()]
    assert widths == sorted(widths), "a map with channels last was taken for one with channels first"
    seen.clear()
    model(paddle.randn([1, 3, 64, 64]))
    assert not seen, "the hooks are gone"


def test_layouts_are_recognised_also_where_channels_equal_sides() -> None:
    model, seen = nn.Sequential(nn.Identity()), []
    model.map_layout = "NHWC"
    with watching(model, ["0"], lambda name, maps, _: seen.append(maps.shape)):
        for shape in ([1, 4, 4, 4], [1, 4, 4, 7], [1, 7, 4, 4], [1, 4, 6, 5]):
            model(paddle.zeros(shape))
    assert seen == [[1, 4, 4, 4], [1, 7, 4, 4], [1, 7, 4, 4], [1, 5, 4, 6]]


@pytest.mark.parametrize(("pattern", "said"), [("(", "no regular expression"), ("blocks9", "not the name of a layer")])
def test_a_bad_pattern_is_refused(pattern: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_blocks(create_model("convmixer_256_8", num_classes=2, image_size=32), pattern)


def test_spectra_are_means_over_batches_of_any_size() -> None:
    model = create_model("convmixer_256_8", num_classes=2, image_size=32)
    config, images = load_config("configs/quickstart.yaml"), list(read_digits("test").images[:5])
    whole, parts = (analyse(config, model, images, layers="[0-3]", batch_size=size).blocks for size in (5, 3))
    assert list(whole) == list(parts) and len(whole) > 1
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-4)


def test_the_command_draws_two_networks_and_writes_their_numbers(runs: list[Path], tmp_path: Path) -> None:
    printed = command("spectrum", "-w", *runs, "--count", "8", "--out", tmp_path / "s.png")
    numbers = json.loads((tmp_path / "s.json").read_text())
    assert list(numbers) == ["seed42", "seed43"] and "seed43: Δ log amplitude" in printed
    assert [row["map"] for row in numbers["seed42"]] == [[8, 8], [4, 4], [2, 2], [1, 1]]
    assert all(row["relative_log_amplitude"][0] == 0 for row in numbers["seed42"])
    assert cv2.imread(str(tmp_path / "s.png")).std() > 10
