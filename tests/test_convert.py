"""tools/convert.py as a process: released weights to an ordinary .pdparams, or one sentence and exit code 2."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import paddle
import pytest

from engine.weights import linear_weights
from models import create_model
from processes import call, tool

NAME = "convmixer_256_8"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, paddle.nn.Layer]:
    """Return a file in the reference's names and layouts, and the network whose weights it has."""
    paddle.seed(5)
    model = create_model(NAME)
    linear = linear_weights(model)
    state = {}
    rng = np.random.default_rng(5)
    for name, value in model.state_dict().items():
        if name.endswith(("_mean", "_variance")):
            value.set_value(paddle.to_tensor(rng.uniform(0.5, 1.5, value.shape).astype("float32")))
        array = value.numpy().T if name in linear else value.numpy()
        state[name.replace("._mean", ".running_mean").replace("._variance", ".running_var")] = array
        if name.endswith("._mean"):
            state[name.replace("._mean", ".num_batches_tracked")] = np.int64(3)[None]
    path = tmp_path_factory.mktemp("released") / "weights.pth.tar"
    path.write_bytes(pickle.dumps({"epoch": 1, "state_dict": {f"module.{name}": state[name] for name in state}}, 4))
    return path, model


def test_conversion(released: tuple[Path, paddle.nn.Layer], tmp_path: Path) -> None:
    source, model = released
    done = tool("convert", NAME, source, tmp_path / "new.pdparams")
    assert done.returncode == 0, done.stderr
    loaded = len(model.state_dict())
    assert f"{loaded:6d} loaded" in done.stdout
    assert "torch layout, under state_dict, prefix module. removed from all names" in done.stdout
    assert "ignored (counters and index tables)" in done.stdout
    other = create_model(NAME)
    assert other.set_state_dict(paddle.load(str(tmp_path / "new.pdparams"))) == ([], [])
    image = paddle.randn([2, 3, 64, 64])
    model.eval()
    other.eval()
    np.testing.assert_array_equal(other(image).numpy(), model(image).numpy())


def test_another_number_of_classes(released: tuple[Path, paddle.nn.Layer], tmp_path: Path) -> None:
    done = call("convert", NAME, released[0], tmp_path / "new.safetensors", "--num-classes", "10", "--verbose")
    assert done.returncode == 0, done.stderr
    assert "2 left fresh (another number of classes)" in done.stdout and "10 classes" in done.stdout
    assert "13.weight" in done.stdout


@pytest.mark.parametrize(("name", "target", "options", "words"), [
    ("convmixer_768_32", "x.pdparams", [], "does not fit ConvMixer: "),
    ("convmixer_256_9", "x.pdparams", [], "nearest: convmixer_"),
    (NAME, "x.bin", [], "x.bin ends in .bin, expected .pdparams or .safetensors"),
    (NAME, "x.pdparams", ["--image-size", "-5"], "--image-size is '-5', expected a side"),
    (NAME, "x.pdparams", ["--image-size", "100000"], "each from 1 to 4096"),
    (NAME, "x.pdparams", ["--num-classes", "-1"], "num_classes is -1"),
])
def test_mistakes(name: str, target: str, options: list[str], words: str, released: tuple[Path, paddle.nn.Layer],
                  tmp_path: Path) -> None:
    done = call("convert", name, released[0], tmp_path / target, *options)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
