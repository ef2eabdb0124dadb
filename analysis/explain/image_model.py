"""A network and its config as one thing that explanations ask: images in, probabilities out, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from yacs.config import CfgNode

from datasets import class_names
from datasets.transforms import build_eval_transforms
from errors import UserError

Advance = Callable[[int], None]
"""Is told the number of images that the network has seen since the last call."""

PART_PIXELS = {"cpu": 256 * 32 * 32, "gpu": 256 * 224 * 224}  # of one forward pass; on a CPU its maps stay in cache


def ignore(images: int) -> None:
    """Show no progress."""


class Subject:
    """The network of a config, in evaluation mode, seen from outside.

    ``prepare`` scales an image as evaluation does; what explains then changes pixels of this uint8 ``[H, W, 3]``, or
    values of its normalised ``[3, H, W]``, in which 0 is the mean colour of the config (AUGMENT.MEAN).
    """

    def __init__(self, config: CfgNode, model: nn.Layer) -> None:
        self.config = config
        self.model = model
        model.eval()
        *self.geometry, self.normalize = build_eval_transforms(config.AUGMENT, config.DATA.IMAGE_SIZE).transforms
        size = config.DATA.IMAGE_SIZE
        self.size = tuple(size) if isinstance(size, list) else (size, size)
        self.class_names = class_names(config.DATA.NAME, config.DATA.ROOT)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Return an RGB image, uint8 ``[H, W, 3]``, at the size that the network sees."""
        for transform in self.geometry:
            image = transform.apply(image, None)
        return np.ascontiguousarray(image)

    def normalise(self, image: np.ndarray) -> np.ndarray:
        """Return a prepared image as the network takes it: float32 ``[3, H, W]``."""
        return self.normalize.apply(image)

    def class_name(self, index: int) -> str:
        """Return a class's name, or its number where the head has more outputs than the dataset classes."""
        return self.class_names[index] if index < len(self.class_names) else f"class {index}"

    @cached_property
    def batch_size(self) -> int:
        """Images of one forward pass without gradients."""
        height, width = self.size
        device = paddle.device.get_device().partition(":")[0]
        return max(1, PART_PIXELS.get(device, PART_PIXELS["gpu"]) // (height * width))

    def logits(self, images: paddle.Tensor) -> paddle.Tensor:
        """Return logits ``[N, num_classes]`` of normalised images ``[N, 3, H, W]``, with gradients, in float32."""
        return self.model(images)

    @paddle.no_grad()
    def probabilities(self, compose: Callable[[int, int], np.ndarray], count: int,
                      advance: Advance = ignore) -> np.ndarray:
        """Return class probabilities ``[count, num_classes]`` of images that are made when they are needed.

        ``compose(start, stop)`` returns normalised images ``[stop - start, 3, H, W]``. Raises UserError where the
        network's outputs are not finite.
        """
        parts = []
        for start in range(0, count, self.batch_size):
            stop = min(start + self.batch_size, count)
            logits = self.model(paddle.to_tensor(compose(start, stop)))
            parts.append(F.softmax(logits.astype("float32"), axis=-1).numpy())
            advance(stop - start)
        result = np.concatenate(parts)
        if not np.isfinite(result).all():
            raise UserError(f"{self.config.MODEL.NAME} gives probabilities that are not finite: nothing explains them; "
                            "were its weights trained with another config?")
        return result

    def probabilities_of(self, image: np.ndarray) -> np.ndarray:
        """Return the class probabilities ``[num_classes]`` of one prepared image."""
        return self.probabilities(lambda start, stop: self.normalise(image)[None], 1)[0]


class Regions:
    """An image in which regions can be hidden: what LIME perturbs, and what deletion and insertion rank.

    ``segments`` ``[H, W]`` gives each pixel the number of its region, 0 to ``count - 1``; ``hidden`` stands where a
    region is hidden. Both images are normalised, ``[3, H, W]``.
    """

    def __init__(self, shown: np.ndarray, hidden: np.ndarray, segments: np.ndarray) -> None:
        self.shown, self.hidden, self.segments = shown, hidden, segments
        self.count = int(segments.max()) + 1

    def compose(self, masks: np.ndarray) -> np.ndarray:
        """Return images ``[N, 3, H, W]`` of which the regions with 1 in ``masks`` ``[N, count]`` are shown."""
        return np.where(masks.astype(bool)[:, self.segments][:, None], self.shown, self.hidden)

    def probabilities(self, subject: Subject, masks: np.ndarray, advance: Advance = ignore) -> np.ndarray:
        """Return class probabilities ``[N, num_classes]`` for masks ``[N, count]``; equal masks are computed once.

        ``advance`` counts masks, equal ones too, in as many calls as there are forward passes.
        """
        packed = np.packbits(masks.astype(bool), axis=1)
        keys = np.ascontiguousarray(packed).view(np.dtype((np.void, packed.shape[1]))).ravel()
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        distinct, told = masks[first], [0, 0]

        def count(images: int) -> None:
            told[0] += images
            reached = len(masks) * told[0] // len(distinct)
            advance(reached - told[1])
            told[1] = reached

        found = subject.probabilities(lambda start, stop: self.compose(distinct[start:stop]), len(distinct), count)
        return found[inverse]
