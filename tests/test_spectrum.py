"""Fourier analysis: known spectra come out as they are, layouts are recognised, the command draws and writes."""

from __future__ import annotations

import json
from collections.abc import Callable
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


def relative_of(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return frequencies and Δ of maps ``[B, C, H, W]``."""
    return relative(log_amplitude(maps).mean((0, 1)))


def with_amplitude(amplitude: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return real maps ``[count, 1, H, W]`` whose Fourier amplitudes are these, with random phases."""
    height, width = amplitude.shape
    phases = np.exp(1j * np.angle(np.fft.fft2(rng.standard_normal((count, height, width)))))
    phases[:, 0, 0] = 1
    return np.fft.ifft2(amplitude * phases).real[:, None]


@pytest.mark.parametrize("side", [8, 9, 32])
def test_a_power_law_comes_out_with_its_exponent(side: int) -> None:
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(side) * 2, np.fft.fftfreq(side) * 2))
    amplitude = 100 / (1 + 10 * radius) ** 2
    frequencies, values = relative_of(with_amplitude(amplitude, 3, np.random.default_rng(0)))
    expected = -2 * np.log(1 + 10 * np.sqrt(2) * frequencies)
    assert frequencies[0] == 0
    assert frequencies[-1] == pytest.approx(side // 2 * 2 / side)
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_white_noise_is_flat_and_a_mean_makes_it_fall() -> None:
    noise = np.random.default_rng(1).standard_normal((400, 4, 16, 16))
    _, values = relative_of(noise)
    # The log amplitude at 0 and at π is that of a real number, between them that of a complex one: 0.35 more.
    assert abs(values[-1]) < 0.1
    np.testing.assert_allclose(values[1:-1], 0.35, atol=0.06)
    _, with_mean = relative_of(noise + 10)
    assert (with_mean[1:] < -4).all()


def test_a_wave_shows_at_its_frequency_alone() -> None:
    rows, columns = np.mgrid[:16, :16]
    wave = np.cos(2 * np.pi * 3 * (rows + columns) / 16)[None, None]
    frequencies, values = relative_of(wave)
    assert frequencies[np.argmax(values)] == pytest.approx(3 / 8)
    assert values[3] - np.delete(values, 3).max() > 15


def test_upsampling_by_repetition_leaves_nothing_at_the_highest_frequency() -> None:
    small = np.random.default_rng(2).standard_normal((4, 2, 8, 8))
    _, values = relative_of(small.repeat(2, -1).repeat(2, -2))
    assert values[-1] < -12


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
    class ChannelsLast(nn.Layer):
        map_layout = "NHWC"

        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Identity()

        def forward(self, x: paddle.Tensor) -> paddle.Tensor:
            return self.turn(x)

    model, seen = ChannelsLast(), []
    with watching(model, ["turn"], lambda name, maps, _: seen.append(maps.shape)):
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


def test_the_command_draws_two_networks_and_writes_their_numbers(runs: list[Path], tmp_path: Path,
                                                                 command: Callable[..., str]) -> None:
    printed = command("spectrum", "-w", *runs, "--count", "8", "--out", tmp_path / "s.png")
    numbers = json.loads((tmp_path / "s.json").read_text())
    assert list(numbers) == ["seed42", "seed43"] and "seed43: Δ log amplitude" in printed
    assert [row["map"] for row in numbers["seed42"]] == [[8, 8], [4, 4], [2, 2], [1, 1]]
    assert all(row["relative_log_amplitude"][0] == 0 for row in numbers["seed42"])
    assert cv2.imread(str(tmp_path / "s.png")).std() > 10
    with pytest.raises(UserError, match="not the name of a layer"):
        command("spectrum", "-w", runs[0], "--layers", "nothing")
