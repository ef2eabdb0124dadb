"""The transforms and what they draw against Paddle's own, bit by bit; RandAugment against torchvision's."""

import math
import random
import zlib
from collections import Counter

import numpy as np
import paddle
import paddle.vision.transforms as T
import pytest
from paddle.vision.transforms import transforms as module

from configs.load import load_config
from datasets import AUGMENT, generator
from datasets.randaugment import OPERATIONS, RandAugment
from datasets.transforms import (
    ColorJitter,
    RandomErasing,
    RandomHorizontalFlip,
    build_eval_transforms,
    build_train_transforms,
)

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def augment(**changes):
    """Return the section AUGMENT with the iFormer source's values, changed."""
    values = {"BRIGHTNESS": 0.2, "CONTRAST": 0.2, "SATURATION": 0.2, "ROTATION": 20.0, **changes}
    return load_config(None, [f"AUGMENT.{key}={value}" for key, value in values.items()]).AUGMENT


def pictures(count: int, height: int = 32, width: int = 32) -> list[np.ndarray]:
    """Return images with smooth areas, edges and noise, read-only so that no transform can change its input."""
    rng, result = np.random.default_rng(7), []
    y, x = np.mgrid[:height, :width]
    for _ in range(count):
        waves = np.sin(y[..., None] * rng.uniform(0, 1, 3) + x[..., None] * rng.uniform(0, 1, 3))
        image = 128 + 90 * waves + rng.normal(0, 20, (height, width, 3))
        image[y > x] = 255 - image[y > x]
        result.append(image.clip(0, 255).astype(np.uint8))
        result[-1].setflags(write=False)
    return result


class OneStream:
    """Python's ``random`` as Paddle uses it, drawing from a numpy generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.random, self.uniform = rng, rng.random, rng.uniform

    def randint(self, low: int, high: int) -> int:
        return low + int(self.rng.integers(high - low + 1))

    def shuffle(self, items: list) -> None:
        items[:] = [items[place] for place in self.rng.permutation(len(items))]


@pytest.fixture
def paddle_draws_from(monkeypatch):
    """Make Paddle's transforms draw from a given generator, in place of ``random`` and ``numpy.random``."""
    def use(rng: np.random.Generator) -> None:
        monkeypatch.setattr(module, "random", OneStream(rng))
        monkeypatch.setattr(np.random, "uniform", rng.uniform)
        monkeypatch.setattr(np.random, "randint", lambda low, high: low + int(rng.integers(high - low)))

    return use


def paddle_pipeline(ours, *steps):
    """Return Paddle's Compose of these steps, conversion and normalisation; ours must consist of the same."""
    assert [type(step).__name__ for step in ours.transforms] == [*(type(step).__name__ for step in steps), "Normalize"]
    return T.Compose([*steps, T.ToTensor(), T.Normalize(MEAN, STD)])


SOURCES = {
    "iformer": {},
    "dfformer": {"CROP_SCALE": [0.6, 1.0]},
    "hue, tall ratios, bicubic": {"HUE": 0.3, "CROP_RATIO": [0.2, 0.5], "INTERPOLATION": "bicubic"},
    "strong": {"CROP_SCALE": [0.1, 0.4], "HFLIP": 0.2, "BRIGHTNESS": 1.0, "CONTRAST": 1.0, "SATURATION": 1.0,
               "ROTATION": 180.0, "INTERPOLATION": "nearest"},
}


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (48, 80)])
@pytest.mark.parametrize("source", SOURCES)
def test_training_images_equal_paddles_bit_by_bit(source, size, paddle_draws_from):
    section = augment(**SOURCES[source])
    ours = build_train_transforms(section, list(size))
    reference = paddle_pipeline(
        ours,
        T.RandomResizedCrop(size, section.CROP_SCALE, section.CROP_RATIO, section.INTERPOLATION),
        T.RandomHorizontalFlip(section.HFLIP),
        T.ColorJitter(section.BRIGHTNESS, section.CONTRAST, section.SATURATION, section.HUE),
        T.RandomRotation(section.ROTATION),
    )
    for index, image in enumerate([*pictures(16), *pictures(4, 40, 90), *pictures(4, 70, 9)]):
        expected_rng = generator(42, 2, 3, index)
        paddle_draws_from(expected_rng)
        expected = reference(image).numpy()
        rng = generator(42, 2, 3, index)
        got = ours(image, rng)
        assert got.dtype == np.float32 and got.shape == (3, *size)
        np.testing.assert_array_equal(got, expected)
        assert rng.random() == expected_rng.random()  # neither drew more than the other


def test_pad_and_crop_equals_paddles(paddle_draws_from):
    ours = build_train_transforms(
        augment(CROP="pad", CROP_PADDING=4, BRIGHTNESS=0.0, CONTRAST=0.0, SATURATION=0.0, ROTATION=0.0), 32
    )
    reference = paddle_pipeline(ours, T.Resize((32, 32)), T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(0.5))
    for index, image in enumerate([*pictures(8), *pictures(8, 8, 8)]):
        paddle_draws_from(generator(1, index))
        expected = reference(image).numpy()
        np.testing.assert_array_equal(ours(image, generator(1, index)), expected)


