"""RandAugment as in the ConvMixer recipe; the pixels are computed by Pillow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

BINS = 30  # the strength 30 is each operation's maximum
OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
MAXIMA = {  # of the operations that go in either direction; translations as shares of the side
    "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 150 / 331, "TranslateY": 150 / 331, "Rotate": 30.0,
    "Brightness": 0.9, "Color": 0.9, "Contrast": 0.9, "Sharpness": 0.9,
}  # fmt: skip
_ENHANCERS = ("Brightness", "Color", "Contrast", "Sharpness")


@dataclass(frozen=True)
class RandAugment:
    """``count`` operations drawn with replacement, at the strength ``magnitude`` of 0 to 30.

    Source: Cubuk et al., RandAugment, CVPR workshops 2020; list, strengths and pixel operations as in torchvision.
    Nearest pixel, black outside. Operations with a direction go either way with equal chance.
    """

    count: int
    magnitude: float

    def draw(self, rng: np.random.Generator, height: int, width: int) -> tuple[tuple[str, float], ...]:
        """Return (name, strength) of the operations in the order of their application."""
        parameters = []
        for _ in range(self.count):
            name = OPERATIONS[rng.integers(len(OPERATIONS))]
            direction = int(rng.choice((1, -1))) if name in MAXIMA else 1
            parameters.append((name, self.strength(name, height, width) * direction))
        return tuple(parameters)

    def strength(self, name: str, height: int, width: int) -> float:
        """Return the strength of one operation in its forward direction."""
        if name in MAXIMA:
            return _on_scale(0, MAXIMA[name] * {"TranslateX": width, "TranslateY": height}.get(name, 1), self.magnitude)
        if name == "Posterize":
            return 8 - round(4 * self.magnitude / BINS)  # bits that are kept
        if name == "Solarize":
            return _on_scale(255, 0, self.magnitude)  # values from here on are inverted
        return 0.0

    def apply(self, image: np.ndarray, parameters: tuple[tuple[str, float], ...]) -> np.ndarray:
        picture = Image.fromarray(image)
        for name, strength in parameters:
            picture = _apply(picture, name, strength)
        return np.asarray(picture)


def _on_scale(first: float, last: float, magnitude: float) -> float:
    """Return the point ``magnitude`` of 0 to 30 on the way, rounded as torch.linspace rounds: a float32 step taken
    from the nearer end. A last bit decides a grey level here and there."""
    step = float(np.float32(last - first) / np.float32(BINS))
    if magnitude < BINS / 2:
        return float(np.float32(first + step * magnitude))
    return float(np.float32(float(np.float32(last)) - step * (BINS - magnitude)))


def affine(name: str, strength: float) -> tuple[float, ...] | None:
    """Return the map (a, b, c, d, e, f) of a shear or a translation, from output to input pixels: x = a x' + b y' + c,
    y = d x' + e y' + f; None for other operations."""
    return {
        "ShearX": (1, strength, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, strength, 1, 0),
        "TranslateX": (1, 0, -math.trunc(strength), 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, -math.trunc(strength)),
    }.get(name)


def _apply(picture: Image.Image, name: str, strength: float) -> Image.Image:
    if matrix := affine(name, strength):
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
    if name == "Rotate":
        return picture.rotate(strength, Image.Resampling.NEAREST)
    if name in _ENHANCERS:
        return getattr(ImageEnhance, name)(picture).enhance(1 + strength)
    if name == "Posterize":
        return ImageOps.posterize(picture, int(strength))
    if name == "Solarize":
        return ImageOps.solarize(picture, strength)
    if name == "AutoContrast":
        return ImageOps.autocontrast(picture)
    return ImageOps.equalize(picture) if name == "Equalize" else picture
