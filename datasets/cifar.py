"""CIFAR-10 and CIFAR-100 from their official Python archives, packed or unpacked.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009;
https://www.cs.toronto.edu/~kriz/cifar.html. Nothing of an archive is executed, nothing is written to disk.
"""

from __future__ import annotations

import functools
import glob
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets import ImageDataset
from datasets.archives import (
    CACHES,
    data_root,
    download,
    folders_below,
    is_archive,
    missing,
    read_archive,
    read_file,
    search_paths,
)
from errors import UserError, printable
from utils import pickles

SIDE = 32
ARCHIVE_LIMIT = 512 << 20  # bytes when unpacked; an official archive has 186 million
UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")  # downloads of browsers and tools

_FINE = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel
streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm"""
_COARSE = """aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes
large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees vehicles_1
vehicles_2"""


@dataclass(frozen=True)
class Release:
    """One archive as its authors publish it, and which of its labels are read."""

    title: str
    archive: str
    folder: str
    size: int
    sha256: str
    batches: dict[str, tuple[str, ...]]  # files of each split
    batch_images: dict[str, int]  # images in each file of a split
    labels: str
    classes: tuple[str, ...]
    member_limit: int  # bytes; a file of CIFAR-10 has 31 million, the larger one of CIFAR-100 155 million
    mirrors: tuple[str, ...] = ("https://www.cs.toronto.edu/~kriz/", "https://dataset.bj.bcebos.com/cifar/")

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(name for names in self.batches.values() for name in names)

    @property
    def stems(self) -> tuple[str, ...]:
        """Return how names of copies of the archive begin: browsers' "(1)", Safari's .tar, Keras's cache."""
        return self.archive.removesuffix(".tar.gz"), self.folder

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(mirror + self.archive for mirror in self.mirrors)

    def remedy(self, source: Path) -> str:
        """Return the end of a message about a broken ``source``."""
        what = f"the folder {self.folder}" if source.is_dir() else self.archive
        return f"delete it and run again to download it, or put {what} of {self.urls[0]} in its place"


def _cifar100(labels: str, names: str) -> Release:
    return Release(
        "CIFAR-100", "cifar-100-python.tar.gz", "cifar-100-python", 169_001_437,
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        {"train": ("train",), "test": ("test",)}, {"train": 50_000, "test": 10_000}, labels, tuple(names.split()),
        192 << 20,
    )  # fmt: skip


RELEASES = {
    "cifar10": Release(
        "CIFAR-10", "cifar-10-python.tar.gz", "cifar-10-batches-py", 170_498_071,
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        {"train": 10_000, "test": 10_000}, "labels",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"), 64 << 20,
    ),
    "cifar100": _cifar100("fine_labels", _FINE),
    "cifar100_coarse": _cifar100("coarse_labels", _COARSE),
}  # fmt: skip


def class_names(root: str = "", name: str = "cifar10") -> tuple[str, ...]:
    return RELEASES[name].classes


def read(split: str, root: str = "", may_download: bool = True, name: str = "cifar10") -> ImageDataset:
    """Return the split ``train`` (50,000 images in official order) or ``test`` (10,000), 32×32, of a release.

    ``name`` is one of RELEASES, ``root`` as in ``find_cifar``. UserError where data are missing or not the right ones.
    """
    release = RELEASES[name]
    source = find_cifar(name, root)
    if source is None:
        source = data_root(root) / release.archive
        if not may_download:
            raise missing(f"{release.archive} or {release.folder}", root, source)
        download(source, release.urls, release.sha256, release.size)
    files = [path for path in (source, *(source / file for file in release.files)) if path.exists()]
    batches = _read_batches(name, source, tuple((path.stat().st_mtime_ns, path.stat().st_size) for path in files))
    images, labels = zip(*(batches[file] for file in release.batches[split]), strict=True)
    return ImageDataset(np.concatenate(images), np.concatenate(labels), release.classes, name, split)


def find_cifar(name: str, root: str = "") -> Path | None:
    """Return the archive or the unpacked folder of a release, or None where there is neither.

    ``root`` is the archive itself, the unpacked folder, or a folder that holds one of them, up to three levels down.
    Without a root, AI Studio's folders and the caches of Keras and Paddle are searched too.
    """
    release = RELEASES[name]
    for path in search_paths(root, CACHES):
        if path.is_file():
            return path
        incomplete = None
        for folder in (path, *folders_below(path, 3)):
            enough = any if folder == path else all  # of a folder that is named, missing files are reported
            if enough((folder / file).is_file() for file in release.files):
                return folder
            if (folder / release.archive).is_file():
                return folder / release.archive
            copies = (copy for stem in release.stems for copy in sorted(folder.glob(f"{glob.escape(stem)}*"))
                      if copy.suffix not in UNFINISHED)
            if found := next(filter(is_archive, copies), None):
                return found
            if (folder / release.folder).is_dir() and incomplete is None:
                incomplete = folder / release.folder
        if incomplete:
            return incomplete
    return None


@functools.lru_cache(maxsize=1)
def _read_batches(name: str, source: Path, stamps: tuple[tuple[int, int], ...]
                  ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return ``(images, labels)`` of every batch; ``stamps`` (times and sizes) tell a changed file."""
    release = RELEASES[name]
    remedy, limit = release.remedy(source), release.member_limit
    if source.is_dir():
        pickled = {file: read_file(source / file, limit, remedy)
                   for file in release.files if (source / file).is_file()}
    else:
        pickled = read_archive(source, dict(zip(release.files, release.files, strict=True)), release.title, remedy,
                               ARCHIVE_LIMIT, limit)
    lacking = [file for file in release.files if file not in pickled]
    if lacking:
        raise UserError(f"{printable(source, 300)} is not {release.title}: it lacks {', '.join(lacking)}; {remedy}")
    return {file: _read_batch(pickled.pop(file), release, count, f"{file} in {printable(source, 300)}", remedy)
            for split, count in release.batch_images.items() for file in release.batches[split]}


def _read_batch(data: bytes, release: Release, count: int, title: str, remedy: str) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 ``[count, 32, 32, 3]`` and int64 ``[count]`` from one pickled batch."""
    try:
        batch, _ = pickles.load(memoryview(data), 0, title)
        if not isinstance(batch, dict):
            raise UserError(f"{title} holds no dictionary")
        pixels, labels = getattr(batch.get("data"), "values", None), batch.get(release.labels)
        if pixels is None or pixels.dtype != np.uint8 or pixels.shape != (count, 3 * SIDE * SIDE):
            found = "missing or no array" if pixels is None else f"{pixels.dtype} {list(pixels.shape)}"
            raise UserError(f"{title}: its data are {found}, expected uint8 [{count}, {3 * SIDE * SIDE}]")
        classes, kind = len(release.classes), release.labels.replace("_", " ")
        if type(labels) is not list or len(labels) != count:
            raise UserError(f"{title}: its {kind} are not a list of {count}")
        if not all(type(label) is int and 0 <= label < classes for label in labels):
            raise UserError(f"{title}: its {kind} are not all integers from 0 to {classes - 1}")
    except UserError as error:
        raise UserError(f"{error}; this is not a batch of {release.title}: {remedy}") from None
    images = np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    return images, np.array(labels, dtype=np.int64)
