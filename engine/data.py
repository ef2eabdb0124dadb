"""The images of a run: loaders for its splits, and ``dataset.json``, which records what it was trained on.

Without the record, a changed image folder (its class order is that of the names) would silently give a resumed run or
an evaluation other labels.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from yacs.config import CfgNode

from datasets import ImageDataset, build_dataset
from datasets.batch import BatchPipeline, Unsupported
from datasets.loader import EvalLoader, TrainLoader
from datasets.transforms import Pipeline, build_eval_transforms, build_train_transforms
from engine import distributed
from errors import UserError
from utils.fileio import read_json, write_json

log = logging.getLogger("suite")

NAME = "dataset.json"


def build_train_loader(config: CfgNode) -> TrainLoader:
    """Return the shuffled, augmented batches of the training split."""
    transform = _by_batch(config, build_train_transforms(config.AUGMENT, config.DATA.IMAGE_SIZE))
    return TrainLoader(build_dataset(config.DATA, "train"), transform, config.DATA.BATCH_SIZE, config.RUNTIME.SEED,
                       config.DATA.WORKERS, rows=distributed.shard_indices(config.DATA.BATCH_SIZE))


def build_eval_loader(config: CfgNode, split: str) -> EvalLoader:
    """Return the batches of a split, transformed for evaluation; raises UserError where the head is too small."""
    dataset = build_dataset(config.DATA, split)
    if len(dataset.class_names) > config.MODEL.NUM_CLASSES:
        raise UserError(f"MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}, expected at least the "
                        f"{len(dataset.class_names)} classes of {dataset.name}")
    if len(dataset.class_names) < config.MODEL.NUM_CLASSES:
        log.warning("%s has %d classes, MODEL.NUM_CLASSES is %d: label k is compared with output k, so accuracies are "
                    "wrong unless these are the first outputs in this order", dataset.name, len(dataset.class_names),
                    config.MODEL.NUM_CLASSES)
    transform = _by_batch(config, build_eval_transforms(config.AUGMENT, config.DATA.IMAGE_SIZE))
    return EvalLoader(dataset, transform, config.DATA.EVAL_BATCH_SIZE, config.DATA.WORKERS, distributed.rank(),
                      distributed.world_size())


def _by_batch(config: CfgNode, transform: Pipeline) -> Pipeline | BatchPipeline:
    """Return a faster pipeline for the same pixels, where there is one and DATA.PIPELINE allows it."""
    if config.DATA.PIPELINE == "batch":
        try:
            return BatchPipeline(transform)
        except Unsupported as reason:
            log.info("images are transformed one by one, as with DATA.PIPELINE reference: %s", reason)
    return transform


def record_data(run: Path, dataset: ImageDataset, resume: bool) -> None:
    """Write ``dataset.json``; UserError where a run is resumed with other classes or other images."""
    now = {"name": dataset.name, "training_images": len(dataset), "checksum": _checksum(dataset),
           "classes": list(dataset.class_names)}
    before = _read(run / NAME) if resume else None
    if before is None:
        write_json(run / NAME, now)
        return
    _compare(run / NAME, before["classes"], dataset)
    for key, what in (("training_images", "training images"), ("checksum", "as checksum of names and labels")):
        if before.get(key) != now[key]:
            raise UserError(f"{run / NAME}: --resume continues a run as it was, with {before.get(key)} {what}, but "
                            f"{dataset.name} now has {now[key]} (DATA.ROOT)")


def check_classes(weights: Path, dataset: ImageDataset, classes: Sequence[str] | None = None) -> None:
    """Raise UserError where ``dataset`` has other classes than ``classes``, or than the run folder of ``weights``."""
    classes = classes or trained_classes(weights)
    if classes:
        _compare(weights.parent, list(classes), dataset)


def trained_classes(weights: Path) -> tuple[str, ...] | None:
    """Return the classes that the run folder of ``weights`` records, None outside of one."""
    before = _read(weights.parent / NAME)
    return None if before is None else tuple(before["classes"])


def _compare(path: Path, before: list[str], dataset: ImageDataset) -> None:
    now = list(dataset.class_names)
    if before == now:
        return
    place = next((index for index, (old, new) in enumerate(zip(before, now, strict=False)) if old != new), None)
    differing = (f"{len(before)} classes, not {len(now)}" if place is None
                 else f"{before[place]!r} as class {place}, not {now[place]!r}")
    raise UserError(f"{path}: the weights were trained on {differing} as {dataset.name} has now (DATA.NAME, DATA.ROOT)")


def _checksum(dataset: ImageDataset) -> int:
    """Return a checksum of the labels in their order, and of the names where images are files."""
    start = 0 if isinstance(dataset.images, np.ndarray) else dataset.images.checksum()
    return zlib.crc32(dataset.labels.astype("<i8").tobytes(), start)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content = read_json(path)
    classes = content.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path}: not the record of a run's data, expected a list of classes")
    return content
