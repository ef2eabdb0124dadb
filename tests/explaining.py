"""Small networks of which it is known what they see."""

from __future__ import annotations

import numpy as np
import paddle
from paddle import nn

from analysis.explain.image_model import ImageModel
from configs.load import load_config
from processes import ROOT, TINY

SIDE = 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image_model(network: nn.Layer, *overrides: str) -> ImageModel:
    """Return a network with the quick start's config, whose mean colour is grey."""
    return ImageModel(load_config(ROOT / "configs" / "quickstart.yaml", [*TINY, *overrides]), network)


def picture(seed: int = 0) -> np.ndarray:
    """Return a smooth image of a few coloured patches, uint8 ``[32, 32, 3]``."""
    import cv2

    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)


class FromImageNet(nn.Layer):
    """A network behind InterpretDL's normalisation: images by ImageNet's mean and std to the logits of another's."""

    def __init__(self, network: nn.Layer, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        as_map = [paddle.to_tensor(np.float32(v).reshape(3, 1, 1)) for v in (IMAGENET_MEAN, IMAGENET_STD, mean, std)]
        self.own_mean, self.own_std, self.mean, self.std = as_map

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        return self.network((images.astype("float32") * self.own_std + self.own_mean - self.mean) / self.std)


class Linear(nn.Layer):
    """Two classes, the logit of the first linear in the pixels, that of the second 0."""

    def __init__(self, seed: int = 0, scale: float = 0.05) -> None:
        super().__init__()
        weights = scale * np.random.default_rng(seed).standard_normal((3, SIDE, SIDE))
        self.register_buffer("weights", paddle.to_tensor(weights.astype(np.float32)))

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        logit = (images * self.weights).sum([1, 2, 3])
        return paddle.stack([logit, paddle.zeros_like(logit)], axis=1)


class OnePatch(nn.Layer):
    """Two classes: the first where the patch in rows 8 to 15, columns 20 to 27 is not the mean colour."""

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        seen = images[:, :, 8:16, 20:28].abs().mean([1, 2, 3])
        return paddle.stack([4 * seen, 2 * paddle.ones_like(seen)], axis=1)


class ChannelsLast(nn.Layer):
    """Channels first to channels last."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return x.transpose([0, 2, 3, 1])


class Convolutions(nn.Layer):
    """Two convolutions, global average pooling, a linear head; ``maps`` outputs ``[B, 6, 16, 16]`` or channels last.

    ``seen`` counts images.
    """

    def __init__(self, channels_last: bool = False, classes: int = 4, scale: float = 8.0) -> None:
        super().__init__()
        paddle.seed(1)
        self.first = nn.Sequential(nn.Conv2D(3, 8, 3, padding=1), nn.ReLU())
        self.map_layout = "NHWC" if channels_last else "NCHW"
        self.maps = nn.Sequential(nn.Conv2D(8, 6, 3, stride=2, padding=1), nn.Tanh(),
                                  *([ChannelsLast()] if channels_last else []))
        self.head = nn.Linear(6, classes)
        self.scale, self.seen = scale, 0
        self.eval()

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        self.seen += len(images)
        maps = self.maps(self.first(images))
        return self.scale * self.head(maps.mean([1, 2] if self.map_layout == "NHWC" else [2, 3]))