def test_erasing_equals_paddles(paddle_draws_from):
    ours, reference = RandomErasing(0.7), T.RandomErasing(0.7)
    erased = 0
    for index in range(40):
        image = np.random.default_rng(index).normal(size=(3, 32, 20)).astype(np.float32)
        image.setflags(write=False)
        paddle_draws_from(generator(2, index))
        expected = reference(paddle.to_tensor(image)).numpy()
        got = ours.apply(image, ours.draw(generator(2, index), 32, 20))
        np.testing.assert_array_equal(got, expected)
        erased += (got == 0).any()
    assert 20 < erased < 36


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 224), (32, 32, 32), (8, 8, 32), (50, 30, [16, 24])])
def test_evaluation_images_equal_paddles(height, width, size):
    pair = (size, size) if isinstance(size, int) else tuple(size)
    reference = T.Compose([T.Resize(pair), T.ToTensor(), T.Normalize(MEAN, STD)])
    ours = build_eval_transforms(augment(), size)
    for image in pictures(4, height, width):
        np.testing.assert_array_equal(ours(image, generator(0, AUGMENT)), reference(image).numpy())


def test_normalisation_is_exact_for_every_value_and_mean():
    image = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3, axis=-1)
    cifar10 = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
    for mean, std in [(MEAN, STD), cifar10, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))]:
        reference = T.Compose([T.ToTensor(), T.Normalize(mean, std)])
        ours = build_eval_transforms(augment(MEAN=list(mean), STD=list(std)), 16)
        np.testing.assert_array_equal(ours(image, generator(0, AUGMENT)), reference(image).numpy())


def test_flip_and_jitter_commute():
    """The sources differ in the order of the two; the same parameters give the same image in both."""
    flip, jitter = RandomHorizontalFlip(1.0), ColorJitter(0.4, 0.4, 0.4, 0.2)
    for index, image in enumerate(pictures(16)):
        parameters = jitter.draw(generator(3, index), 32, 32)
        after = jitter.apply(flip.apply(image, True), parameters)
        np.testing.assert_array_equal(after, flip.apply(jitter.apply(image, parameters), True))


# CRC-32 over the bytes of torchvision 0.28's RandAugment operations on the image below (PIL, nearest, no fill) at the
# strengths 0 to 30, forward and backward at each where the operation has a direction.
TORCHVISION = {
    "Identity": 0x84222C31,
    "ShearX": 0x8BE6BB55,
    "ShearY": 0x33B520FF,
    "TranslateX": 0x23BCA3C8,
    "TranslateY": 0x372FBD03,
    "Rotate": 0x0FFCCC76,
    "Brightness": 0x32400FE4,
    "Color": 0x1EE7F19F,
    "Contrast": 0x681DD1E3,
    "Sharpness": 0xD45DA367,
    "Posterize": 0xA6CBFD35,
    "Solarize": 0x22D35C56,
    "AutoContrast": 0x14F35C7B,
    "Equalize": 0xBDBDC065,
}
DIRECTED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness")


class Chosen:
    """A generator that draws what the test wants: an operation and a direction."""

    def __init__(self, operation: str, sign: int) -> None:
        self.operation, self.sign = operation, sign

    def integers(self, high: int) -> int:
        assert high == len(OPERATIONS)
        return OPERATIONS.index(self.operation)

    def choice(self, signs: tuple[int, int]) -> int:
        assert set(signs) == {1, -1}
        return self.sign


@pytest.mark.parametrize("operation", OPERATIONS)
def test_randaugment_equals_torchvisions(operation):
    ramp = np.arange(24)[:, None, None] * 7 + np.arange(40)[None, :, None] * 5 + np.arange(3) * 40
    image, checksum = (ramp % 200 + 20).astype(np.uint8), 0
    for magnitude in range(31):
        transform = RandAugment(1, float(magnitude))
        for sign in (1, -1) if operation in DIRECTED else (1,):
            parameters = transform.draw(Chosen(operation, sign), 24, 40)
            checksum = zlib.crc32(transform.apply(image, parameters).tobytes(), checksum)
    assert checksum == TORCHVISION[operation]


def test_randaugment_draws_every_operation_and_direction_equally():
    transform, count = RandAugment(2, 12.0), 14_000
    drawn = [transform.draw(generator(4, index), 32, 32) for index in range(count)]
    names = Counter(name for pair in drawn for name, _ in pair)
    assert set(names) == set(OPERATIONS)
    assert max(abs(names[name] - count / 7) for name in OPERATIONS) < 4.5 * math.sqrt(count / 7)
    rotations = [strength for pair in drawn for name, strength in pair if name == "Rotate"]
    assert set(rotations) == {12.0, -12.0}
    assert abs(np.mean(rotations)) < 4.5 * 12 / math.sqrt(len(rotations))


def test_global_random_states_are_neither_read_nor_changed():
    ours = build_train_transforms(augment(RANDAUGMENT_N=2, ERASING=0.5, HUE=0.1), 32)
    image = pictures(1)[0]
    random.seed(1)
    np.random.seed(1)
    first = ours(image, generator(8, AUGMENT))
    state = random.getstate(), np.random.get_state()[1].tolist()
    np.testing.assert_array_equal(ours(image, generator(8, AUGMENT)), first)
    assert state == (random.getstate(), np.random.get_state()[1].tolist())
