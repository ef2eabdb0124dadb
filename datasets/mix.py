"""Mixup and CutMix by batch: each image with its mirror in the batch, one ratio for all.

Sources: Zhang et al., mixup, ICLR 2018; Yun et al., CutMix, ICCV 2019; the rules for drawing are timm's
(``timm.data.Mixup``, mode "batch"). Label smoothing is the loss's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from datasets.randomness import MIX, generator


class Mix(NamedTuple):
    """What is done to one batch: ``ratio``, the weight of the image itself; ``box`` (top, bottom, left, right) is
    filled from its mirror in CutMix and None in mixup."""

    ratio: float
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class BatchMix:
    """Mixup with Beta(mixup, mixup), CutMix with Beta(cutmix, cutmix), either off at 0.

    ``prob``: a batch is mixed at all; ``switch_prob``: by CutMix where both are on.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5

    def draw(self, seed: int, iteration: int, height: int, width: int) -> Mix:
        """Return what happens to the batch of ``iteration``; the same for every process of a run."""
        rng = generator(seed, MIX, iteration)
        if not (self.mixup or self.cutmix) or rng.random() >= self.prob:
            return Mix(1.0)
        use_cutmix = self.cutmix > 0 and (self.mixup == 0 or rng.random() < self.switch_prob)
        alpha = self.cutmix if use_cutmix else self.mixup
        ratio = float(rng.beta(alpha, alpha))
        if not use_cutmix:
            return Mix(ratio)
        cut_h, cut_w = int(height * (1 - ratio) ** 0.5), int(width * (1 - ratio) ** 0.5)
        y, x = int(rng.integers(height)), int(rng.integers(width))
        top, bottom = max(y - cut_h // 2, 0), min(y + (cut_h + 1) // 2, height)
        left, right = max(x - cut_w // 2, 0), min(x + (cut_w + 1) // 2, width)
        return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mix_images(images, mix: Mix):
    """Return the mixed batch of ``[B, 3, H, W]``, a numpy array or a paddle tensor as given."""
    if mix.ratio == 1:
        return images
    if mix.box is None:
        return images * mix.ratio + images[::-1] * (1 - mix.ratio)
    top, bottom, left, right = mix.box
    mixed = images + 0
    mixed[:, :, top:bottom, left:right] = images[::-1][:, :, top:bottom, left:right]
    return mixed


def mix_labels(labels: np.ndarray, num_classes: int, mix: Mix) -> np.ndarray:
    """Return the targets of the mixed batch, float32 ``[B, num_classes]``, from int64 ``[B]``."""
    targets = np.eye(num_classes, dtype=np.float32)[labels]
    return mix.ratio * targets + (1 - mix.ratio) * targets[::-1] if mix.ratio < 1 else targets
