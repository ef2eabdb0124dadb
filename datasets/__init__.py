"""Images and labels: where they come from, how they are split, and how they become batches."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from errors import UserError, nearest

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from datasets.dataset import ImageDataset

# The data sets by DATA.NAME. Each module has ``read(split, root, may_download, name) -> ImageDataset`` for the splits
# train and test, and ``class_names(root, name) -> tuple[str, ...]``.
DATASETS = {
    "digits": "datasets.digits",
    "cifar10": "datasets.cifar",
    "cifar100": "datasets.cifar",
    "cifar100_coarse": "datasets.cifar",
    "mnist": "datasets.mnist",
    "imagefolder": "datasets.imagefolder",
}
SPLITS = ("train", "holdout", "test")


def build_dataset(data: CfgNode, split: str) -> ImageDataset:
    """Return one split of the data set that the section ``DATA`` describes.

    Its keys are NAME, ROOT, DOWNLOAD, HOLDOUT and MAX_IMAGES. ``holdout`` has HOLDOUT images of the training set,
    stratified by class and chosen by a fixed rule; ``train`` has the others in their official order; ``test`` is the
    official test set. MAX_IMAGES (0: all) of a split are kept by the same rule. Of folders of images only names are
    read. UserError where data are missing or broken, or a split cannot be made.
    """
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}: use one of {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    dataset = _split(data, split)
    if not 0 < data.MAX_IMAGES < len(dataset):
        return dataset
    from datasets.dataset import stratified_holdout

    return dataset.select(stratified_holdout(dataset.labels, data.MAX_IMAGES)[1], split)


def class_names(name: str, root: str = "") -> tuple[str, ...]:
    """Return what the labels of a data set mean, in their order, without reading images.

    ``root`` (DATA.ROOT) matters for ``imagefolder`` alone, whose classes are its folders.
    """
    return _module(name).class_names(root, name)


def _split(data: CfgNode, split: str) -> ImageDataset:
    official = "test" if split == "test" else "train"
    everything = _module(data.NAME).read(official, data.ROOT, data.DOWNLOAD, data.NAME)
    if split == "test" or (split == "train" and data.HOLDOUT == 0):
        return everything
    largest = len(everything) - len(everything.class_names)
    if not 0 < data.HOLDOUT <= largest:
        raise UserError(
            f"DATA.HOLDOUT is {data.HOLDOUT}: the hold-out of {data.NAME} can have 1 to {largest:,} images "
            "(0 trains on all images and has no split 'holdout': selection is then on 'test')"
        )
    from datasets.dataset import stratified_holdout

    kept, held_out = stratified_holdout(everything.labels, data.HOLDOUT)
    return everything.select(kept if split == "train" else held_out, split)


def _module(name: str) -> ModuleType:
    if name not in DATASETS:
        raise UserError(f"DATA.NAME is {name!r}: use one of {', '.join(DATASETS)}{nearest(name, DATASETS)}")
    return importlib.import_module(DATASETS[name])
