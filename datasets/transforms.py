"""The sources' transforms, image by image: what every faster pipeline is compared with.

The pixel operations and the rules of the draws are those of ``paddle.vision.transforms`` (Paddle 3.3) with the
cv2 backend, bit by bit, quirks included; RandAugment is torchvision's, as in locuslab/convmixer-cifar10, by Pillow.

A transform is data. ``draw(rng, height, width)`` gives its parameters for one image, ``apply(image, parameters)``
does it, so that another pipeline can be given the same parameters. Images are uint8 ``[H, W, 3]`` in RGB up to
``Normalize``, float32 ``[3, H, W]`` from there on. No transform changes the image that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from PIL import Image
from yacs.config import CfgNode

from datasets import generator
from datasets.randaugment import RandAugment
from errors import UserError
from utils import pair

INTERPOLATIONS = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
MAX_SCALED = 100_000_000  # pixels of an image scaled by its shorter side
ATTEMPTS = 10  # at a box that fits, in RandomResizedCrop and RandomErasing


class Fixed:
    """A transform without parameters."""

    def draw(self, rng: np.random.Generator, height: int, width: int) -> None:
        return None


@dataclass(frozen=True)
class Resize(Fixed):
    """Scale to ``size`` = (height, width) without regard to the aspect ratio and without antialiasing."""

    size: tuple[int, int]
    interpolation: str = "bilinear"

    def apply(self, image: np.ndarray, parameters: None = None) -> np.ndarray:
        if image.shape[:2] == tuple(self.size):
            return image
        return cv2.resize(image, self.size[::-1], interpolation=INTERPOLATIONS[self.interpolation])


@dataclass(frozen=True)
class ResizeCenterCrop(Fixed):
    """Scale the shorter side, or of a box the side that is short of it, to ``size`` / ``crop_pct``; cut out the middle.

    The evaluation of ImageNet as timm and torchvision do it: antialiased by Pillow, unlike ``Resize``, since the
    published accuracies come from such pixels.
    """

    size: tuple[int, int]
    crop_pct: float
    interpolation: str = "bicubic"

    def apply(self, image: np.ndarray, parameters: None = None) -> np.ndarray:
        (height, width), (crop_h, crop_w) = image.shape[:2], self.size
        scaled_h, scaled_w = math.floor(crop_h / self.crop_pct), math.floor(crop_w / self.crop_pct)
        if scaled_h * width <= scaled_w * height:  # the width decides; of a square that is the shorter side
            scaled_h = max(scaled_h, int(scaled_w * height / width))
        else:
            scaled_w = max(scaled_w, int(scaled_h * width / height))
        if scaled_h * scaled_w > MAX_SCALED:
            raise UserError(f"an image of {width}×{height} pixels is too long to be scaled to a side of "
                            f"{min(scaled_h, scaled_w)} (AUGMENT.EVAL_CROP_PCT 0 takes it whole)")
        if (height, width) != (scaled_h, scaled_w):
            resampling = Image.Resampling[self.interpolation.upper()]
            image = np.asarray(Image.fromarray(image).resize((scaled_w, scaled_h), resampling))
        top, left = round((scaled_h - crop_h) / 2), round((scaled_w - crop_w) / 2)
        return np.ascontiguousarray(image[top : top + crop_h, left : left + crop_w])


@dataclass(frozen=True)
class RandomResizedCrop:
    """A box with a share of the area in ``scale`` and an aspect ratio in ``ratio``, scaled to ``size``.

    Uniform in the area, log-uniform in width / height. When ten draws do not fit into the image: the largest
    centred box within the range of ratios.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"

    def draw(self, rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (top, left, height, width) of the box."""
        for _ in range(ATTEMPTS):
            area = rng.uniform(*self.scale) * (height * width)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        w = min(width, max(round(height * self.ratio[1]), 1))  # Paddle's own box can be empty
        h = min(height, max(round(width / self.ratio[0]), 1))
        return (height - h) // 2, (width - w) // 2, h, w

    def apply(self, image: np.ndarray, parameters: tuple[int, int, int, int]) -> np.ndarray:
        top, left, h, w = parameters
        return Resize(self.size, self.interpolation).apply(image[top : top + h, left : left + w])


@dataclass(frozen=True)
class RandomCrop:
    """Black margins of ``padding`` pixels all around, then a random box of the image's own size.

    Zeros, not reflection, as in the ResNet paper (section 4.2) and in torchvision's and Paddle's default.
    """

    padding: int = 4

    def draw(self, rng: np.random.Generator, height: int, width: int) -> tuple[int, int]:
        """Return (top, left) of the box in the padded image."""
        return int(rng.integers(2 * self.padding + 1)), int(rng.integers(2 * self.padding + 1))

    def apply(self, image: np.ndarray, parameters: tuple[int, int]) -> np.ndarray:
        (top, left), (height, width) = parameters, image.shape[:2]
        padded = cv2.copyMakeBorder(image, *[self.padding] * 4, borderType=cv2.BORDER_CONSTANT, value=0)
        return padded[top : top + height, left : left + width]


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """Left and right exchanged with probability ``prob``."""

    prob: float = 0.5

    def draw(self, rng: np.random.Generator, height: int, width: int) -> bool:
        return rng.random() < self.prob

    def apply(self, image: np.ndarray, parameters: bool) -> np.ndarray:
        return cv2.flip(image, 1) if parameters else image


@dataclass(frozen=True)
class RandomRotation:
    """A turn by an angle uniform in ± ``degrees``, counter-clockwise, nearest pixel, black outside.

    The centre is (width / 2, height / 2) in cv2's coordinates, in which the first pixel's centre is 0: half a
    pixel off the image's middle, as in Paddle.
    """

    degrees: float

    def draw(self, rng: np.random.Generator, height: int, width: int) -> float:
        return rng.uniform(-self.degrees, self.degrees)

    def apply(self, image: np.ndarray, parameters: float) -> np.ndarray:
        height, width = image.shape[:2]
        matrix = cv2.getRotationMatrix2D((width / 2.0, height / 2.0), parameters, 1)
        return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=0)


@dataclass(frozen=True)
class Normalize(Fixed):
    """uint8 ``[H, W, 3]`` to float32 ``[3, H, W]``: (value / 255 - mean) / std, by a table of 256 values."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tables: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = np.arange(256, dtype=np.float32) / np.float32(255)
        mean, std = np.float32(self.mean)[:, None], np.float32(self.std)[:, None]
        object.__setattr__(self, "tables", (values - mean) / std)

    def apply(self, image: np.ndarray, parameters: None = None) -> np.ndarray:
        output = np.empty((3, *image.shape[:2]), np.float32)
        for plane, channel, table in zip(output, cv2.split(image), self.tables, strict=True):
            cv2.LUT(channel, table, dst=plane)
        return output


@dataclass(frozen=True)
class RandomErasing:
    """With probability ``prob`` a box of the normalised image is set to 0, the mean colour.

    Area uniform in ``scale``, height / width log-uniform in ``ratio``; nothing where ten draws do not fit.
    Source: Zhong et al., Random Erasing Data Augmentation, AAAI 2020.
    """

    prob: float
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)

    def draw(self, rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int] | None:
        """Return (top, left, height, width) of the box, or None."""
        if rng.random() >= self.prob:
            return None
        for _ in range(ATTEMPTS):
            area = rng.uniform(*self.scale) * (height * width)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < height and w < width:
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        return None

    def apply(self, image: np.ndarray, parameters: tuple[int, int, int, int] | None) -> np.ndarray:
        if parameters is None:
            return image
        top, left, h, w = parameters
        image = image.copy()
        image[:, top : top + h, left : left + w] = 0
        return image


