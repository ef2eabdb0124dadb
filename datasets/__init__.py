"""Labelled images: the data sets, their splits, and where every random draw of the data comes from.

The module of a data set (``configs.schema.DATASETS``) has ``read(split, root, may_download, name) -> ImageDataset`` for
the splits train and test, and ``class_names(root, name) -> tuple[str, ...]``.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
from yacs.config import CfgNode

from configs.schema import DATASETS
from errors import UserError

HOLDOUT_RULE = 20220525  # the one seed of all hold-outs; a run's own seed never moves an image between splits
ORDER, AUGMENT, MIX = 1, 2, 3  # a stream for each use of randomness, so that no two uses share draws

# SHA-256 of CIFAR-10's official test images, uint8 [10000, 32, 32, 3] in RGB.
OFFICIAL = "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04"
TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "cifar100_coarse": "CIFAR-100, 20 superclasses",
          "mnist": "MNIST"}


@dataclass(frozen=True)
class ImageDataset:
    """One split of a data set.

    ``images[index]`` is uint8 ``[H, W, 3]`` in RGB; ``images`` is an array ``[N, H, W, 3]``, or a sequence of images
    of any sizes that are read when asked for. ``labels`` is int64 ``[N]`` with values below ``len(class_names)``,
    ``split`` one of train, holdout, test.
    """

    images: np.ndarray | Sequence[np.ndarray]
    labels: np.ndarray
    class_names: tuple[str, ...]
    name: str
    split: str

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: np.ndarray, split: str) -> ImageDataset:
        """Return the images at ``indices``, in that order, as another split."""
        return replace(self, images=self.images[indices], labels=self.labels[indices], split=split)


def build_dataset(data: CfgNode, split: str) -> ImageDataset:
    """Return the split train, holdout or test of the data set that the section ``DATA`` describes.

    Its keys are NAME, ROOT, DOWNLOAD, HOLDOUT and MAX_IMAGES. ``holdout`` has HOLDOUT images of the training set,
    stratified by class and chosen by a fixed rule; ``train`` has the others in their official order; ``test`` is the
    official test set. MAX_IMAGES (0: all) of a split are kept by the same rule. Of folders of images only names are
    read. UserError where data are missing or broken, or a split cannot be made.
    """
    dataset = _split(data, split)
    if not 0 < data.MAX_IMAGES < len(dataset):
        return dataset
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
    kept, held_out = stratified_holdout(everything.labels, data.HOLDOUT)
    return everything.select(kept if split == "train" else held_out, split)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"datasets.{DATASETS[name]}")


def stratified_holdout(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Split ``range(len(labels))`` into ``(kept, held_out)`` indices, both ascending.

    ``held_out`` has ``count`` members, stratified by class (largest remainders, ties to the lower class). They are
    drawn with numpy's RandomState, whose stream is frozen, so the split is the same on every machine.
    """
    order = np.random.RandomState(HOLDOUT_RULE).permutation(len(labels))
    sizes = np.bincount(labels)
    exact = sizes * count / len(labels)
    quotas = np.floor(exact).astype(int)
    quotas[np.argsort(quotas - exact, kind="stable")[: count - quotas.sum()]] += 1
    by_class = np.split(order[np.argsort(labels[order], kind="stable")], np.cumsum(sizes)[:-1])
    held_out = np.sort(np.concatenate([members[:quota] for members, quota in zip(by_class, quotas, strict=True)]))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def generator(seed: int, stream: int, *key: int) -> np.random.Generator:
    """Return the generator of one use in training.

    Order of an epoch: ``generator(seed, ORDER, epoch)``; one image: ``generator(seed, AUGMENT, epoch, index)``;
    mixing of one batch: ``generator(seed, MIX, iteration)``. The draws depend on these numbers alone: not on
    the number of workers, not on the processes, not on where a run was resumed.
    """
    return np.random.default_rng([seed, stream, *key])


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
    return title if pixels_sha256(_split(data, "test")) == OFFICIAL else f"{title} (unofficial pixels)"
