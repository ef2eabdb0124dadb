"""Reading weights of every format, and bringing them into a model: numbers, names, layouts, reports."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn

from engine.weights.load import convert_state, load_weights, read_weights, save_weights
from errors import UserError

DATA = Path(__file__).parent / "data" / "weights"
SHAPES = {"0.weight": (4, 3), "0.bias": (4,), "1.weight": (4,), "1.bias": (4,), "1.running_mean": (4,),
          "1.running_var": (4,), "2.weight": (5, 4), "2.bias": (5,)}


def rule(*shape: int, dtype: str = "float32") -> np.ndarray:
    """Return the numbers of data/weights/make.py."""
    count = int(np.prod(shape))
    values = np.arange(count, dtype=np.float64) - count // 3
    if dtype == "bool":
        return (values > 0).reshape(shape)
    if np.dtype(dtype).kind in "iu":
        return (values % 8).reshape(shape).astype(dtype)
    return (values / 8).reshape(shape).astype(dtype)


class Net(nn.Sequential):
    """What make.py's `network` is the state of."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1D(4), nn.Linear(4, num_classes))
        self.num_classes = num_classes


def values(model: nn.Layer) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def assert_network(state: dict[str, np.ndarray], shift: float = 0.0) -> None:
    """Compare a state of `Net` with make.py's numbers."""
    for name, shape in SHAPES.items():
        expected = rule(*shape) + np.float32(shift)
        ours = name.replace("running_mean", "_mean").replace("running_var", "_variance")
        np.testing.assert_array_equal(state[ours], expected.T if len(shape) == 2 else expected)


@pytest.mark.parametrize("name", ["kinds_zip.pth", "kinds_legacy.pth", "kinds.safetensors"])
def test_every_dtype_and_view(name: str) -> None:
    weights = read_weights(DATA / name)
    arrays = weights.arrays
    for kind in ("float16", "float32", "float64", "complex64", "int8", "int16", "int32", "int64", "uint8", "bool"):
        assert arrays[f"kind.{kind}"].dtype == kind
        np.testing.assert_array_equal(arrays[f"kind.{kind}"], rule(3, 4, dtype=kind))
    assert arrays["kind.bfloat16"].dtype == "float32"
    np.testing.assert_array_equal(arrays["kind.bfloat16"], rule(3, 4))
    np.testing.assert_array_equal(arrays["transposed"], rule(3, 4).T)
    np.testing.assert_array_equal(arrays["permuted"], rule(2, 3, 4).transpose(2, 0, 1))
    np.testing.assert_array_equal(arrays["every_second"], rule(5, 6)[1::2, 1::2])
    np.testing.assert_array_equal(arrays["shared.a"], rule(6, 2)[:3])
    np.testing.assert_array_equal(arrays["shared.b"], rule(6, 2)[3:])
    np.testing.assert_array_equal(arrays["shared.same"], rule(6, 2)[:3])
    assert arrays["number"].shape == () and arrays["number"] == 0
    assert arrays["empty"].shape == (0, 3)
    assert len(arrays) == 19 and weights.layout == "torch" and weights.nested_under is None and not weights.skipped
    assert not any(array.flags.writeable and array.size for array in arrays.values())


@pytest.mark.parametrize(("name", "ema", "nest"), [
    ("timm_zip.pth.tar", False, "state_dict"), ("timm_legacy.pth.tar", False, "state_dict"),
    ("timm_zip.pth.tar", True, "state_dict_ema"), ("timm_legacy.pth.tar", True, "state_dict_ema"),
    ("compiled.pt", False, "model.state_dict"),
])
def test_training_checkpoints(name: str, ema: bool, nest: str, tmp_path: Path) -> None:
    renamed = tmp_path / "weights.bin"  # what it is stands in the file, not in its name
    renamed.write_bytes((DATA / name).read_bytes())
    model = Net()
    report = load_weights(model, renamed, ema=ema)
    assert_network(values(model), shift=1.0 if ema else 0.0)
    assert (report.nested_under, report.layout) == (nest, "torch")
    assert report.ignored == ["1.num_batches_tracked"] and len(report.loaded) == 8


def test_parameters_and_missing_averages() -> None:
    np.testing.assert_array_equal(read_weights(DATA / "parameter.pt").arrays["weight"], rule(2, 3))
    with pytest.raises(UserError, match=r"no averaged \(EMA\) weights under state_dict_ema.*its keys are model"):
        read_weights(DATA / "compiled.pt", ema=True)


