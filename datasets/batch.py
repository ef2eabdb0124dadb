"""The sources' transforms by batch: one compiled call for all images of it, outside the interpreter's lock.

A ``Pipeline`` of ``datasets/transforms.py`` becomes a program, a list of numbers, for the operator in
``kernels/augment.cc``. Draws and pixels are the reference's, bit by bit (``tests/test_batch_pipeline.py``), so that
the choice between the two changes nothing but the time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

import kernels
from datasets.randaugment import MAXIMA, OPERATIONS, RandAugment, affine
from datasets.transforms import (
    ColorJitter,
    Normalize,
    Pipeline,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    Resize,
)
from kernels import augment

RESIZE, RESIZED_CROP, PADDED_CROP, FLIP, RANDAUGMENT, JITTER, ROTATION, NORMALIZE, ERASING = range(1, 10)
_AFFINE = 1  # the code of all operations of RandAugment that move pixels
_CODES = {"Identity": 0, "ShearX": _AFFINE, "ShearY": _AFFINE, "TranslateX": _AFFINE, "TranslateY": _AFFINE,
          "Rotate": _AFFINE, "Brightness": 2, "Color": 3, "Contrast": 4, "Sharpness": 5, "Posterize": 6, "Solarize": 7,
          "AutoContrast": 8, "Equalize": 9}
LARGEST = 4096  # pixels of a side, up to which the operator's integers suffice
TRIAL_IMAGES = 8
KEPT = 8  # blocks of memory that wait for their next use; more are given back

Step = tuple[float, ...]  # a transform as its code and its arguments


class Unsupported(Exception):
    """A pipeline has something that the compiled operator does not; the message says what."""


class BatchPipeline:
    """``reference``, a pipeline of single images, computed by batch by the compiled operator.

    Raises Unsupported, which says why, where that is not possible: an interpolation other than bilinear, a hue
    jitter, transforms of other makes or in another order, no compiled operators, or a machine or library on which
    a few trial images differ from the reference's in any bit.
    """

    def __init__(self, reference: Pipeline) -> None:
        self.reference, self.size = reference, reference.size
        self._program = np.array(_program(reference), np.float64)
        self._memory = Memory()
        status = kernels.status()
        if not status["in_use"]:
            raise Unsupported(status["reason"])
        trial = np.arange(TRIAL_IMAGES)
        images = np.random.default_rng(0).integers(0, 256, (TRIAL_IMAGES, 30, 40, 3), np.uint8)
        if not np.array_equal(self.batch(images, trial, (0,)), reference.batch(images, trial, (0,))):
            raise Unsupported("it gives other pixels than the reference on this machine")

    def batch(self, images: np.ndarray | Sequence[np.ndarray], indices: np.ndarray, key: Sequence[int]) -> np.ndarray:
        """Return ``images[indices]`` transformed, float32 ``[B, 3, *size]``, drawn as ``Pipeline.batch`` draws."""
        output, numbers = self._memory.array((len(indices), 3, *self.size)), np.array(key, np.int64)
        if isinstance(images, np.ndarray):
            rows = np.array(indices, np.int64)
            augment.transform(images, rows, rows, numbers, self._program, output)
        else:  # images of their own sizes, perhaps read from a disk now: one after the other, for less memory
            for result, index in zip(output, indices, strict=True):
                augment.transform(images[int(index)][None], np.array([0]), np.array([index], np.int64), numbers,
                                  self._program, result[None])
        return output


class Memory:
    """Gives float32 arrays whose memory comes back when the last array or view of it is gone.

    Fresh pages from the operating system cost as much as filling them.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=KEPT)

    def array(self, shape: Sequence[int]) -> np.ndarray:
        """Return an uninitialised float32 array of this shape."""
        size = math.prod(shape)
        try:
            block = self._free.popleft()
        except IndexError:
            block = None
        if block is None or block.size < size:
            block = np.empty(size, np.float32)
        return np.asarray(_Lease(self._free, block, block[:size].reshape(shape)))


