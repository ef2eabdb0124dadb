"""Input pipelines as the benchmark times them: a recipe's transforms on images that stand in memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np

from configs.load import load_config
from datasets.batch import faster
from datasets.dataset import ImageDataset
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
    """Yield batches of BATCH_SIZE images without end, of the ``pipeline`` and ``recipe`` that the question names.

    ``sources`` takes the ``workers`` processes of the question; the others the threads of the recipe.
    """
    config = load_config(CONFIGS / question["recipe"], [f"DATA.BATCH_SIZE={BATCH_SIZE}"])
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), np.uint8)
    dataset = ImageDataset(pixels, np.arange(IMAGES) % 10, tuple("0123456789"), "noise", "train")
    if question["pipeline"] == "sources":
        from analysis.benchmark.source_pipeline import source_batches

        for _ in count():
            yield from source_batches(dataset, config, question["workers"])
    transform = build_train_transforms(config.AUGMENT, config.DATA.IMAGE_SIZE)
    if question["pipeline"] == "suite":
        transform, _ = faster(transform)
    loader = TrainLoader(dataset, transform, BATCH_SIZE, config.RUNTIME.SEED, config.DATA.WORKERS)
    for epoch in count():
        yield from loader.epoch(epoch)
