"""Input pipelines to be timed: a recipe's transforms on random images in memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
from paddle.io import DataLoader, Dataset
from paddle.vision import transforms as T
from yacs.config import CfgNode

from configs.load import load_config
from datasets import ImageDataset
from datasets.batch import faster
from datasets.loader import TrainLoader
from datasets.transforms import build_train_transforms
from utils.paths import ROOT

CONFIGS = ROOT / "configs"
RECIPES = {"32×32: padded crop, flip": "iformer_s_cifar10_32.yaml",
           "224×224: random resized crop, jitter, flip, rotation": "iformer_s_cifar10.yaml"}
PIPELINES = ("suite", "one by one", "sources")  # DATA.PIPELINE batch and reference; a DataLoader of processes
BATCH_SIZE = 128
IMAGES = 10_000


def batches(question: dict[str, Any]) -> Iterator[Any]:
    """Yield batches without end, of the ``pipeline`` and ``recipe`` of a question.

    ``sources`` uses the question's number of ``workers``, the others the threads of the recipe.
    """
    config = load_config(CONFIGS / question["recipe"], [f"DATA.BATCH_SIZE={BATCH_SIZE}"])
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), np.uint8)
    dataset = ImageDataset(pixels, np.arange(IMAGES) % 10, tuple("0123456789"), "noise", "train")
    if question["pipeline"] == "sources":
        for _ in count():
            yield from DataLoader(_Images(dataset, _source_transforms(config)), batch_size=BATCH_SIZE, shuffle=True,
                                  drop_last=True, num_workers=question["workers"])
    transform = build_train_transforms(config.AUGMENT, config.DATA.IMAGE_SIZE)
    if question["pipeline"] == "suite":
        transform, _ = faster(transform)
    loader = TrainLoader(dataset, transform, BATCH_SIZE, config.RUNTIME.SEED, config.DATA.WORKERS)
    for epoch in count():
        yield from loader.epoch(epoch)


def _source_transforms(config: CfgNode) -> T.Compose:
    """Return the steps from ``paddle.vision.transforms`` (cv2), as the iFormer and DFFormer notebooks have them."""
    augment, size = config.AUGMENT, (config.DATA.IMAGE_SIZE,) * 2
    jitter = augment.BRIGHTNESS, augment.CONTRAST, augment.SATURATION, augment.HUE
    resized = augment.CROP == "random_resized"
    return T.Compose([
        T.RandomResizedCrop(size, augment.CROP_SCALE, augment.CROP_RATIO, augment.INTERPOLATION) if resized
        else T.Resize(size, augment.INTERPOLATION),
        *([T.RandomCrop(size, padding=augment.CROP_PADDING)] if augment.CROP == "pad" else []),
        *([T.ColorJitter(*jitter)] if any(jitter) else []),
        *([T.RandomHorizontalFlip(augment.HFLIP)] if augment.HFLIP else []),
        *([T.RandomRotation(augment.ROTATION)] if augment.ROTATION else []),
        T.ToTensor(), T.Normalize(augment.MEAN, augment.STD)])


class _Images(Dataset):
    """An ImageDataset for Paddle's DataLoader."""

    def __init__(self, dataset: ImageDataset, transform: T.Compose) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, np.ndarray]:
        image = self.transform(self.dataset.images[index])
        return image.astype("float32"), np.array(self.dataset.labels[index], np.int64)
