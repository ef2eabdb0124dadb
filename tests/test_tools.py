"""Commands: mistakes end with exit code 2 and one sentence, help is quick, predictions are labelled."""

import argparse
import errno
import importlib
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from datasets.digits import read as read_digits
from processes import ROOT, call, overrides, tool, trained
from tools import cli

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem not in ("cli", "__init__"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    trained(output, "TRAIN.EPOCHS=1")
    return output / "quickstart"


@pytest.mark.parametrize("name", TOOLS)
def test_help_fits_a_screen_and_loads_no_paddle(name: str) -> None:
    done = tool(name, "--help", PYTHONPROFILEIMPORTTIME="1")
    assert len(done.stdout.splitlines()) <= 30
    imported = set(re.findall(r"(\w+)[^|\n]*$", done.stderr, re.MULTILINE))
    heavy = {"paddle", "matplotlib", "cv2", "sklearn", "visualdl", "scipy", "numpy"}
    assert "argparse" in imported and imported & heavy <= ({"numpy"} if name == "benchmark" else set())


def test_mistake_ends_with_code_2_and_one_sentence() -> None:
    done = tool("train", "-c", "configs/quickstart.yaml", *overrides("TRAIN.EPOCHS=three"), code=2)
    assert done.stderr.startswith("train.py: ") and not done.stdout


@pytest.mark.parametrize(("arguments", "said"), [
    (["train"], ["no config", "-c configs/quickstart.yaml"]),
    (["train", "-c", "configs/quickstart.yaml", "-o", "MODEL.NUM_CLASSES=3"], ["MODEL.NUM_CLASSES is 3", "10 classes"]),
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
    (["eval", "-w", "nothing", "--report-every", "0"], ["--report-every is 0, expected 1 or more"]),
    (["report", "configs"], ["no config"]), (["report", "nowhere"], ["no such weights"]),
    (["summary", "iformer_smal"], ["nearest: iformer_small"]),
    (["summary", "iformer_small", "--image-size", "-3"], ["--image-size is '-3'"]),
    (["summary", "iformer_small", "--num-classes", "-3"], ["num_classes is -3"]),
    (["summary", "iformer_small", "--write", "page.md"], ["--write is for all models"]),
    (["parity", "iformer_smal"], ["nearest: iformer_small"]),
    (["parity", "--fixtures", "configs"], ["has no fixtures"]),
    (["benchmark", "--models", "iformer_smal"], ["iformer_smal", "nearest: iformer_small"]),
    (["benchmark", "--models"], ["--models is empty"]), (["benchmark", "--image-sizes", "0"], ["--image-sizes has 0"]),
    (["benchmark", "--image-sizes", "32", "64", "--batch-size", "1", "2", "3"], ["--batch-size has 3 numbers"]),
    (["benchmark", "--rounds", "0"], ["--rounds has 0"]),
    (["benchmark", "--start-from", "nowhere.json"], ["nowhere.json"]),
    (["benchmark", "--start-from", "pyproject.toml"], ["pyproject.toml"]),
    (["benchmark", "--write", "README.md"], ["README.md: has no place"]),
], ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None)
def test_mistake_names_what_is_wrong(arguments: list[str], said: list[str], tmp_path: Path) -> None:
    name, *rest = arguments
    if name == "train" and len(rest) > 1:
        rest += overrides(f"OUTPUT={tmp_path / 'runs'}")
    done = call(name, *rest, code=2)
    assert all(words in done.stderr for words in said), done.stderr
    leftovers = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in ("lock",)]
    assert not [path for path in leftovers if path.suffix in (".pdparams", ".tmp", ".safetensors")]


@pytest.mark.parametrize(("name", "arguments"), [
    ("train", ["-c", "~/a.yaml", "--resume=~/run", "--weights", "~/w"]), ("eval", ["-w", "~/w", "--json=~/a.json"]),
    ("predict", ["-w", "~/w", "~/a.png", "~/folder", "--out=~/b.png"]), ("export", ["-w", "~/w", "~/out"]),
    ("summary", ["--json=~/a.json", "--write=~/page.md"]),
    ("release", ["~/run", "--into=~/x", "--seeds", "~/a", "~/b"]),
])
def test_home_is_expanded_in_every_path(name: str, arguments: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    module, given = importlib.import_module(f"tools.{name}"), {}
    with pytest.raises(SystemExit):
        module.cli.run(lambda parsed: given.update(vars(parsed)), module.parser(), arguments)
    said = repr(list(given.values()))
    assert "~" not in said and said.count(str(tmp_path)) == sum("~" in word for word in arguments)


def test_predictions_of_files_and_of_test_images(run: Path, tmp_path: Path) -> None:
    image = read_digits("test").images[3]
    cv2.imwrite(str(tmp_path / "digit.png"), image[:, :, ::-1])
    cv2.imwrite(str(tmp_path / "large.jpg"), np.full((300, 500, 3), 90, np.uint8))
    out = tmp_path / "grid.png"
    files = [tmp_path / "digit.png", tmp_path / "large.jpg"]
    done = call("predict", "-w", run, *files, "--index", "3", "0", "--out", out)
    blocks = done.stdout.split("test image 3")
    of_file = [line.split() for line in blocks[0].splitlines()[1:6]]
    of_index = [line.split() for line in blocks[1].splitlines()[1:6]]
    assert of_file == of_index, "the file holds the pixels of test image 3"
    grid = cv2.imread(str(out))
    assert grid is not None and grid.shape[1] > 300
    assert "--index 360: expected 0 to 359" in call("predict", "-w", run, "--index", "360", code=2).stderr


def test_fine_tuning_starts_from_weights_and_leaves_another_head_fresh(run: Path, tmp_path: Path) -> None:
    results = trained(tmp_path, "TRAIN.MAX_STEPS=1", "MODEL.NUM_CLASSES=12", weights=str(run))
    assert "head.weight" in (tmp_path / "quickstart" / "train.log").read_text()
    assert results["final"]["test"]["images"] == 360


@pytest.mark.parametrize(("error", "cause", "code", "said"), [
    (OSError(errno.EACCES, "refused", "folder/file"), None, 2, ".*: folder/file: refused\n"),
    (OSError(errno.ENOSPC, "refused", "folder/file"), None, 2, ".*: folder/file: refused\n"),
    (KeyboardInterrupt(), None, 130, "interrupted\n"),
    (ImportError("a C extension's, at Ctrl-C"), KeyboardInterrupt(), 130, "interrupted\n"),
    (FileNotFoundError(errno.ENOENT, "gone", "x"), None, None, ""), (ImportError("x"), None, None, ""),  # our defects
])
def test_only_defects_of_ours_have_a_traceback(error, cause, code: int | None, said: str, capsys) -> None:
    def broken(arguments: argparse.Namespace) -> None:
        raise error from cause

    with pytest.raises(SystemExit if code else type(error)) as caught:
        cli.run(broken, cli.argument_parser(""), [])
    assert getattr(caught.value, "code", None) == code and re.fullmatch(said, capsys.readouterr().err)


@pytest.mark.parametrize("how", [["-m", "tools.convert"], ["-P", str(ROOT / "tools" / "convert.py")]])
def test_commands_start_as_modules_and_without_their_folder_on_the_path(how: list[str]) -> None:
    if how[0] == "-P" and sys.version_info < (3, 11):
        pytest.skip("Python 3.11 brought -P")
    subprocess.run([sys.executable, *how, "--help"], cwd=ROOT, capture_output=True, check=True, timeout=60)
