"""Commands: mistakes end with exit code 2 and one sentence, help is quick, predictions are labelled."""

from __future__ import annotations

import argparse
import errno
import json
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from processes import ROOT, TINY, overrides, tiny_run, tool

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "cli")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a short run."""
    output = tmp_path_factory.mktemp("runs")
    done = tool("train", *tiny_run(output, "TRAIN.EPOCHS=1"))
    assert done.returncode == 0, done.stderr
    return output / "quickstart"


@pytest.mark.parametrize("name", TOOLS)
def test_help_fits_a_screen_and_loads_no_paddle(name: str) -> None:
    started = time.perf_counter()
    done = tool(name, "--help")
    seconds = time.perf_counter() - started
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) <= 30
    assert seconds < 5, "Paddle alone takes two seconds to import; --help imports nothing of it"
    imported = tool(name, "--help", PYTHONPROFILEIMPORTTIME="1").stderr
    assert "argparse" in imported
    assert "paddle" not in imported


@pytest.mark.parametrize(("arguments", "said"), [
    (["train"], ["no config", "-c configs/quickstart.yaml"]),
    (["train", "-c", "configs/quickstrat.yaml"], ["no such config file", "nearest: quickstart.yaml"]),
    (["train", "-c", "configs/quickstart.yaml", "-o", "TRAIN.EPOCH=3"], ["unknown key TRAIN.EPOCH", "TRAIN.EPOCHS"]),
    (["train", "-c", "configs/quickstart.yaml", "-o", "TRAIN.EPOCHS=three"], ["TRAIN.EPOCHS", "whole number"]),
    (["train", "-c", "configs/quickstart.yaml", "-o", "MODEL.NAME=iformer_smal"], ["nearest: iformer_small"]),
    (["train", "-c", "configs/quickstart.yaml", "-o", "MODEL.ARGS.depth=[1]"], ["'depth'", "nearest: depths"]),
    (["train", "-c", "configs/quickstart.yaml", "-o", "MODEL.ARGS.depths=[1]"], ["four stages"]),
    (["train", "-c", "configs/quickstart.yaml", "-o", "MODEL.ARGS.depths=x"], ["depths"]),
    (["train", "-c", "configs/quickstart.yaml", "-o", "MODEL.NUM_CLASSES=3"], ["MODEL.NUM_CLASSES is 3", "10 classes"]),
    (["train", "-c", "configs/quickstart.yaml", "-o", "DATA.HOLDOUT=1437"], ["DATA.HOLDOUT is 1437"]),
    (["train", "-c", "configs/quickstart.yaml", "-o", "DATA.BATCH_SIZE=5000"], ["DATA.BATCH_SIZE is 5000"]),
    (["train", "-c", "configs/quickstart.yaml", "-o", "RUNTIME.DEVICE=gpu:9"], ["gpu:9", "found"]),
    (["train", "-c", "configs/quickstart.yaml", "-o", "TRAIN.PRECISION=float16"], ["TRAIN.PRECISION is float16"]),
    (["train", "-c", "configs/quickstart.yaml", "--weights", "nowhere.pdparams"], ["nowhere.pdparams"]),
    (["train", "--resume", "configs"], ["no run to resume"]),
    (["train", "-c", "configs/iformer_s_cifar10_32.yaml", "-o", "DATA.ROOT=nowhere", "-o", "DATA.DOWNLOAD=false"],
     ["cifar-10-python.tar.gz", "nowhere"]),
    (["eval", "-w", "nowhere"], ["nowhere"]),
    (["eval", "-c", "configs/quickstart.yaml", "-w", "README"], ["README"]),
    (["predict", "-c", "configs/quickstart.yaml", "-w", "nowhere"], ["no images"]),
    (["predict", "-c", "configs/quickstart.yaml", "-w", "nowhere", "nothing.png"], ["nothing.png", "no such image"]),
    (["summary", "iformer_smal"], ["iformer_smal", "iformer_small"]),
], ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None)
def test_mistake_ends_with_one_sentence(arguments: list[str], said: list[str], tmp_path: Path) -> None:
    name, *rest = arguments
    if name == "train" and len(rest) > 1:
        rest += overrides(f"OUTPUT={tmp_path / 'runs'}")
    done = tool(name, *rest)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(words in done.stderr for words in said), done.stderr
    leftovers = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in ("lock",)]
    assert not [path for path in leftovers if path.suffix in (".pdparams", ".tmp", ".safetensors")]


def test_weights_that_do_not_fit_are_listed(run: Path) -> None:
    done = tool("eval", "-w", run, *overrides("MODEL.ARGS.embed_dims=[8, 16, 32, 32]"))
    assert done.returncode == 2
    assert "blocks3.0" in done.stderr and "16" in done.stderr and "32" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 12


def test_predictions_of_files_and_of_test_images(run: Path, tmp_path: Path) -> None:
    from datasets.digits import read as read_digits

    image = read_digits("test").images[3]
    cv2.imwrite(str(tmp_path / "digit.png"), image[:, :, ::-1])
    cv2.imwrite(str(tmp_path / "large.jpg"), np.full((300, 500, 3), 90, np.uint8))
    out = tmp_path / "grid.png"
    done = tool("predict", "-w", run, tmp_path / "digit.png", tmp_path / "large.jpg", "--index", "3", "0", "--out", out)
    assert done.returncode == 0, done.stderr
    blocks = done.stdout.split("test image 3")
    file_shares = [line.split() for line in blocks[0].splitlines()[1:6]]
    index_shares = [line.split() for line in blocks[1].splitlines()[1:6]]
    assert file_shares == index_shares, "the file holds the pixels of test image 3"
    grid = cv2.imread(str(out))
    assert grid is not None and grid.shape[1] > 300


def test_bad_images_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    for name in ("text.png", "empty.jpg"):
        done = tool("predict", "-w", run, tmp_path / name)
        assert done.returncode == 2 and name in done.stderr and "not a readable image" in done.stderr
    assert tool("predict", "-w", run, "--index", "360").returncode == 2


def test_fine_tuning_starts_from_weights_and_leaves_another_head_fresh(run: Path, tmp_path: Path) -> None:
    done = tool("train", *tiny_run(tmp_path, "TRAIN.MAX_STEPS=1", "MODEL.NUM_CLASSES=12"), "--weights", run)
    assert done.returncode == 0, done.stderr
    assert "head.weight" in done.stdout
    figures = json.loads((tmp_path / "quickstart" / "results.json").read_text())
    assert figures["final"]["test"]["images"] == 360


def test_architecture_in_yaml_only(tmp_path: Path) -> None:
    arguments = "\n".join(f"    {pair.removeprefix('MODEL.ARGS.').replace('=', ': ')}" for pair in TINY)
    (tmp_path / "mine.yaml").write_text(
        f"_BASE_: {ROOT / 'configs' / 'quickstart.yaml'}\nMODEL:\n  ARGS:\n{arguments}\nTRAIN: {{MAX_STEPS: 1}}\n")
    done = tool("train", "-c", tmp_path / "mine.yaml", "-o", f"OUTPUT={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "final_model.pdparams").exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC])
def test_what_the_file_system_refuses_ends_with_one_sentence(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    from tools import cli

    def refused(arguments: argparse.Namespace) -> None:
        raise OSError(number, "refused", "folder/file")

    with pytest.raises(SystemExit) as caught:
        cli.run(refused, cli.argument_parser(""), [])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("folder/file: refused\n")


def test_defect_of_ours_keeps_its_traceback() -> None:
    from tools import cli

    def broken(arguments: argparse.Namespace) -> None:
        raise FileNotFoundError(errno.ENOENT, "gone", "x")

    with pytest.raises(FileNotFoundError):
        cli.run(broken, cli.argument_parser(""), [])
