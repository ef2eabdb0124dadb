"""Reading weights of every format, bringing them into a model and converting them: numbers, names, layouts, reports."""

import pickle
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import paddle
import pytest
from fuzz_cases import wrong_states
from paddle import nn
from pickled import as_legacy, as_zip, tensor, text
from safetensors.numpy import save_file

from engine.checkpoint import model_arrays
from engine.weights import linear_weights, load_weights, read_weights, save_weights
from errors import UserError
from models import create_model
from processes import call, tool

DATA = Path(__file__).parent / "data" / "weights"


def rule(*shape: int, dtype: str = "float32") -> np.ndarray:
    """Return the numbers of data/weights/make.py."""
    count = int(np.prod(shape))
    values = np.arange(count, dtype=np.float64) - count // 3
    if dtype == "bool":
        return (values > 0).reshape(shape)
    if np.dtype(dtype).kind in "iu":
        return (values % 8).reshape(shape).astype(dtype)
    return (values / 8).reshape(shape).astype(dtype)


STATE = {"0.weight": rule(4, 3), "0.bias": rule(4), "1.weight": rule(4), "1.bias": rule(4), "1.running_mean": rule(4),
         "1.running_var": rule(4), "2.weight": rule(5, 4), "2.bias": rule(5)}


class Net(nn.Sequential):
    """The network of STATE, which is make.py's `network`."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1D(4), nn.Linear(4, num_classes))
        self.num_classes = num_classes


def assert_network(model: nn.Layer, shift: float = 0.0) -> None:
    """Compare the state of a `Net` with STATE, or with each of its numbers plus ``shift``."""
    np.testing.assert_equal(model_arrays(model), {
        name.replace("running_mean", "_mean").replace("running_var", "_variance"): array.T + np.float32(shift)
        for name, array in STATE.items()})


@pytest.mark.parametrize("name", ["kinds_zip.pth", "kinds_legacy.pth", "kinds.safetensors"])
def test_every_dtype_and_view(name: str) -> None:
    weights = read_weights(DATA / name)
    arrays = weights.arrays
    kinds = ("float16", "float32", "float64", "complex64", "int8", "int16", "int32", "int64", "uint8", "bool")
    expected = {f"kind.{kind}": rule(3, 4, dtype=kind) for kind in kinds} | {"kind.bfloat16": rule(3, 4)}
    assert {key: array.dtype for key, array in arrays.items() if "kind" in key} == {
        key: array.dtype for key, array in expected.items()}
    np.testing.assert_equal(arrays, expected | {
        "transposed": rule(3, 4).T, "permuted": rule(2, 3, 4).transpose(2, 0, 1),
        "every_second": rule(5, 6)[1::2, 1::2], "shared.a": rule(6, 2)[:3], "shared.b": rule(6, 2)[3:],
        "shared.same": rule(6, 2)[:3], "number": np.zeros(()), "empty": np.zeros((0, 3))})
    assert arrays["number"].shape == () and weights.layout == "torch"
    assert weights.nested_under is None and not weights.skipped
    assert not any(array.flags.writeable and array.size for array in arrays.values())


@pytest.mark.parametrize(("name", "ema", "nest"), [
    ("timm_zip.pth.tar", False, "state_dict"), ("timm_legacy.pth.tar", False, "state_dict"),
    ("timm_zip.pth.tar", True, "state_dict_ema"), ("timm_legacy.pth.tar", True, "state_dict_ema"),
    ("compiled.pt", False, "model.state_dict"),
])
def test_training_checkpoints(name: str, ema: bool, nest: str, tmp_path: Path) -> None:
    renamed = tmp_path / "weights.bin"  # its content decides, not its name
    renamed.write_bytes((DATA / name).read_bytes())
    model = Net()
    report = load_weights(model, renamed, ema=ema)
    assert_network(model, shift=1.0 if ema else 0.0)
    assert (report.nested_under, report.layout) == (nest, "torch")
    assert report.ignored == ["1.num_batches_tracked"] and len(report.loaded) == 8


def test_parameters_and_missing_averages() -> None:
    np.testing.assert_array_equal(read_weights(DATA / "parameter.pt").arrays["weight"], rule(2, 3))
    with pytest.raises(UserError, match=r"no averaged \(EMA\) weights under state_dict_ema.*its keys are model"):
        read_weights(DATA / "compiled.pt", ema=True)


@pytest.mark.parametrize("others", [{}, {"epoch": 3, "optimizer": {"0_moment1_0": rule(3)}}])
def test_a_state_dict_under_any_one_key(others: dict, tmp_path: Path) -> None:
    path = tmp_path / "a.pdparams"
    path.write_bytes(pickle.dumps({"student": {"w": rule(3)}, **others}))
    assert read_weights(path).nested_under == "student" and list(read_weights(path).arrays) == ["w"]
    path.write_bytes(pickle.dumps({"student": {"w": rule(3)}, "teacher": {"w": rule(3)}, **others}))
    with pytest.raises(UserError, match="its keys are student, teacher"):
        read_weights(path)


def test_only_averages(tmp_path: Path) -> None:
    """Where a file holds averaged weights and no others, they are taken, and the report says so."""
    (tmp_path / "w").write_bytes(pickle.dumps({"epoch": 3, "state_dict_ema": STATE}, 4))
    model = Net()
    assert load_weights(model, tmp_path / "w").nested_under == "state_dict_ema"
    assert_network(model)


@pytest.mark.parametrize("length", [0x3C20, 0x4B50, 0x3C80, 0x7630])
def test_safetensors_whose_length_looks_like_something_else(length: int, tmp_path: Path) -> None:
    """The first bytes are a number, and may read `` <``, ``PK``, a pickle's start or a letter."""
    header = b'{"w":{"dtype":"BF16","shape":[3,4],"data_offsets":[0,24]}}'
    bits = (rule(3, 4).view(np.uint32) >> 16).astype("<u2")
    (tmp_path / "w").write_bytes(length.to_bytes(8, "little") + header.ljust(length) + bits.tobytes())
    weights = read_weights(tmp_path / "w")
    assert weights.kind == "safetensors"
    np.testing.assert_array_equal(weights.arrays["w"], rule(3, 4))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_paddle_files(protocol: int, tmp_path: Path) -> None:
    model = Net()
    path = tmp_path / "net.pdparams"
    paddle.save(model.state_dict(), str(path), protocol=protocol)
    expected = model_arrays(model)
    for given in (path, tmp_path / "net"):
        other = Net()
        report = load_weights(other, given)
        assert report.layout == "paddle" and report.path == path
        np.testing.assert_equal(model_arrays(other), expected)
    if protocol == 2:  # the same from numpy 1
        path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))
        np.testing.assert_array_equal(read_weights(path).arrays["0.weight"], expected["0.weight"])