# Colour jitter --------------------------------------------------------------------------------------------------------

SLAB_PIXELS = 8192  # as many as stay in the cache as float32, and off the allocator's slow path


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply by ``factor``."""
    return cv2.LUT(image, (np.arange(256) * factor).clip(0, 255).astype(np.uint8))


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Stretch by ``factor`` about the value 74 (Paddle's constant; torchvision takes the image's mean)."""
    return cv2.LUT(image, ((np.arange(256) - 74) * factor + 74).clip(0, 255).astype(np.uint8))


def adjust_saturation(image: np.ndarray, alpha: float) -> np.ndarray:
    """Blend with grey: 0 is grey, 1 the image. Paddle's grey takes the channels for BGR, whatever they are."""
    output = np.empty_like(image)
    rows = max(1, SLAB_PIXELS // image.shape[1])
    for top in range(0, len(image), rows):
        pixels = image[top : top + rows].astype(np.float32)
        grey = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)[..., None]
        pixels *= alpha
        grey *= 1 - alpha
        pixels += grey
        output[top : top + rows] = np.clip(pixels, 0, 255, out=pixels)
    return output


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turn the hue by ``shift`` of the full circle (channels again taken for BGR)."""
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV_FULL)
    hsv[..., 0] = (hsv[..., 0].astype(np.int32) + int(shift * 255)) % 256
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR_FULL)


_ADJUSTMENTS = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue, in an order drawn for each image.

    Brightness and contrast factors are uniform in 1 ± value, the hue's shift in ± value. Saturation is stronger
    than it says: Paddle draws a factor f in 1 ± value and then, inside the pixel operation, blends with an
    alpha uniform in [max(0, 1 - f), 1 + f], so that 0.2 already reaches from grey to twice the saturation. The
    sources trained with that, and so do we.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def draw(self, rng: np.random.Generator, height: int, width: int) -> tuple[tuple[str, float], ...]:
        """Return the (name of the operation, factor) in the order of their application."""
        parameters = []
        for name in [tuple(_ADJUSTMENTS)[place] for place in rng.permutation(len(_ADJUSTMENTS))]:
            value = getattr(self, name)
            if value == 0:
                continue
            lowest, highest = (-value, value) if name == "hue" else (max(0.0, 1 - value), 1 + value)
            factor = rng.uniform(lowest, highest)
            if name == "saturation":
                factor = rng.uniform(max(0.0, 1 - factor), 1 + factor)
            parameters.append((name, factor))
        return tuple(parameters)

    def apply(self, image: np.ndarray, parameters: tuple[tuple[str, float], ...]) -> np.ndarray:
        for name, factor in parameters:
            image = _ADJUSTMENTS[name](image, factor)
        return image


# Pipelines ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pipeline:
    """Transforms one after the other: uint8 ``[H, W, 3]`` to float32 ``[3, *size]``."""

    transforms: tuple[Any, ...]  # see the head of this file
    size: tuple[int, int]

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for transform in self.transforms:
            height, width = image.shape[:2] if image.dtype == np.uint8 else image.shape[1:]
            image = transform.apply(image, transform.draw(rng, height, width))
        return image

    def batch(self, images: np.ndarray | Sequence[np.ndarray], indices: np.ndarray, key: Sequence[int]) -> np.ndarray:
        """Return ``images[indices]`` transformed, float32 ``[B, 3, *size]``.

        The draws for an image come from ``generator(*key, index)``: they depend on the image, not on its batch.
        """
        cv2.setNumThreads(0)  # images are small: cv2's own threads would only wait for each other
        output = np.empty((len(indices), 3, *self.size), np.float32)
        for result, index in zip(output, indices, strict=True):
            result[:] = self(images[index], generator(*key, int(index)))
        return output


def build_train_transforms(augment: CfgNode, image_size: int | Sequence[int]) -> Pipeline:
    """Return the training pipeline of the section ``AUGMENT`` for images of ``image_size`` (side or (h, w)).

    Crop, flip, RandAugment, colour jitter, rotation, normalisation, erasing; what is switched off is left out.
    The iFormer and DFFormer sources flip after the jitter, the ConvMixer one before: the two commute.
    """
    size = pair(image_size)
    resize = Resize(size, augment.INTERPOLATION)
    crops = {
        "random_resized": [
            RandomResizedCrop(size, tuple(augment.CROP_SCALE), tuple(augment.CROP_RATIO), augment.INTERPOLATION)
        ],
        "pad": [resize, RandomCrop(augment.CROP_PADDING)],
        "none": [resize],
    }
    transforms = crops[augment.CROP]
    if augment.HFLIP:
        transforms.append(RandomHorizontalFlip(augment.HFLIP))
    if augment.RANDAUGMENT_N:
        transforms.append(RandAugment(augment.RANDAUGMENT_N, augment.RANDAUGMENT_M))
    if augment.BRIGHTNESS or augment.CONTRAST or augment.SATURATION or augment.HUE:
        transforms.append(ColorJitter(augment.BRIGHTNESS, augment.CONTRAST, augment.SATURATION, augment.HUE))
    if augment.ROTATION:
        transforms.append(RandomRotation(augment.ROTATION))
    transforms.append(Normalize(tuple(augment.MEAN), tuple(augment.STD)))
    if augment.ERASING:
        transforms.append(RandomErasing(augment.ERASING))
    return Pipeline(tuple(transforms), size)


def build_eval_transforms(augment: CfgNode, image_size: int | Sequence[int]) -> Pipeline:
    """Return the evaluation pipeline: scale to ``image_size`` (side or (h, w)), normalise.

    Where AUGMENT.EVAL_CROP_PCT is 0, the whole image is scaled, as in the notebooks; else its middle is cut out.
    """
    size = pair(image_size)
    normalize = Normalize(tuple(augment.MEAN), tuple(augment.STD))
    if augment.EVAL_CROP_PCT:
        return Pipeline((ResizeCenterCrop(size, augment.EVAL_CROP_PCT, augment.INTERPOLATION), normalize), size)
    return Pipeline((Resize(size, augment.INTERPOLATION), normalize), size)
