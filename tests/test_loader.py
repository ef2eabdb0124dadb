"""The loaders: images and their order, whatever the workers and wherever one starts; and how batches are mixed."""

import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from test_transforms import augment

from configs.load import load_config
from datasets import ImageDataset, build_dataset
from datasets.loader import BatchMix, EvalLoader, Mix, TrainLoader, mix_images, mix_labels
from datasets.transforms import Pipeline, build_eval_transforms, build_train_transforms
from errors import UserError


def transforms():
    section = augment(RANDAUGMENT_N=1, ERASING=0.3)
    return build_train_transforms(section, 24), build_eval_transforms(section, 24)


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return build_dataset(load_config(None, ["DATA.NAME=digits"]).DATA, "test")


def loader(digits, seed=42, workers=0):
    return TrainLoader(digits, transforms()[0], 50, seed, workers)


def test_batches_have_their_types_and_every_image_comes_once(digits):
    training = loader(digits)
    batches = list(training.epoch(0))
    assert len(training) == len(batches) == 7  # without the short batch
    assert [len(labels) for _, labels in batches] == [50] * 7
    assert all(images.dtype == np.float32 and images.shape[1:] == (3, 24, 24) for images, _ in batches)
    assert all(labels.dtype == np.int64 for _, labels in batches)
    seen = training.order(0)
    assert np.array_equal(np.sort(seen), np.arange(360))
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), digits.labels[seen[:350]])


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_workers_change_nothing_and_an_epoch_can_be_entered_anywhere(digits, workers):
    whole = list(loader(digits).epoch(1))
    for start in (0, 1, 4, 6, 7):
        np.testing.assert_equal(list(loader(digits, workers=workers).epoch(1, start)), whole[start:])


def test_order_and_pixels_depend_on_seed_and_epoch(digits):
    first = next(loader(digits).epoch(0))
    for other in (loader(digits).epoch(1), loader(digits, seed=43).epoch(0)):
        images, labels = next(other)
        assert (labels != first[1]).any() and abs(images - first[0]).mean() > 0.1
    same_image = [loader(digits).transform(digits.images[0], np.random.default_rng(seed)) for seed in (1, 2)]
    assert abs(same_image[0] - same_image[1]).mean() > 0.01


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_has_all_images_in_their_order(digits, workers):
    evaluation = EvalLoader(digits, transforms()[1], 100, workers)
    batches = list(evaluation)
    assert len(evaluation) == 4 and [len(labels) for _, labels in batches] == [100, 100, 100, 60]
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), digits.labels)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(batches[3][0][59], transforms()[1](digits.images[359], rng))
    np.testing.assert_equal(list(evaluation), batches)  # once more


def test_a_training_set_smaller_than_a_batch_is_refused(digits):
    with pytest.raises(UserError, match=r"BATCH_SIZE is 361, but digits has only 360 images in its split 'test'"):
        TrainLoader(digits, transforms()[0], 361, 42)


class Watching:
    """A transform that notes each image and fails at a white one."""

    def __init__(self) -> None:
        self.seen = 0

    def draw(self, rng, height, width):
        self.seen += 1

    def apply(self, image, parameters):
        if image.min() == 255:
            raise RuntimeError("a white image broke")
        return np.zeros((3, 24, 24), np.float32)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_reaches_the_reader_after_the_good_batches(digits, workers):
    images = digits.images.copy()
    images[loader(digits).order(0)[110]] = 255
    training = TrainLoader(replace(digits, images=images), Pipeline((Watching(),), (24, 24)), 50, 42, workers)
    batches = training.epoch(0)
    next(batches)
    next(batches)
    with pytest.raises(RuntimeError, match="a white image broke"):
        next(batches)
    assert not loader_threads()


def test_only_a_few_batches_are_prepared_ahead_and_threads_end(digits):
    watching = Watching()
    batches = TrainLoader(digits, Pipeline((watching,), (24, 24)), 10, 42, 2).epoch(0)
    next(batches)
    time.sleep(0.3)
    assert watching.seen <= 10 * (1 + 2 * 2)
    batches.close()
    assert not loader_threads()


# Mixup and CutMix -----------------------------------------------------------------------------------------------------


def test_mixup_and_cutmix_do_what_they_drew():
    images = np.random.default_rng(1).normal(size=(6, 3, 8, 10)).astype(np.float32)
    labels = np.array([0, 1, 2, 2, 1, 0])
    np.testing.assert_allclose(
        mix_images(images, Mix(0.3)), 0.3 * images + 0.7 * np.flip(images, 0), rtol=1e-6, atol=1e-6
    )
    mixed = mix_images(images, Mix(1 - 12 / 80, (2, 5, 3, 7)))
    inside = np.zeros((8, 10), bool)
    inside[2:5, 3:7] = True
    np.testing.assert_array_equal(mixed[..., inside], images[::-1][..., inside])
    np.testing.assert_array_equal(mixed[..., ~inside], images[..., ~inside])
    targets = mix_labels(labels, 4, Mix(0.3))
    expected = [0.3 * np.eye(4)[a] + 0.7 * np.eye(4)[b] for a, b in zip(labels, labels[::-1], strict=True)]
    np.testing.assert_allclose(targets, expected, rtol=1e-6)
    assert targets.dtype == np.float32
    assert mix_images(images, Mix(1.0)) is images
    np.testing.assert_array_equal(mix_labels(labels, 4, Mix(1.0)), np.eye(4)[labels])


def test_mixing_draws_follow_timms_rules():
    both = BatchMix(mixup=0.8, cutmix=1.0, prob=0.9, switch_prob=0.4)
    drawn = [both.draw(42, iteration, 32, 48) for iteration in range(6000)]
    assert drawn[:50] == [both.draw(42, iteration, 32, 48) for iteration in range(50)]
    plain = sum(mix == Mix(1.0) for mix in drawn)
    cut = [mix for mix in drawn if mix.box]
    mixed = [mix.ratio for mix in drawn if not mix.box and mix.ratio < 1]
    assert abs(plain - 600) < 4.5 * math.sqrt(6000 * 0.9 * 0.1) + 5  # a few empty boxes are plain too
    assert abs(len(cut) - 6000 * 0.9 * 0.4) < 4.5 * math.sqrt(6000 * 0.36 * 0.64)
    assert abs(np.mean(mixed) - 0.5) < 0.03
    assert abs(np.var(mixed) - 1 / (4 * (2 * 0.8 + 1))) < 0.01  # Beta(0.8, 0.8)
    for mix in cut:
        top, bottom, left, right = mix.box
        assert 0 <= top <= bottom <= 32 and 0 <= left <= right <= 48
        assert mix.ratio == 1 - (bottom - top) * (right - left) / (32 * 48)
    assert all(BatchMix().draw(1, i, 32, 32) == Mix(1.0) for i in range(20))
    assert all(BatchMix(cutmix=1.0).draw(1, i, 32, 32).box for i in range(20))
    assert not any(BatchMix(mixup=0.8).draw(1, i, 32, 32).box for i in range(20))