def test_paddle_tensors_with_names_and_bfloat16(tmp_path: Path) -> None:
    """A nested dictionary makes Paddle write (name, array) pairs."""
    tensor = paddle.to_tensor(rule(3, 4))
    paddle.save({"model": {"w": tensor, "half": tensor.astype("bfloat16")}, "epoch": 3}, str(tmp_path / "x"))
    weights = read_weights(tmp_path / "x")
    assert weights.nested_under == "model"
    np.testing.assert_array_equal(weights.arrays["w"], rule(3, 4))
    np.testing.assert_array_equal(weights.arrays["half"], rule(3, 4))
    paddle.save({"half": tensor.astype("bfloat16")}, str(tmp_path / "y"))
    np.testing.assert_array_equal(read_weights(tmp_path / "y").arrays["half"], rule(3, 4))


def test_paddle_slices_and_plain_arrays(tmp_path: Path) -> None:
    """Protocols 2 and 3 cut arrays beyond a gigabyte; here is the same with small ones (io_utils.py)."""
    cuts = {"w": {"OriginShape": (3, 4), "slices": ["w@@.0", "w@@.1"]}}
    state = {"w@@.0": rule(12)[:7], "w@@.1": rule(12)[7:], "UnpackBigParamInfor@@": cuts, "steps": 3}
    for protocol in (2, 3, 4):
        (tmp_path / "w").write_bytes(pickle.dumps(state, protocol))
        weights = read_weights(tmp_path / "w")
        np.testing.assert_array_equal(weights.arrays["w"], rule(3, 4))
        assert list(weights.arrays) == ["w"] and weights.skipped == ("steps",)
    cuts["w"]["slices"] = ["w@@.0", "w@@.0"]
    (tmp_path / "w").write_bytes(pickle.dumps(state, 4))
    with pytest.raises(UserError, match="slices of its large parameters"):
        read_weights(tmp_path / "w")


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
def test_saving_and_loading_again(suffix: str, tmp_path: Path) -> None:
    model, other = Net(), Net()
    load_weights(model, DATA / "timm_zip.pth.tar")
    path = tmp_path / "new" / f"net{suffix}"
    save_weights(path, model.state_dict())
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    report = load_weights(other, path)
    assert report.layout == "paddle"
    assert_network(other)
    if suffix == ".pdparams":
        third = Net()
        assert third.set_state_dict(paddle.load(str(path))) == ([], [])
        assert_network(third)
    with pytest.raises(UserError, match=r"w\.bin ends in \.bin, expected \.pdparams or \.safetensors"):
        save_weights(tmp_path / "w.bin", model.state_dict())


