"""Colour jitter as ``paddle.vision.transforms`` does it on arrays, bit by bit, quirks included.

Images are uint8 ``[H, W, 3]`` in RGB; ``datasets/transforms.py`` says what ``draw`` and ``apply`` are.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

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
