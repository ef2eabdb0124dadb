"""Exported programs: Paddle's inference engine gives the network's own logits, for every family and any batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn
from yacs.config import CfgNode

from configs.load import load_config
from datasets.digits import CLASSES
from datasets.digits import read as read_digits
from datasets.transforms import build_eval_transforms
from deploy import export as exporting
from deploy.export import PREPROCESSING, export, run_exported
from engine.model import load_model, predict
from errors import UserError
from models import create_model
from processes import ROOT, tool
from utils.fileio import replaced_folder


def test_a_run_is_exported_with_all_that_its_program_needs(runs: list[Path], tmp_path: Path) -> None:
    """The program labels all test digits as the network does; the file beside it tells how they are prepared."""
    out = tmp_path / "deep" / "exported"
    done = tool("export", "-w", runs[0], out)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["inference.json", "inference.pdiparams", PREPROCESSING]
    assert [path.name for path in out.parent.iterdir()] == ["exported"]
    assert float(done.stdout.split("logits to ")[1].split(" of ")[0]) < 1e-5, done.stdout
    told = json.loads((out / PREPROCESSING).read_text())
    assert tuple(told["classes"]) == CLASSES and (told["height"], told["width"]) == (32, 32)

    config = load_config(runs[0] / "config.yaml")
    digits = read_digits("test").images
    expected = predict(config, load_model(config, runs[0])[0], list(digits))
    scaled = build_eval_transforms(config.AUGMENT, told["height"])
    rng = np.random.default_rng(0)
    images = np.stack([scaled(image, rng) for image in digits])
    mean, std = (np.array(told[key], np.float32).reshape(3, 1, 1) for key in ("mean", "std"))
    back = images[0] * std + mean  # what the file says of the input undoes the transform
    assert back.min() > -1e-6 and back.max() < 1 + 1e-6
    for batch in (images, images[:1]):
        logits = run_exported(out, batch)
        assert (logits.argmax(1) == expected[:len(batch)].argmax(1)).all()

    again = tool("export", "-w", runs[0], out)
    assert again.returncode == 2 and "--overwrite" in again.stderr and len(again.stderr.splitlines()) == 1
    assert tool("export", "-w", runs[1], out, "--overwrite").returncode == 0
    assert not np.array_equal(run_exported(out, images[:1]), logits)


@pytest.mark.parametrize("name", ["iformer_cifar", "coatnet_cifar", "coatnet_0_simple",
                                  "convmixer_256_8", "dfformer_cifar", "cdfformer_cifar", "poolformer_s12"])
def test_every_family_can_be_exported(name: str, tmp_path: Path) -> None:
    """Mobile-Former, which takes any size too, stands in tests/test_mobileformer.py."""
    config = load_config(ROOT / "configs" / "iformer_s_cifar10_32.yaml", [f"MODEL.NAME={name}"])
    paddle.seed(0)
    model = create_model(name, num_classes=10, image_size=32)
    model.eval()
    deviation = export(config, model, tmp_path / "exported", ["class"] * 10)
    print(f"{name}: {deviation:.1e}")
    assert deviation < 1e-5
    one = np.random.default_rng(1).standard_normal((1, 3, 32, 32)).astype(np.float32)
    expected = model(paddle.to_tensor(one)).numpy()
    np.testing.assert_allclose(run_exported(tmp_path / "exported", one), expected, atol=1e-5 * float(expected.std()))


def small_network() -> tuple[CfgNode, nn.Layer]:
    """Return a config and a ConvMixer of one block, 8 wide, quick to export."""
    model = create_model("convmixer_256_8", num_classes=10, image_size=32, dim=8, depth=1)
    model.eval()
    return load_config(ROOT / "configs" / "convmixer_256_8_cifar10.yaml"), model


def test_what_stands_in_the_way_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = small_network()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    for place in (mine, mine / "thesis.txt"):
        with pytest.raises(UserError, match=r"is no exported model: it holds (thesis\.txt|a file)"):
            export(config, model, place, [], overwrite=True)
    assert (mine / "thesis.txt").read_text() == "all of it"

    out = tmp_path / "out"
    monkeypatch.setattr(exporting, "run_exported", lambda folder, images: np.ones((2, 10), np.float32))
    with pytest.raises(RuntimeError, match="of their standard deviation off"):
        export(config, model, out, [])
    model.state_dict()["6.bias"].set_value(paddle.full([10], float("nan")))
    with pytest.raises(UserError, match="no finite numbers"):
        export(config, model, out, [])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_folder_can_be_named_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = small_network()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    export(config, model, Path("."), [])
    assert (here / PREPROCESSING).is_file() and list(tmp_path.iterdir()) == [here]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when Ctrl-C comes between the two renames."""
    target = tmp_path / "exported"
    target.mkdir()
    (target / "old").touch()
    rename = Path.rename

    def interrupted(path: Path, to: Path) -> Path:
        if path.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", interrupted)
        with replaced_folder(target) as made:
            (made / "new").touch()
    assert sorted(tmp_path.rglob("*")) == [target, target / "old"]
    with replaced_folder(target) as made:
        (made / "new").touch()
    assert sorted(tmp_path.rglob("*")) == [target, target / "new"]
