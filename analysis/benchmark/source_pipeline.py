"""The input pipeline as the sources have it, to be timed against the suite's: nothing trains with it.

``paddle.vision.transforms`` on one image after the other (cv2 backend) in the worker processes of a
``paddle.io.DataLoader``: the iFormer and DFFormer notebooks. For the recipes that these transforms do not cover
(RandAugment is torchvision's there) the suite's own class stands in the same place.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from paddle.io import DataLoader, Dataset
from paddle.vision import transforms as T

from datasets.dataset import ImageDataset
from datasets.randaugment import RandAugment

if TYPE_CHECKING:
    from yacs.config import CfgNode

SOURCE_WORKERS = 4  # of the notebooks; on two cores two are faster


def source_batches(dataset: ImageDataset, config: CfgNode, workers: int = SOURCE_WORKERS) -> Iterator[Any]:
    """Yield one epoch of batches, (float32 ``[B, 3, H, W]``, int64 ``[B]``) as tensors, in random order.

    Transforms, size and batch are the config's; its erasing, mixup and cutmix are left out.
    """
    yield from DataLoader(_Images(dataset, source_transforms(config)), batch_size=config.DATA.BATCH_SIZE, shuffle=True,
                          drop_last=True, num_workers=workers)


def source_transforms(config: CfgNode) -> T.Compose:
    """Return Paddle's transforms for the sections AUGMENT and DATA of a config."""
    augment, size = config.AUGMENT, config.DATA.IMAGE_SIZE
    size = tuple(size) if isinstance(size, list) else (size, size)
    steps: list[Callable[[Any], Any]] = []
    if augment.CROP == "random_resized":
        steps.append(T.RandomResizedCrop(size, augment.CROP_SCALE, augment.CROP_RATIO, augment.INTERPOLATION))
    else:
        steps.append(T.Resize(size, augment.INTERPOLATION))
    if augment.CROP == "pad":
        steps.append(T.RandomCrop(size, padding=augment.CROP_PADDING))
    if augment.RANDAUGMENT_N:
        steps.append(_RandAugment(augment.RANDAUGMENT_N, augment.RANDAUGMENT_M))
    jitter = augment.BRIGHTNESS, augment.CONTRAST, augment.SATURATION, augment.HUE
    if any(jitter):
        steps.append(T.ColorJitter(*jitter))
    if augment.HFLIP:
        steps.append(T.RandomHorizontalFlip(augment.HFLIP))
    if augment.ROTATION:
        steps.append(T.RandomRotation(augment.ROTATION))
    return T.Compose([*steps, T.ToTensor(), T.Normalize(augment.MEAN, augment.STD)])


class _RandAugment(RandAugment):
    """RandAugment that draws from Python's ``random``, as transforms in worker processes do."""

    def __call__(self, image: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(random.getrandbits(32))
        return self.apply(image, self.draw(rng, *image.shape[:2]))


class _Images(Dataset):
    """An ImageDataset as the DataLoader wants it, with its dtypes of Paddle's Cifar10."""

    def __init__(self, dataset: ImageDataset, transform: T.Compose) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, np.ndarray]:
        image = self.transform(self.dataset.images[index])
        return image.astype("float32"), np.array(self.dataset.labels[index], np.int64)