def test_strictness_lists_everything_and_changes_nothing(tmp_path: Path) -> None:
    arrays = {**STATE, "1.weight": rule(9), "new\x1b[2Jname": rule(2), "index": rule(2, dtype="int64")}
    del arrays["0.bias"]
    (tmp_path / "w").write_bytes(pickle.dumps(arrays, 4))
    model = Net()
    before = model_arrays(model)
    with pytest.raises(UserError) as error:
        load_weights(model, tmp_path / "w", num_classes_mismatch="fresh_head")
    assert str(error.value) == (f"{tmp_path / 'w'} does not fit Net: 1 missing (0.bias); 1 not in the model "
                                "(new?[2Jname); 1 of another shape (1.weight: found [9], expected [4])")
    many = {f"layer{index}": rule(2) for index in range(30)}
    (tmp_path / "w").write_bytes(pickle.dumps(many, 4))
    with pytest.raises(UserError, match=r"30 not in the model \(layer0, .*layer7 and 22 more\)"):
        load_weights(model, tmp_path / "w")
    np.testing.assert_equal(model_arrays(model), before)


def test_other_number_of_classes() -> None:
    model = Net(num_classes=7)
    before = model_arrays(model)
    with pytest.raises(UserError, match=r"its classifier has 5 classes where the model was built for 7 .*: 5\)"):
        load_weights(model, DATA / "timm_zip.pth.tar")
    report = load_weights(model, DATA / "timm_zip.pth.tar", num_classes_mismatch="fresh_head")
    assert report.fresh == ["2.weight", "2.bias"] and len(report.loaded) == 6
    assert any("left fresh" in line for line in report.lines())
    assert any("1._mean" in line for line in report.lines(verbose=True))
    np.testing.assert_array_equal(model[0].bias.numpy(), rule(4))
    np.testing.assert_array_equal(model[2].weight.numpy(), before["2.weight"])