class _Lease:
    """What numpy keeps as the base of an array and of all its views, and drops with the last of them."""

    def __init__(self, free: deque[np.ndarray], block: np.ndarray, view: np.ndarray) -> None:
        self._free, self._block = free, block
        self.__array_interface__ = view.__array_interface__

    def __del__(self) -> None:
        self._free.append(self._block)


def _program(pipeline: Pipeline) -> list[float]:
    """Return the steps of a pipeline: code, number of arguments, arguments, one after the other."""
    kinds = [type(transform) for transform in pipeline.transforms]
    last = kinds.index(Normalize) if Normalize in kinds else 0
    between, after = set(kinds[1:last]), set(kinds[last + 1 :])
    if not (last and kinds[0] in _FIRST and between <= _BETWEEN and after <= {RandomErasing}):
        raise Unsupported(f"transforms in the order {', '.join(kind.__name__ for kind in kinds)}")
    if max(pipeline.size) > LARGEST:
        raise Unsupported(f"images of more than {LARGEST} pixels a side")
    first = pipeline.transforms[0]
    if first.interpolation != "bilinear":
        raise Unsupported(f"{first.interpolation} interpolation")
    if tuple(first.size) != pipeline.size:
        raise Unsupported(f"a crop of {first.size} for images of {pipeline.size}")
    steps: list[float] = []
    for transform in pipeline.transforms:
        code, *arguments = _STEPS[type(transform)](transform, *pipeline.size)
        steps += [code, len(arguments), *arguments]
    return steps


def _jitter(transform: ColorJitter, *size: int) -> Step:
    if transform.hue:
        raise Unsupported("hue jitter")
    if transform.saturation and size[1] % 8 > 3:  # cv2 rounds the grey of the last pixels of such rows in its own way
        raise Unsupported(f"saturation jitter of rows of {size[1]} pixels, expected 8 n to 8 n + 3")
    return JITTER, transform.brightness, transform.contrast, transform.saturation


def _randaugment(transform: RandAugment, height: int, width: int) -> Step:
    arguments: list[float] = [transform.count]
    for name in OPERATIONS:
        strength = transform.strength(name, height, width)
        arguments += [_CODES[name], name in MAXIMA]
        for direction in (1, -1):
            numbers = _operation_numbers(name, strength * direction, height, width)
            arguments += [*numbers, *[0.0] * (6 - len(numbers))]
    return RANDAUGMENT, *arguments


def _operation_numbers(name: str, strength: float, height: int, width: int) -> tuple[float, ...]:
    """Return what the operator needs of one operation: its map, its share of the blend, or its strength."""
    if name == "Rotate":
        return _rotation(strength, height, width)
    if _CODES[name] == _AFFINE:
        return affine(name, strength)
    return (1 + strength if name in MAXIMA else strength,)


def _rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    """Return the map from output to input pixels by which Pillow turns an image about its middle."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


_STEPS: dict[type, Callable[..., Step]] = {
    Resize: lambda transform, *size: (RESIZE,),
    RandomResizedCrop: lambda transform, *size: (RESIZED_CROP, *transform.scale, *map(math.log, transform.ratio),
                                                 *transform.ratio),
    RandomCrop: lambda transform, *size: (PADDED_CROP, transform.padding),
    RandomHorizontalFlip: lambda transform, *size: (FLIP, transform.prob),
    RandAugment: _randaugment,
    ColorJitter: _jitter,
    RandomRotation: lambda transform, *size: (ROTATION, transform.degrees),
    Normalize: lambda transform, *size: (NORMALIZE, *transform.mean, *transform.std),
    RandomErasing: lambda transform, *size: (ERASING, transform.prob, *transform.scale,
                                             *map(math.log, transform.ratio)),
}
_FIRST = {Resize, RandomResizedCrop}
_BETWEEN = {RandomCrop, RandomHorizontalFlip, RandAugment, ColorJitter, RandomRotation}
