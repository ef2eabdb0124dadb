"""Configs: what ships loads and says what the recipes say; what is wrong is refused in one sentence."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from configs.load import MAX_BYTES, dump_config, flatten, load_config
from configs.schema import KEYS, default_config
from datasets import ImageDataset, class_names
from datasets.loader import EvalLoader, TrainLoader
from datasets.transforms import build_eval_transforms, build_train_transforms
from engine.state import TrainingState
from errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))
SIDES = {"digits": 8, "mnist": 28, "cifar10": 32, "cifar100": 32}  # those of imagefolder differ from image to image


def _distinct(paths: list[Path]) -> list[Path]:
    """Return one config for each network, optimizer and use of mixing: the others differ in data and length alone."""
    found: dict[str, Path] = {}
    for path in paths:
        c = load_config(path)
        mixed = c.AUGMENT.MIXUP > 0 or c.AUGMENT.CUTMIX > 0
        key = str((c.MODEL.NAME, dict(c.MODEL.ARGS), c.DATA.IMAGE_SIZE, c.OPTIMIZER.NAME, mixed))
        found.setdefault(key, path)
    return list(found.values())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_loads_and_says_its_command(path: Path) -> None:
    config = load_config(path)
    assert path.stem == config.NAME
    command = re.search(r"^# Command: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert command and (path.name in command[1] or command[1] == "make train")
    assert "PRECISION" not in command[1] and "THREADS" not in command[1]


RECIPES = {  # of the sources
    "iformer_s_cifar10": {
        "MODEL.NAME": "iformer_small", "MODEL.NUM_CLASSES": 10, "MODEL.DROP_PATH": 0.0, "DATA.IMAGE_SIZE": 224,
        "DATA.BATCH_SIZE": 128, "DATA.HOLDOUT": 0, "AUGMENT.CROP": "random_resized", "AUGMENT.CROP_SCALE": [0.08, 1.0],
        "AUGMENT.BRIGHTNESS": 0.2, "AUGMENT.CONTRAST": 0.2, "AUGMENT.SATURATION": 0.2, "AUGMENT.HUE": 0.0,
        "AUGMENT.HFLIP": 0.5, "AUGMENT.ROTATION": 20.0, "AUGMENT.MIXUP": 0.0, "AUGMENT.CUTMIX": 0.0,
        "AUGMENT.MEAN": [0.485, 0.456, 0.406], "AUGMENT.STD": [0.229, 0.224, 0.225], "LOSS.LABEL_SMOOTHING": 0.1,
        "OPTIMIZER.NAME": "adam", "OPTIMIZER.LR": 1e-3, "OPTIMIZER.WEIGHT_DECAY": 1e-5, "OPTIMIZER.DECAY_ALL": True,
        "SCHEDULE.NAME": "cosine", "SCHEDULE.MIN_LR": 0.0, "SCHEDULE.WARMUP_EPOCHS": 0.0, "TRAIN.EPOCHS": 100,
        "TRAIN.LOG_EVERY": 10, "TRAIN.EMA_DECAY": 0.0, "TRAIN.GRAD_CLIP": 0.0, "RUNTIME.SEED": 42,
    },
    "mobileformer_26m_mnist": {
        "MODEL.NAME": "mobileformer_26m_pvit", "MODEL.NUM_CLASSES": 10, "DATA.NAME": "mnist", "DATA.IMAGE_SIZE": 48,
        "DATA.BATCH_SIZE": 1024, "DATA.HOLDOUT": 0, "AUGMENT.MIXUP": 0.0, "AUGMENT.CUTMIX": 0.0, "AUGMENT.HFLIP": 0.0,
        "AUGMENT.CROP": "pad", "LOSS.LABEL_SMOOTHING": 0.1, "OPTIMIZER.NAME": "adamw", "OPTIMIZER.WEIGHT_DECAY": 0.08,
        "OPTIMIZER.BETAS": [0.9, 0.999], "OPTIMIZER.EPSILON": 1e-8, "SCHEDULE.WARMUP_EPOCHS": 30,
        "TRAIN.GRAD_CLIP": 2.0,
    },
    "iformer_s_imagenet": {
        "MODEL.NUM_CLASSES": 1000, "MODEL.DROP_PATH": 0.2, "DATA.IMAGE_SIZE": 224, "DATA.BATCH_SIZE": 1024,
        "DATA.EVAL_BATCH_SIZE": 128, "AUGMENT.MIXUP": 0.8, "AUGMENT.CUTMIX": 1.0, "AUGMENT.ERASING": 0.25,
        "AUGMENT.EVAL_CROP_PCT": 0.9, "LOSS.LABEL_SMOOTHING": 0.1, "OPTIMIZER.NAME": "adamw", "OPTIMIZER.LR": 1e-3,
        "OPTIMIZER.WEIGHT_DECAY": 0.05, "SCHEDULE.MIN_LR": 1e-6, "SCHEDULE.WARMUP_LR": 1e-6,
        "SCHEDULE.WARMUP_EPOCHS": 5, "TRAIN.EPOCHS": 310, "TRAIN.GRAD_CLIP": 0.0,
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_that_of_its_source(name: str) -> None:
    config = dict(flatten(load_config(CONFIGS / f"{name}.yaml")))
    assert {key: config[key] for key in RECIPES[name]} == RECIPES[name]


def test_what_two_recipes_differ_in() -> None:
    assert load_config(CONFIGS / "mobileformer_26m_mnist.yaml").MODEL.ARGS.lite_stride == 1
    configs = [dict(flatten(load_config(CONFIGS / f"iformer_s{kind}_imagenet.yaml"))) for kind in ("", "_p2")]
    assert {key for key in configs[0] if configs[0][key] != configs[1][key]} == {"NAME", "MODEL.NAME"}


def test_every_key_is_explained_and_its_default_is_valid() -> None:
    source = (CONFIGS / "schema.py").read_text(encoding="utf-8").splitlines()
    plain = {"OPTIMIZER.WEIGHT_DECAY", "SCHEDULE.WARMUP_LR", "TRAIN.EPOCHS"}
    assert {key for key, _ in flatten(default_config())} == set(KEYS)
    for key, (default, (holds, _)) in KEYS.items():
        line = next(line for line in source if line.strip().startswith(f'"{key}": ('))
        assert "  # " in line or key in plain, f"{key} has no explanation"
        assert holds(default) or key == "NAME", key


def test_base_is_merged_and_frozen(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("TRAIN: {EPOCHS: 7}\nMODEL: {ARGS: {depths: [1, 1], deep: {a: 1}}}\n")
    (tmp_path / "b.yaml").write_text("OPTIMIZER: {LR: 1e-2}\nTRAIN: {EPOCHS: 8}\n")
    (tmp_path / "c.yaml").write_text("_BASE_: [a.yaml, b.yaml]\nDATA: {IMAGE_SIZE: [32, 48]}\n")
    config = load_config(tmp_path / "c.yaml", ["MODEL.ARGS.deep.b=null", "TRAIN.GRAD_CLIP=2"])
    assert (config.TRAIN.EPOCHS, config.OPTIMIZER.LR, config.DATA.IMAGE_SIZE) == (8, 0.01, [32, 48])
    assert (config.MODEL.ARGS.depths, dict(config.MODEL.ARGS.deep)) == ([1, 1], {"a": 1, "b": None})
    assert config.TRAIN.GRAD_CLIP == 2.0 and isinstance(config.TRAIN.GRAD_CLIP, float)
    with pytest.raises(AttributeError):
        config.TRAIN.EPOCHS = 1


def test_resolved_config_loads_as_itself(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "quickstart.yaml", ["OPTIMIZER.LR=1e-5"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert dict(flatten(load_config(tmp_path / "config.yaml"))) == dict(flatten(config))


@pytest.mark.parametrize(("override", "said"), [
    ("TRAIN.EPOCH=3", ["TRAIN.EPOCH", "nearest: TRAIN.EPOCHS"]),
    ("EPOCHS=3", ["EPOCHS", "TRAIN.EPOCHS"]),
    ("TRAIN.EPOCHS=many", ["TRAIN.EPOCHS", "whole number", "'many'"]),
    ("TRAIN.EPOCHS=true", ["whole number", "True"]),
    ("TRAIN.EPOCHS=0", ["TRAIN.EPOCHS is 0", "1 <= value"]),
    ("TRAIN=3", ["TRAIN is a section"]),
    ("OPTIMIZER.NAME=adan", ["'adan'", "nearest: adam"]),
    ("DATA.NAME=cifar", ["'cifar'", "nearest: cifar10"]),
    ("OPTIMIZER.LR=-1", ["OPTIMIZER.LR"]),
    ("OPTIMIZER.LR=.nan", ["nan"]),
    ("AUGMENT.CROP_SCALE=[0.5, 0.2]", ["AUGMENT.CROP_SCALE"]),
    ("AUGMENT.CROP_SCALE=[a, b]", ["AUGMENT.CROP_SCALE"]),
    ("DATA.IMAGE_SIZE=[32, 32, 32]", ["DATA.IMAGE_SIZE"]),
    ("SCHEDULE.POINTS=[[0, 1], [0, 1]]", ["SCHEDULE.POINTS"]),
    ("RUNTIME.DEVICE=tpu", ["RUNTIME.DEVICE"]),
    ("NAME=a/b", ["NAME"]),
    ("MODEL.ARGS=3", ["MODEL.ARGS"]),
    ("LR=3", ["unknown key LR", "nearest: OPTIMIZER.LR"]),
    ("train.epochs=3", ["unknown key train", "nearest: TRAIN"]),
    ("TRAIN..EPOCHS=3", ["KEY=VALUE"]),
    ("OPTIMIZER.LR=null", ["found None"]),
    ("DATA.IMAGE_SIZE=[true, true]", ["DATA.IMAGE_SIZE"]),
    ("MODEL.NUM_CLASSES=1000000000000", ["MODEL.NUM_CLASSES"]),
    ("RUNTIME.DEVICE=gpu:²", ["RUNTIME.DEVICE"]),
    ("MODEL.ARGS.depths=!!binary aGVsbG8=", ["tags", "binary"]),
    ('NAME="a\\nb"', ["NAME"]),
    ("TRAIN.EPOCHS", ["KEY=VALUE"]),
    ("=3", ["KEY=VALUE"]),
    ("TRAIN.EPOCHS=[", ["not valid YAML"]),
    ("TRAIN.EPOCHS=!!python/object/apply:os.system ['true']", ["not valid YAML"]),
    *((override, [override.partition("=")[0]]) for override in (  # values that cannot be meant
        "TRAIN.EPOCHS=010", "TRAIN.EPOCHS=1:0", "TRAIN.EPOCHS=0x10", "TRAIN.EPOCHS=1_0", "OPTIMIZER.LR=01.5",
        "OPTIMIZER.LR=1:30.5", "RUNTIME.DEVICE=0", "AUGMENT.MEAN=[127.5, 127.5, 127.5]", "AUGMENT.STD=[58, 57, 57]",
        "SCHEDULE.WARMUP_EPOCHS=101", "OPTIMIZER.LR=20")),
])
def test_bad_override_is_refused(override: str, said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    assert all(words in str(caught.value) for words in said), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "said"), [
    (b"TRAIN:\n  EPOCHS: 3\n  EPOCHS: 4\n", "is there twice"),
    (b"- 1\n", "expected sections"),
    (b"1: 2\n", "expected a text"),
    (b"TRAIN: &a {EPOCHS: 3}\nDATA: *a\n", "aliases"),
    (b"_BASE_: bad.yaml\n", "leads back"),
    (b"_BASE_: 3\n", "_BASE_ takes a path"),
    (b"_BASE_: nowhere.yaml\n", "no such config file"),
    (b"\xff\xfe\x00", "not UTF-8"),
    (b"A: " + b"[" * 5000, "not valid YAML"),
    (b"# " + b"x" * MAX_BYTES, "larger than"),
    (b"MODEL: {ARGS: {a: !!python/name:os.system }}\n", "not valid YAML"),
    (b"TRAIN: {EPOCHS: !!timestamp 2001-99-99}\n", "not valid YAML"),
    (b"TRAIN.EPOCHS: 3\n", "TRAIN: {EPOCHS: ...}"),
])
def test_bad_file_is_refused(tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError, match=said) as caught:
        load_config(path)
    assert str(path.parent) in str(caught.value)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such config file \(nearest: quickstart.yaml"):
        load_config(CONFIGS / "quickstrat.yaml")
    with pytest.raises(UserError, match="a folder, expected a YAML file"):
        load_config(tmp_path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_prepares_its_data(path: Path) -> None:
    """Images like those of its data set become batches of its size, and its head has an output for each class."""
    config = load_config(path)
    rng, name = np.random.default_rng(0), config.DATA.NAME
    shapes = [(90, 70), (60, 300), (64, 64)] if name == "imagefolder" else [(SIDES[name], SIDES[name])] * 3
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    dataset = ImageDataset(images, np.array([2, 0, 1]), ("a", "b", "c"), name, "train")
    if name != "imagefolder":
        assert len(class_names(name)) == config.MODEL.NUM_CLASSES
    size = config.DATA.IMAGE_SIZE
    training = TrainLoader(dataset, build_train_transforms(config.AUGMENT, size), 3, 0)
    for loader in (training.epoch(0), EvalLoader(dataset, build_eval_transforms(config.AUGMENT, size), 3)):
        batch, labels = next(iter(loader))
        assert batch.shape == (3, 3, size, size) and len(labels) == 3
        assert np.isfinite(batch).all() and 0.1 < batch.std() < 4


@pytest.mark.parametrize("path", [
    pytest.param(path, marks=[pytest.mark.slow] if load_config(path).DATA.IMAGE_SIZE > 64 else [], id=path.stem)
    for path in _distinct(SHIPPED)])
def test_shipped_config_builds_and_trains(path: Path) -> None:
    """A config takes an optimizer step on two images of its size; the loss is near that of chance."""
    config = load_config(path)
    state = TrainingState(config)
    size = config.DATA.IMAGE_SIZE
    images = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype("float32")
    step = state.step(images, np.array([3, 7]), 0, config.OPTIMIZER.LR)
    assert step.images == 2 and step.taken
    assert 0.5 < float(step.loss) < 3.7 + math.log(config.MODEL.NUM_CLASSES)


@pytest.mark.parametrize(("override", "key", "value"), [
    ("NAME=20240101", "NAME", "20240101"), ("OUTPUT=runs #3", "OUTPUT", "runs #3"), ("NAME=yes", "NAME", "yes"),
    ("NAME=1e3", "NAME", "1e3"), ("NAME=", "NAME", "iformer_small"), ("NAME=2024-05-01", "NAME", "2024-05-01"),
    ("OUTPUT=~/1:0", "OUTPUT", str(Path.home() / "1:0")), ("DATA.ROOT=~", "DATA.ROOT", str(Path.home())),
    ("DATA.ROOT=d\udcb9 ", "DATA.ROOT", "d\udcb9 "), ("OUTPUT=d\udcb9", "OUTPUT", "d\udcb9"),
])
def test_overrides_of_text_keys_are_taken_as_typed(override: str, key: str, value: str) -> None:
    assert dict(flatten(load_config(None, [override])))[key] == value


def test_a_text_key_of_digits_in_a_file_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("NAME: 20240101\nOUTPUT: 010\n")
    config = load_config(tmp_path / "a.yaml")
    assert (config.NAME, config.OUTPUT) == ("20240101", "010")
    (tmp_path / "a.yaml").write_text("NAME: yes\n")
    with pytest.raises(UserError, match="NAME takes a text, found True; put it in quotes"):
        load_config(tmp_path / "a.yaml")