def test_only_averages(tmp_path: Path) -> None:
    """Where a file holds averaged weights and no others, they are taken, and the report says so."""
    arrays = {name: rule(*shape) for name, shape in SHAPES.items()}
    (tmp_path / "w").write_bytes(pickle.dumps({"epoch": 3, "state_dict_ema": arrays}, 4))
    model = Net()
    assert load_weights(model, tmp_path / "w").nested_under == "state_dict_ema"
    assert_network(values(model))


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
    expected = values(model)
    for given in (path, tmp_path / "net"):
        other = Net()
        report = load_weights(other, given)
        assert report.layout == "paddle" and report.path == path
        for name, array in values(other).items():
            np.testing.assert_array_equal(array, expected[name])
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
        assert list(weights.arrays) == ["w"] and weights.skipped == ("steps",) and weights.layout == "paddle"
    cuts["w"]["slices"] = ["w@@.0", "w@@.0"]
    (tmp_path / "w").write_bytes(pickle.dumps(state, 4))
    with pytest.raises(UserError, match="slices of its large parameters"):
        read_weights(tmp_path / "w")


def test_torch_names_in_a_paddle_pickle(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(pickle.dumps({name: rule(*shape) for name, shape in SHAPES.items()}, 4))
    model = Net()
    assert load_weights(model, tmp_path / "w").layout == "torch"
    assert_network(values(model))


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
def test_saving_and_loading_again(suffix: str, tmp_path: Path) -> None:
    model, other = Net(), Net()
    load_weights(model, DATA / "timm_zip.pth.tar")
    path = tmp_path / "new" / f"net{suffix}"
    save_weights(path, model.state_dict())
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    report = load_weights(other, path)
    assert report.layout == "paddle"
    assert_network(values(other))
    if suffix == ".pdparams":
        third = Net()
        assert third.set_state_dict(paddle.load(str(path))) == ([], [])
        assert_network(values(third))
    with pytest.raises(UserError, match=r"w\.bin ends in \.bin, expected \.pdparams or \.safetensors"):
        save_weights(tmp_path / "w.bin", model.state_dict())


def test_strictness_lists_everything_and_changes_nothing(tmp_path: Path) -> None:
    arrays = {name: rule(*shape) for name, shape in SHAPES.items()}
    del arrays["0.bias"]
    arrays["1.weight"] = rule(9)
    arrays["new\x1b[2Jname"] = rule(2)
    arrays["index"] = rule(2, dtype="int64")
    (tmp_path / "w").write_bytes(pickle.dumps(arrays, 4))
    model = Net()
    before = values(model)
    with pytest.raises(UserError) as error:
        load_weights(model, tmp_path / "w", num_classes_mismatch="fresh_head")
    assert str(error.value) == (f"{tmp_path / 'w'} does not fit Net: 1 missing (0.bias); 1 not in the model "
                                "(new?[2Jname); 1 of another shape (1.weight: found [9], expected [4])")
    many = {f"layer{index}": rule(2) for index in range(30)}
    (tmp_path / "w").write_bytes(pickle.dumps(many, 4))
    with pytest.raises(UserError, match=r"30 not in the model \(layer0, .*layer7 and 22 more\)"):
        load_weights(model, tmp_path / "w")
    for name, array in values(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_other_number_of_classes() -> None:
    model = Net(num_classes=7)
    before = values(model)
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


def test_values_that_are_not_finite_and_wrong_types(tmp_path: Path) -> None:
    arrays = {name: rule(*shape) for name, shape in SHAPES.items()}
    for array, reason in ((np.float32([1, np.nan, 1, 1]), "not finite"), (np.float64([1, 1e300, 1, 1]), "not finite"),
                          (np.int64([1, 2, 3, 4]), "as int64, and float32 was expected")):
        (tmp_path / "w").write_bytes(pickle.dumps({**arrays, "0.bias": array}, 4))
        with pytest.raises(UserError, match=rf"0\.bias.*{reason}"):
            load_weights(Net(), tmp_path / "w")


def test_hooks_of_a_model() -> None:
    """`rename_reference` sees PyTorch's names, `resize_weights` Paddle's layout and only what does not fit."""
    seen = []

    class Hooked(Net):
        def __init__(self) -> None:
            super().__init__()
            self[0] = nn.Linear(3, 8)
            self[1] = nn.BatchNorm1D(8)
            self[2] = nn.Linear(8, 5)

        def rename_reference(self, arrays: dict) -> dict:
            assert "1.running_mean" in arrays
            return {**arrays, "2.bias": arrays["2.bias"] + 1}

        def resize_weights(self, name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
            seen.append((name, array.shape, shape))
            return np.resize(array, shape)

    model = Hooked()
    report = load_weights(model, DATA / "compiled.pt")
    assert ("0.weight", (3, 4), (3, 8)) in seen and "2.bias" not in [name for name, _, _ in seen]
    assert ("0.bias", (4,), (8,)) in report.resampled and len(report.resampled) == len(seen) == 7
    np.testing.assert_array_equal(model[2].bias.numpy(), rule(5) + 1)
    assert set(convert_state(read_weights(DATA / "compiled.pt"), Net())) - set(SHAPES) == {
        "1._mean", "1._variance", "1.num_batches_tracked"}
