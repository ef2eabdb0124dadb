"""The loaders: which images in which order, the same whatever the workers and wherever one starts."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from test_transforms import augment

from configs.load import load_config
from datasets import ImageDataset, build_dataset
from datasets.loader import EvalLoader, TrainLoader
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
