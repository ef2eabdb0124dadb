"""Teachers: their mean prediction, the loss against it, runs that learn from them, and what cannot be one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest
from releasing import run_in

from analysis.results.page import page, read_released
from configs.load import load_config
from datasets import build_dataset
from datasets.transforms import build_eval_transforms
from engine.data import build_train_loader
from engine.model import load_model, predict
from engine.state import TrainingState
from engine.teachers import Teachers
from engine.weights import released
from engine.weights.released import check_released
from errors import UserError
from processes import TINY, overrides


@pytest.fixture
def toys(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two released networks, ``toy`` and ``twin`` (the same); commands of this process find them."""
    folder = tmp_path / "checkpoints"
    for name in ("toy", "twin"):
        shutil.copytree(suite / "checkpoints" / "toy", folder / name)
    monkeypatch.setattr(released, "FOLDER", folder)
    return folder


def student(*pairs: str):
    return load_config("configs/quickstart.yaml", [*TINY, "LOSS.TEACHERS=[toy]", *pairs])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_they_predict_what_they_predict_alone(toys: Path) -> None:
    config = student("LOSS.TEACHERS=[toy, twin]")
    dataset = build_dataset(config.DATA, "test")
    teachers = Teachers(config, dataset)
    own = load_config(toys / "toy" / "config.yaml")
    alone = predict(own, load_model(own, toys / "toy")[0], list(dataset.images[:64]))
    transform = build_eval_transforms(config.AUGMENT, config.DATA.IMAGE_SIZE)
    batch = np.stack([transform(image, np.random.default_rng(0)) for image in dataset.images[:64]])
    found = teachers.probabilities(paddle.to_tensor(batch)).numpy()
    np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-6)
    assert (found.argmax(1) == dataset.labels[:64]).mean() > 0.2, "the toy has learnt something"
    teachers.networks = [teachers.networks[0], lambda images: paddle.zeros([len(images), 10])]
    found = teachers.probabilities(paddle.to_tensor(batch)).numpy()
    np.testing.assert_allclose(found, (alone + 0.1) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_is_shared_between_labels_and_teachers(toys: Path, share: float) -> None:
    """In numpy from the student's logits; the step's gradient is that of this loss."""
    config = student(f"LOSS.TEACHER_SHARE={share}", "OPTIMIZER.NAME=sgd", "OPTIMIZER.MOMENTUM=0.0",
                     "OPTIMIZER.WEIGHT_DECAY=0.0", "TRAIN.GRAD_CLIP=0.0")
    images, labels = next(build_train_loader(config).epoch(0))
    teachers = Teachers(config, build_dataset(config.DATA, "train"))
    taught, plain = TrainingState(config, teachers), TrainingState(config)
    for state in (taught, plain):
        state.model.eval()  # no batch statistics, no dropout: the same logits each time
    logits = taught.model(paddle.to_tensor(images)).numpy().astype(float)
    wanted = teachers.probabilities(paddle.to_tensor(images)).numpy()
    smooth = config.LOSS.LABEL_SMOOTHING
    target = (1 - smooth) * np.eye(10)[labels] + smooth / 10
    expected = -(((1 - share) * target + share * wanted) * log_softmax(logits)).sum(-1).mean()
    head = [parameter for parameter in taught.model.parameters() if parameter.shape == [10]][-1]
    before = head.numpy()
    step = taught.step(images, labels, 0, 1.0)
    assert float(step.loss) == pytest.approx(expected, rel=1e-5)
    slope = (np.exp(log_softmax(logits)) - (1 - share) * target - share * wanted).mean(0)
    np.testing.assert_allclose(before - head.numpy(), slope, rtol=1e-4, atol=1e-6)
    if share == 0.0:
        assert float(plain.step(images, labels, 0, 1.0).loss) == float(step.loss)
        for ours, other in zip(taught.model.parameters(), plain.model.parameters(), strict=True):
            assert np.array_equal(ours.numpy(), other.numpy())
    assert all(parameter.grad is None for network in teachers.networks for parameter in network.parameters())


def test_a_run_learns_from_a_release_and_resumes(suite: Path, tmp_path: Path) -> None:
    """Stopped and resumed, it ends with the same weights; its log names the teacher's weights."""
    copy = shutil.copytree(suite, tmp_path / "copy")
    pairs = [*TINY, "TRAIN.EPOCHS=2", "LOSS.TEACHERS=[toy]", "RUNTIME.SEED=7"]
    done = run_in(copy, "train", "-c", "configs/quickstart.yaml", *overrides(*pairs, "NAME=whole"))
    assert done.returncode == 0, done.stderr
    sha256 = released.read_sums(copy / "checkpoints" / "toy" / "SHA256SUMS")["model.safetensors"]
    assert f"teacher toy: sha256 {sha256}" in (copy / "output" / "whole" / "train.log").read_text()
    first = run_in(copy, "train", "-c", "configs/quickstart.yaml",
                   *overrides(*pairs, "NAME=parts", "TRAIN.MAX_STEPS=20"))
    assert first.returncode == 0, first.stderr
    then = run_in(copy, "train", "-c", "configs/quickstart.yaml", "--resume", *overrides(*pairs, "NAME=parts"))
    assert then.returncode == 0, then.stderr
    whole, parts = (json.loads((copy / "output" / name / "results.json").read_text()) for name in ("whole", "parts"))
    assert whole["final"] == parts["final"]
    without = [pair for pair in pairs if "TEACHERS" not in pair]
    done = run_in(copy, "train", "-c", "configs/quickstart.yaml", *overrides(*without, "NAME=alone"))
    assert json.loads((copy / "output" / "alone" / "results.json").read_text())["final"] != whole["final"]

    done = run_in(copy, "release", "output/whole")
    assert done.returncode == 0, done.stderr
    made = next(each for each in read_released(copy / "checkpoints") if each.name == "whole")
    training, macs = made.results["training"], made.results["macs"]
    assert training["teachers"] == {"toy": macs}, "the same network"
    assert training["macs"] == (3 + 1) * macs * training["images"]
    assert "- `whole` learns from `toy` too: a forward pass of each" in page([made], [], {})
    shutil.rmtree(copy / "checkpoints" / "toy")
    gone = run_in(copy, "release", "output/whole", "--overwrite")
    assert gone.returncode == 2 and "LOSS.TEACHERS names toy, expected it in checkpoints/" in gone.stderr
    check_released(copy / "checkpoints" / "whole")
    anew = run_in(copy, "release", "whole", "--overwrite")
    assert anew.returncode == 0, anew.stderr
    assert json.loads((copy / "checkpoints" / "whole" / "results.json").read_text())["training"] == training


@pytest.mark.parametrize(("pairs", "words"), [
    (["LOSS.TEACHERS=[toi]"], r"LOSS\.TEACHERS names 'toi', expected names of released .*nearest: toy"),
    (["DATA.IMAGE_SIZE=16"], r"LOSS\.TEACHERS: toy has DATA\.IMAGE_SIZE 32, expected that of this run, 16"),
    (["MODEL.NUM_CLASSES=12"], r"toy has MODEL\.NUM_CLASSES 10, expected that of this run, 12"),
    (["AUGMENT.STD=[1.0, 1.0, 1.0]"], r"toy has AUGMENT\.STD .*, expected that of this run, \[1\.0, 1\.0, 1\.0\]"),
])
def test_what_cannot_teach_is_refused(toys: Path, pairs: list[str], words: str) -> None:
    config = student(*pairs)
    with pytest.raises(UserError, match=words):
        Teachers(config, build_dataset(config.DATA, "train"))


@pytest.mark.parametrize("value", ["[../toy]", "[1]", "['']", "toy", "[/tmp/x]"])
def test_teachers_are_names(value: str) -> None:
    with pytest.raises(UserError, match=r"LOSS\.TEACHERS"):
        student(f"LOSS.TEACHERS={value}")


def test_other_classes_are_refused(toys: Path) -> None:
    config = student()
    dataset = build_dataset(config.DATA, "train")
    dataset = replace(dataset, class_names=tuple(reversed(dataset.class_names)))
    with pytest.raises(UserError, match="the weights were trained on"):
        Teachers(config, dataset)
