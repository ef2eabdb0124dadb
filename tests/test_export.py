"""Exported networks: every family, with and without oneDNN, gives the network's own logits for any batch."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from kernel_checks import openmp
from paddle import nn
from paddle.base.proto.framework_pb2 import ProgramDesc, VarType
from yacs.config import CfgNode

from configs.load import load_config
from datasets.digits import CLASSES
from datasets.digits import read as read_digits
from datasets.transforms import build_eval_transforms
from deploy import engines
from deploy.engines import CONFIG, DESCRIPTION, PARAMETERS, PROGRAM, load_exported
from deploy.export import describe, export, log_probabilities
from engine.model import load_model, predict
from errors import UserError
from models import create_model
from processes import ROOT, call, tool
from utils.fileio import replaced_folder

SMALL = ROOT / "configs" / "convmixer_256_8_cifar10.yaml"


def test_a_run_is_exported(runs: list[Path], tmp_path: Path) -> None:
    """The program labels all test digits as the network does, from ``inference.yml`` alone."""
    out = tmp_path / "deep" / "exported"
    done = tool("export", "-w", runs[0], out)
    assert sorted(path.name for path in out.iterdir()) == [CONFIG, PROGRAM, PARAMETERS, DESCRIPTION]
    assert [path.name for path in out.parent.iterdir()] == ["exported"]
    deviations = [float(line.split("logits to ")[1].split(" of ")[0]) for line in done.stdout.splitlines()[-2:]]
    assert max(deviations) < 1e-5, done.stdout

    config = load_config(out / CONFIG)
    digits = read_digits("test").images
    expected = predict(config, load_model(config, runs[0])[0], list(digits))
    exported = load_exported(out)
    assert tuple(exported.classes) == CLASSES and exported.engine == "paddle"
    operators = {key: value for step in exported.description["PreProcess"]["transform_ops"]
                 for key, value in step.items()}
    assert operators["ResizeImage"] == {"size": [32, 32]}
    transform = build_eval_transforms(config.AUGMENT, 32)
    images = np.stack([transform(image, np.random.default_rng(0)) for image in digits])
    normalize = operators["NormalizeImage"]
    back = images[0] * np.reshape(normalize["std"], (3, 1, 1)) + np.reshape(normalize["mean"], (3, 1, 1))
    values = back / normalize["scale"]  # what the file says of the input undoes the transform
    assert abs(values - values.round()).max() < 1e-3 and values.min() > -1e-3 and values.max() < 255.001
    for batch in (images, images[:1]):
        assert (exported.run(batch).argmax(1) == expected[: len(batch)].argmax(1)).all()
    np.testing.assert_allclose(predict(config, exported, list(digits[:4])), expected[:4], atol=1e-6)

    assert "--overwrite" in tool("export", "-w", runs[0], out, code=2).stderr


FAMILIES = {
    "iformer_cifar": {"depths": [1, 1, 1, 1], "attention_heads": [1, 1, 2, 3]},
    "coatnet_cifar": {"depths": [1, 1, 1, 1]},
    "coatnet_0_simple": {"depths": [1, 1, 1, 1]},
    "convmixer_256_8": {"depth": 1},
    "mobileformer_26m": {"blocks": [[48, 16, 2], [96, 16, 1]], "stem_stride": 2, "lite_stride": 2},
    "mobileformer_26m_pvit": {"blocks": [[48, 16, 2]]},
    "dfformer_cifar": {"depths": [1, 1, 1, 1]},
    "cdfformer_cifar": {"depths": [1, 1, 1, 1]},
    "gfformer_s18": {"depths": [1, 1, 1, 1]},
    "poolformer_s12": {"depths": [1, 1, 1, 1]},
}
SLOW = {"coatnet_0_simple", "mobileformer_26m_pvit", "gfformer_s18", "cdfformer_cifar"}  # share code with the others


def exported_as(format: str, name: str, folder: Path, size: int = 32, **arguments: object) -> nn.Layer:
    """Export a fresh network, which compares batches of 1 and 3, and return it."""
    paddle.seed(0)
    model = create_model(name, num_classes=10, image_size=size, **arguments)
    model.eval()
    export(load_config(SMALL, [f"MODEL.NAME={name}", f"DATA.IMAGE_SIZE={size}"]), model, folder, ["class"] * 10,
           format=format)
    return model


def check_batches(model: nn.Layer, folder: Path, engine: str, counts: Iterable[int], size: int = 32) -> None:
    """Compare an engine's logits with the network's, in batches of several sizes."""
    images = np.random.default_rng(1).standard_normal((33, 3, size, size)).astype(np.float32)[: max(counts)]
    with paddle.no_grad():
        expected = log_probabilities(model(paddle.to_tensor(images)).numpy())
    run = load_exported(folder, engine).run
    for count in counts:
        found = log_probabilities(run(images[:count]))
        np.testing.assert_allclose(found, expected[:count], rtol=0, atol=1e-4 * expected.std(), err_msg=f"{count}")


@pytest.mark.parametrize(("name", "counts"), [
    *((name, (33, 2)) for name in FAMILIES if name not in SLOW),
    *(pytest.param(name, range(1, 34), marks=pytest.mark.slow) for name in FAMILIES)])
def test_every_family_is_exported_and_takes_every_batch(name: str, counts: Iterable[int], tmp_path: Path) -> None:
    model = exported_as("paddle", name, tmp_path / "exported", **FAMILIES[name])
    for engine in ("paddle", "onednn"):
        check_batches(model, tmp_path / "exported", engine, counts)


def small_network() -> tuple[CfgNode, nn.Layer]:
    """Return a config and a ConvMixer of one block, 8 wide, quick to export."""
    model = create_model("convmixer_256_8", num_classes=10, image_size=32, dim=8, depth=1)
    model.eval()
    return load_config(SMALL), model


def test_running_a_program_leaves_the_threads_of_the_process(tmp_path: Path) -> None:
    config, model = small_network()
    export(config, model, tmp_path / "exported", CLASSES)
    before = openmp().omp_get_max_threads()
    load_exported(tmp_path / "exported", threads=3).run(np.zeros((1, 3, 32, 32), np.float32))
    after = openmp().omp_get_max_threads()
    openmp().omp_set_num_threads(before)
    assert after == 3


def test_nothing_is_written_over_or_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = small_network()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    for place in (mine, mine / "thesis.txt"):
        with pytest.raises(UserError, match=r"is not an exported model: it holds (thesis\.txt|a file)"):
            export(config, model, place, ["class"] * 10, overwrite=True)
    (mine / "thesis.txt").rename(mine / "config.yaml")  # of a run, say
    with pytest.raises(UserError, match=r"is not an exported model: it holds config\.yaml"):
        export(config, model, mine, ["class"] * 10, overwrite=True)
    assert (mine / "config.yaml").read_text() == "all of it"

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="deviate by"):
        patch.setattr(engines.ExportedModel, "run", lambda self, images: np.eye(10, dtype=np.float32)[: len(images)])
        export(config, model, out, ["class"] * 10)
    model.state_dict()["6.bias"].set_value(paddle.full([10], float("nan")))
    with pytest.raises(UserError, match="not finite"):
        export(config, model, out, ["class"] * 10)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_folder_can_be_named_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = small_network()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    export(config, model, Path("."), ["class"] * 10)
    assert (here / PROGRAM).is_file() and list(tmp_path.iterdir()) == [here]


def test_preprocessing_is_described_in_paddleclas_terms() -> None:
    """A crop as ``ppcls`` writes it for ImageNet: ``resize_short`` 256, then 224."""
    config = load_config(SMALL, ["DATA.IMAGE_SIZE=224", "AUGMENT.EVAL_CROP_PCT=0.875", "AUGMENT.INTERPOLATION=bicubic"])
    described = yaml.safe_load(yaml.safe_dump(describe(config, ["猫"] * 10)))
    steps = described["PreProcess"]["transform_ops"]
    assert steps[0] == {"ResizeImage": {"resize_short": 256, "backend": "pil", "interpolation": "BICUBIC"}}
    assert steps[1] == {"CropImage": {"size": 224}} and [*steps[2]] == ["NormalizeImage"]
    assert described["PostProcess"]["Topk"] == {"topk": 5, "label_list": ["猫"] * 10}
    with pytest.raises(UserError, match=r"192×256.*EVAL_CROP_PCT"):
        describe(load_config(SMALL, ["DATA.IMAGE_SIZE=[192, 256]", "AUGMENT.EVAL_CROP_PCT=0.875"]), [])
    assert describe(load_config(SMALL, ["DATA.IMAGE_SIZE=[192, 256]"]), [])["PreProcess"]["transform_ops"][0] == {
        "ResizeImage": {"size": [256, 192]}}


def test_damaged_and_hostile_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = small_network()
    out = tmp_path / "out"
    export(config, model, out, ["class"] * 10, logits=True)
    images = np.ones((1, 3, 32, 32), np.float32)
    np.testing.assert_allclose(load_exported(out).run(images), model(paddle.to_tensor(images)).numpy(), atol=1e-5)
    with pytest.raises(UserError, match=r"no program for engine 'onnxruntim'.*nearest: onnxruntime.*expected paddle"):
        load_exported(out, "onnxruntim")
    monkeypatch.setattr(engines, "installed", lambda *packages: not packages)
    (out / engines.ONNX).write_bytes(b"")
    with pytest.raises(UserError, match=r"openvino, onnx is not installed: .*pip install -r requirements-deploy\.txt"):
        load_exported(out, "openvino")
    for text in ("!!python/object/apply:os.system [touch ran]", "Global: 1", "[" * 10_000, "\x00"):
        (out / DESCRIPTION).write_text(text)
        with pytest.raises(UserError, match=r"inference\.yml: not the description"):
            load_exported(out)
    assert not Path("ran").exists()
    with pytest.raises(UserError, match=r"inference\.yml: not the description.*No such file"):
        load_exported(tmp_path)


HOSTILE: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda program: "{}", "paddle cannot load it"),
    "cut": (lambda program: program[:-1000], "Unterminated|Expecting"),
    "deep": (lambda program: "[" * 100_000, "recursion"),
    "writes a file": (lambda program: program.replace("1.softmax", "1.save_combine"), "'1.save_combine' is refused"),
    "hidden": (lambda program: program.replace('"#":"1.softmax"', '"\\u0023":"1.py_func","#":"1.softmax"'),
               "'1.py_func' is refused"),
    "custom": (lambda program: program.replace("1.softmax", "3.kernel"), "'3.kernel' is refused"),
    "unknown": (lambda program: program.replace("1.softmax", "1.softmacks"), "paddle cannot load it"),
    "misfit": (lambda program: program.replace("1.softmax", "1.matmul"), "size of inputs must be equal to 2"),
}


def test_programs_that_reach_outside_are_refused(tmp_path: Path) -> None:
    config, model = small_network()
    export(config, model, tmp_path, ["class"] * 10, overwrite=True)
    program, weights = (tmp_path / PROGRAM).read_text(), (tmp_path / PARAMETERS).read_bytes()
    for change, words in HOSTILE.values():
        assert change(program) != program
        (tmp_path / PROGRAM).write_text(change(program))
        with pytest.raises(UserError, match=words):
            load_exported(tmp_path)
    (tmp_path / PROGRAM).unlink()
    of_paddle_2 = ProgramDesc()
    of_paddle_2.blocks.add(idx=0, parent_idx=-1).ops.add(type="py_func")
    (tmp_path / "inference.pdmodel").write_bytes(of_paddle_2.SerializeToString())
    with pytest.raises(UserError, match="'py_func' is refused"):
        load_exported(tmp_path)
    (tmp_path / PROGRAM).write_text(program)
    assert load_exported(tmp_path).run(np.ones((1, 3, 32, 32), np.float32)).shape == (1, 10)

    size = int.from_bytes(weights[16:20], "little")
    bomb = VarType.TensorDesc(data_type=VarType.FP32, dims=[1 << 40]).SerializeToString()
    bomb = weights[:16] + len(bomb).to_bytes(4, "little") + bomb + weights[20 + size:]
    for damaged in (bomb, weights[:-100], weights[100:], bytes(100)):
        (tmp_path / PARAMETERS).write_bytes(damaged)
        with pytest.raises(UserError, match="paddle cannot load it"):
            load_exported(tmp_path)
    (tmp_path / PARAMETERS).unlink()  # Paddle would run without weights
    with pytest.raises(UserError, match="No such file"):
        load_exported(tmp_path)


def test_what_does_not_fit_is_refused_when_run(tmp_path: Path) -> None:
    config, model = small_network()
    export(config, model, tmp_path, ["class"] * 10, overwrite=True)
    (tmp_path / DESCRIPTION).write_text(yaml.safe_dump(describe(config, ["class"] * 9)))
    with pytest.raises(UserError, match=r"paddle with images \[2, 3, 32, 32\] gives \[2, 10\], expected \[2, 9\]"):
        load_exported(tmp_path).run(np.ones((2, 3, 32, 32), np.float32))
    with pytest.raises(UserError, match=r"paddle with images \[2, 4, 32, 32\]: .*channel"):
        load_exported(tmp_path).run(np.ones((2, 4, 32, 32), np.float32))


def test_commands_run_an_exported_folder(runs: list[Path], tmp_path: Path) -> None:
    """The same metrics, classes and, from LIME, superpixels as with the run itself."""
    out = tmp_path / "exported"
    home = ["-o", f"OUTPUT={tmp_path}"]
    call("export", "-w", runs[0], out)
    found = []
    for weights in ([runs[0]], [out], [out / PROGRAM, "--engine", "onednn"]):
        call("eval", "-w", *weights, "--json", tmp_path / "eval.json")
        found.append(json.loads((tmp_path / "eval.json").read_text()))
        call("predict", "-w", *weights, "--index", *map(str, range(40)), "--out", tmp_path / "grid.png")
        found[-1]["predicted"] = [line.split(",")[2] for line in (tmp_path / "grid.csv").read_text().splitlines()]
        call("explain", "-w", *weights, *home, "--index", "0", "--samples", "200", "--superpixels", "9",
             "--out", tmp_path / "lime")
        found[-1]["lime"] = np.load(next((tmp_path / "lime").glob("*.npz")))["maps"]
    assert [each["device"] for each in found] == ["cpu", "paddle", "onednn"]
    for each in found[1:]:
        assert all(each[key] == found[0][key] for key in ("top1", "confusion", "per_class", "predicted"))
        assert each["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
        np.testing.assert_allclose(each["lime"], found[0]["lime"], atol=1e-4)

    for arguments, words in [(["explain", "--method", "gradcam", "--index", "0"], "needs gradients"),
                             (["explain", "--method", "all", "--index", "0"], "expected lime or occlusion"),
                             (["eval", "--engine", "openvino"], "no program for engine 'openvino'"),
                             (["eval", "-o", "MODEL.NUM_CLASSES=11"], "10 labels, expected the 11")]:
        assert words in call(arguments[0], "-w", out, *arguments[1:], code=2).stderr
    done = call("eval", "-w", runs[0], "--engine", "paddle", code=2)
    assert "--engine paddle is for a folder that tools/export.py wrote" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == [CONFIG, PROGRAM, PARAMETERS, DESCRIPTION]
    if not engines.installed("onnxruntime"):
        (out / PROGRAM).rename(out / engines.ONNX)
        assert "python -m pip install -r requirements-deploy.txt" in call("eval", "-w", out, code=2).stderr


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