def test_refusals_of_a_model_name_the_file() -> None:
    class Particular(Net):
        def resize_weights(self, name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
            raise UserError(f"{name} cannot be resized")

    with pytest.raises(UserError, match=r"timm_zip\.pth\.tar does not fit Particular: 2\.weight cannot be resized"):
        load_weights(Particular(7), DATA / "timm_zip.pth.tar")


def test_whole_files_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    model = Net()
    before = model_arrays(model)
    for reason, state in wrong_states(before):
        (tmp_path / "w").write_bytes(pickle.dumps(state, 4))
        with pytest.raises(UserError, match=reason) as caught:
            load_weights(model, tmp_path / "w")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1500
        np.testing.assert_equal(model_arrays(model), before)


def test_a_model_may_resize_what_does_not_fit() -> None:
    """``resize_weights`` sees Paddle's layout and only what does not fit."""
    seen = []

    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self[0], self[1], self[2] = nn.Linear(3, 8), nn.BatchNorm1D(8), nn.Linear(8, 5)

        def resize_weights(self, name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
            seen.append((name, array.shape, shape))
            return np.resize(array, shape)

    report = load_weights(Wide(), DATA / "compiled.pt")
    assert ("0.weight", (3, 4), (3, 8)) in seen and "2.bias" not in [name for name, _, _ in seen]
    assert ("0.bias", (4,), (8,)) in report.resampled and len(report.resampled) == len(seen) == 7


class Plain(nn.Sequential):
    """No batch norms: names do not tell the layout."""

    def __init__(self, *widths: int) -> None:
        super().__init__(*(nn.Linear(a, b) for a, b in pairwise(widths)))
        self.num_classes = widths[-1]


@pytest.mark.parametrize("widths", [(3, 4, 4), (4, 4, 5), (4, 4), (6, 6, 6)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("metadata", [None, {"format": "np"}, {"format": "pt"}, {"format": "pd"}])
def test_the_layout_of_safetensors(widths: tuple, transposed: bool, metadata: dict | None, tmp_path: Path) -> None:
    """From the metadata, else from the shapes; where these fit both, refused: never is a matrix loaded transposed."""
    source, model = Plain(*widths), Plain(*widths)
    before, expected = model_arrays(model), model_arrays(source)
    state = {name: np.ascontiguousarray(array.T) if transposed else array for name, array in expected.items()}
    save_file(state, tmp_path / "w.safetensors", metadata)
    named = (metadata or {}).get("format") in ("pt", "pd")
    if not named and len(set(widths)) == 1:
        with pytest.raises(UserError, match=r"does not tell whether .* \[in, out\] \(Paddle\) or \[out, in\]"):
            load_weights(model, tmp_path / "w.safetensors")
        np.testing.assert_equal(model_arrays(model), before)
    elif not named or (metadata["format"] == "pt") == transposed:  # wrong metadata do not show where all is square
        assert load_weights(model, tmp_path / "w.safetensors").layout == ("torch" if transposed else "paddle")
        np.testing.assert_equal(model_arrays(model), expected)


def test_the_layout_shows_beside_another_head(tmp_path: Path) -> None:
    save_file(model_arrays(Plain(4, 4, 9)), tmp_path / "w.safetensors")
    report = load_weights(Plain(4, 4, 7), tmp_path / "w.safetensors", num_classes_mismatch="fresh_head")
    assert report.layout == "paddle" and report.fresh == ["1.weight", "1.bias"]


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "module.", "_layers.", "_orig_mod.module.", "my."])
def test_a_wrapper_s_prefix_is_removed_and_reported(prefix: str, tmp_path: Path) -> None:
    arrays = {prefix + name: array for name, array in STATE.items()}
    (tmp_path / "w").write_bytes(pickle.dumps({"state_dict": {**arrays, "n_averaged": np.int64([3])}}, 4))
    model = Net()
    report = load_weights(model, tmp_path / "w")
    assert_network(model)
    assert f"under state_dict, prefix {prefix} removed from all names" in report.lines()[0]
    (tmp_path / "w").write_bytes(pickle.dumps({**arrays, "loss.weight": rule(2)}, 4))
    with pytest.raises(UserError, match=r"8 missing .* 9 not in the model"):
        load_weights(model, tmp_path / "w")


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("wrap", [as_zip, as_legacy])
def test_numpy_arrays_in_a_file_of_pytorch(wrap: Callable, protocol: int, tmp_path: Path) -> None:
    arrays = {**STATE, "0.weight": np.asfortranarray(STATE["0.weight"])}
    payload = pickle.dumps({"state_dict": arrays, "mean": np.float32(3), "half": rule(3)}, protocol)
    payload = payload[2:-1] if protocol == 2 else payload[11:-1]  # without PROTO, FRAME and STOP
    (tmp_path / "w").write_bytes(wrap(payload))
    model = Net()
    assert load_weights(model, tmp_path / "w").layout == "torch"
    assert_network(model)


def test_one_numpy_array_among_tensors(tmp_path: Path) -> None:
    array = pickle.dumps(rule(3), 2)[2:-1]
    (tmp_path / "w").write_bytes(as_zip(tensor(4, 0, (4,), (1,)) + text("b") + array + b"s"))
    found = read_weights(tmp_path / "w").arrays
    np.testing.assert_array_equal(found["b"], rule(3))
    assert found["w"].shape == (4,)


@pytest.mark.parametrize(("path", "words"), [
    ("run/checkpoints/000000038.safetensors", "a training checkpoint, .* pass its run folder"),
    ("run/checkpoints", "the folder of a run's checkpoints; pass the run folder .*run"),
    ("exported", "an exported model; pass the weights or the run folder"),
    ("exported/inference.json", "an exported model"), ("exported/inference.pdiparams", "an exported model"),
    ("model.safetensors.index.json", "the index of weights split over several files; join them"),
    ("final_optimizer.pdopt", "an optimizer's state; pass the .pdparams beside it"),
])
def test_what_is_often_given_as_weights(path: str, words: str, tmp_path: Path) -> None:
    for file in ("run/config.yaml", "run/checkpoints/000000038.safetensors", "exported/inference.json",
                 "exported/inference.pdiparams", "model.safetensors.index.json", "final_optimizer.pdopt"):
        (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(UserError, match=f"{path} is {words}"):
        read_weights(tmp_path / path)
    if "run" not in path:
        assert re.search(words, call("eval", "-w", tmp_path / path, code=2).stderr)


def test_a_checkpoint_is_known_by_its_content(tmp_path: Path) -> None:
    save_file({"model.w": rule(3)}, tmp_path / "moved.safetensors", {"format": "checkpoint"})
    with pytest.raises(UserError, match=r"moved.safetensors is a training checkpoint"):
        read_weights(tmp_path / "moved.safetensors")


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
    assert "2 left fresh (another number of classes)" in done.stdout and "10 classes" in done.stdout
    assert "13.weight" in done.stdout


@pytest.mark.parametrize(("name", "target", "options", "words"), [
    ("convmixer_768_32", "x.pdparams", [], "does not fit ConvMixer: "),
    ("convmixer_256_9", "x.pdparams", [], "nearest: convmixer_"),
    (NAME, "x.pdparams", ["--image-size", "-5"], "--image-size is '-5', expected a side"),
    (NAME, "x.pdparams", ["--image-size", "100000"], "each from 1 to 4096"),
])
def test_mistakes(name: str, target: str, options: list[str], words: str, released: tuple[Path, paddle.nn.Layer],
                  tmp_path: Path) -> None:
    assert words in call("convert", name, released[0], tmp_path / target, *options, code=2).stderr
    assert not list(tmp_path.iterdir())
