"""A network with its config's transforms, as explanations use it: images in, probabilities out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from yacs.config import CfgNode

from analysis.grids import class_name
from datasets import class_names
from datasets.transforms import build_eval_transforms
from engine import runtime
from errors import UserError
from utils import pair

BATCH_PIXELS = {"cpu": 256 * 32 * 32, "gpu": 256 * 224 * 224}  # of a forward pass; on a CPU its maps stay in cache


class ImageModel:
    """A network in evaluation mode, and the transforms of its config.

    ``prepare`` scales an image as evaluation does; explanations then change pixels of this uint8 ``[H, W, 3]``, or of
    its normalised float32 ``[3, H, W]``, where 0 is AUGMENT.MEAN. ``advance`` is called with the number of images after
    each forward pass.
    """

    def __init__(self, config: CfgNode, network: nn.Layer) -> None:
        self.config, self.network = config, network
        self.advance: Callable[[int], object] = lambda images: None
        network.eval()
        *self.geometry, normalize = build_eval_transforms(config.AUGMENT, config.DATA.IMAGE_SIZE).transforms
        self.normalise = normalize.apply  # a prepared image to what the network takes, float32 [3, H, W]
        self.size = pair(config.DATA.IMAGE_SIZE)
        self.names = class_names(config.DATA.NAME, config.DATA.ROOT)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Return an RGB image, uint8 ``[H, W, 3]``, at the network's size."""
        for transform in self.geometry:
            image = transform.apply(image, None)
        return np.ascontiguousarray(image)

    def class_name(self, index: int) -> str:
        return class_name(self.names, index)

    @cached_property
    def batch_size(self) -> int:
        """Images of one forward pass without gradients."""
        device = paddle.device.get_device().partition(":")[0]
        return max(1, BATCH_PIXELS.get(device, BATCH_PIXELS["gpu"]) // (self.size[0] * self.size[1]))

    def logits(self, images: paddle.Tensor) -> paddle.Tensor:
        """Return logits ``[N, num_classes]`` of normalised images ``[N, 3, H, W]``, with gradients."""
        with runtime.autocast(self.config.RUNTIME.EVAL_PRECISION):
            logits = self.network(images)
        self.advance(len(images))
        return logits

    @paddle.no_grad()
    def probabilities(self, compose: Callable[[int, int], np.ndarray], count: int) -> np.ndarray:
        """Return class probabilities ``[count, num_classes]`` of images that are composed batch by batch.

        ``compose(start, stop)`` returns normalised images ``[stop - start, 3, H, W]``. Raises UserError where a
        probability is not finite.
        """
        batches = []
        for start in range(0, count, self.batch_size):
            logits = self.logits(paddle.to_tensor(compose(start, min(start + self.batch_size, count))))
            batches.append(F.softmax(logits.astype("float32"), axis=-1).numpy())
        result = np.concatenate(batches)
        if not np.isfinite(result).all():
            raise UserError(f"{self.config.MODEL.NAME} gives probabilities that are not finite and cannot be "
                            "explained; were its weights trained with another config?")
        return result

    def probabilities_of(self, image: np.ndarray) -> np.ndarray:
        """Return the class probabilities ``[num_classes]`` of one prepared image."""
        return self.probabilities(lambda start, stop: self.normalise(image)[None], 1)[0]

    def region_probabilities(self, image: np.ndarray, hidden: np.ndarray, segments: np.ndarray,
                             masks: np.ndarray) -> np.ndarray:
        """Return class probabilities ``[N, num_classes]`` of a prepared image with regions from ``hidden``.

        ``segments`` ``[H, W]`` numbers the regions from 0, ``masks`` ``[N, regions]`` is 1 for the regions that are
        shown. Equal masks are computed once.
        """
        shown, hidden = self.normalise(image), self.normalise(hidden)
        packed, inverse = np.unique(np.packbits(masks.astype(bool), axis=1), axis=0, return_inverse=True)
        distinct = np.unpackbits(packed, axis=1, count=masks.shape[1]).astype(bool)

        def compose(start: int, stop: int) -> np.ndarray:
            return np.where(distinct[start:stop, segments][:, None], shown, hidden)

        return self.probabilities(compose, len(distinct))[inverse.ravel()]
