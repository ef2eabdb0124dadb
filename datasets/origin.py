"""What results on a data set are labelled with, and a checksum of its pixels."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from datasets import build_dataset

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from datasets import ImageDataset

# SHA-256 of CIFAR-10's official test images, uint8 [10000, 32, 32, 3] in RGB.
OFFICIAL = "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04"
TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "cifar100_coarse": "CIFAR-100, 20 superclasses",
          "mnist": "MNIST"}


def pixels_sha256(dataset: ImageDataset) -> str | None:
    """Return the SHA-256 of all pixels of images in memory, in their order; None where they are read from files."""
    if not isinstance(dataset.images, np.ndarray):
        return None
    return hashlib.sha256(np.ascontiguousarray(dataset.images)).hexdigest()


def origin(data: CfgNode) -> str:
    """Return the label of results on the section ``DATA``: its title, and whether CIFAR-10's pixels are not official.

    Its test images decide; the training images are taken to have the same source.
    """
    title = TITLES.get(data.NAME, data.NAME)
    if data.NAME != "cifar10":
        return title
    every = data.clone()
    every.defrost()
    every.MAX_IMAGES = 0
    return title if pixels_sha256(build_dataset(every, "test")) == OFFICIAL else f"{title} (unofficial pixels)"
