"""Images and labels: where they come from, how they are split, and how they become batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from errors import UserError, nearest

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from datasets.dataset import ImageDataset

DATASETS = ("digits", "cifar10", "cifar100", "cifar100_coarse", "mnist", "imagefolder")
SPLITS = ("train", "holdout", "test")


def build_dataset(data: CfgNode, split: str) -> ImageDataset:
    """Return one split of the data set that the section ``DATA`` describes.

    Its keys are NAME, ROOT, DOWNLOAD, HOLDOUT and MAX_IMAGES. ``holdout`` are HOLDOUT images of the training set,
    every class its share, chosen by a fixed rule; ``train`` are the others in their official order; ``test`` is the
    official test set. Of each, MAX_IMAGES (0: all) are kept by the same rule. UserError where the data are missing or
    broken, or a split cannot be made.
    """
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}: use one of {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    dataset = _split(data, split)
    if not 0 < data.MAX_IMAGES < len(dataset):
        return dataset
    from datasets.dataset import stratified_holdout

    return dataset.select(stratified_holdout(dataset.labels, data.MAX_IMAGES)[1], split)


def _split(data: CfgNode, split: str) -> ImageDataset:
    everything = _read(data, "test" if split == "test" else "train")
    if split == "test" or (split == "train" and data.HOLDOUT == 0):
        return everything
    room = len(everything) - len(everything.class_names)
    if not 0 < data.HOLDOUT <= room:
        raise UserError(
            f"DATA.HOLDOUT is {data.HOLDOUT}: the hold-out of {data.NAME} can have 1 to {room:,} images "
            "(0 trains on all images and has no split 'holdout': selection is then on 'test')"
        )
    from datasets.dataset import stratified_holdout

    kept, held_out = stratified_holdout(everything.labels, data.HOLDOUT)
    return everything.select(kept if split == "train" else held_out, split)


def class_names(name: str, root: str = "") -> tuple[str, ...]:
    """Return what the labels of a data set mean, in their order, without reading images.

    ``root`` (DATA.ROOT) matters for ``imagefolder`` alone, whose classes are its folders.
    """
    if name == "digits":
        from datasets.digits import CLASSES

        return CLASSES
    if name == "mnist":
        from datasets.mnist import CLASSES

        return CLASSES
    if name == "imagefolder":
        from datasets import imagefolder

        return imagefolder.class_names(root)
    if name in DATASETS:
        from datasets.cifar import RELEASES

        return RELEASES[name].classes
    raise _unknown(name)


def _read(data: CfgNode, split: str) -> ImageDataset:
    if data.NAME == "digits":
        from datasets.digits import read_digits

        return read_digits(split)
    if data.NAME == "mnist":
        from datasets.mnist import read_mnist

        return read_mnist(split, data.ROOT, data.DOWNLOAD)
    if data.NAME == "imagefolder":
        from datasets.imagefolder import read_imagefolder

        return read_imagefolder(split, data.ROOT)
    if data.NAME in DATASETS:
        from datasets.cifar import read_cifar

        return read_cifar(data.NAME, split, data.ROOT, data.DOWNLOAD)
    raise _unknown(data.NAME)


def _unknown(name: str) -> UserError:
    return UserError(f"DATA.NAME is {name!r}: use one of {', '.join(DATASETS)}{nearest(name, DATASETS)}")
