"""What a data set's pixels are: a figure measured on a copy that went through JPEG is not one on the original."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from datasets import build_dataset
from errors import UserError

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from datasets.dataset import ImageDataset

# SHA-256 of the first 1,017 test images of CIFAR-10, uint8 [1017, 32, 32, 3] in RGB: all whose original pixels we know.
FIRST = 1017
ORIGINAL = "48bde46fb9080c13770d6a8c4163dc24cff90c2802470aa26c4d6c392faf50f3"
JPEG = "205aae1328c992c204272dc63c1d6a8b8e5165c4b9695047ccf0d628973b09a0"
JPEG_LABEL = "CIFAR-10 (JPEG re-encoding)"
TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "cifar100_coarse": "CIFAR-100, 20 superclasses",
          "mnist": "MNIST"}


def pixels_sha256(dataset: ImageDataset) -> str | None:
    """Return the SHA-256 of all pixels of images in memory, in their order; None where they are read from files."""
    return _digest(dataset.images) if isinstance(dataset.images, np.ndarray) else None


def origin(data: CfgNode) -> str:
    """Return what figures on the section ``DATA`` are to be labelled with.

    CIFAR-10's test images tell by their first 1,017 whether they are the original ones ("CIFAR-10"; a file of these
    alone: "CIFAR-10, 1,017 original test images"), those that went through JPEG, or neither, as where there are no test
    images; the training images are taken to have gone the same way. Other data sets go by their name.
    """
    title = TITLES.get(data.NAME, data.NAME)
    if data.NAME != "cifar10":
        return title
    every = data.clone()
    every.defrost()
    every.MAX_IMAGES = 0
    try:
        images = build_dataset(every, "test").images
    except UserError:  # a file of training images alone
        images = np.zeros((0, 32, 32, 3), np.uint8)
    kind = _digest(images[:FIRST])
    if kind == JPEG:
        return JPEG_LABEL if len(images) == 10_000 else f"{JPEG_LABEL}, {len(images):,} test images"
    if kind == ORIGINAL:
        return title if len(images) == 10_000 else f"{title}, {len(images):,} original test images"
    return f"{title} (pixels of unknown origin)"


def _digest(images: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(images)).hexdigest()
