"""CIFAR-10 and CIFAR-100 from their official Python archives, packed or unpacked.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009;
https://www.cs.toronto.edu/~kriz/cifar.html. Nothing of an archive is executed, nothing is written to disk.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.archives import read_archive, read_file
from datasets.arrays import read_arrays
from datasets.dataset import ImageDataset
from datasets.download import download
from datasets.pickles import read_pickle
from datasets.places import places
from errors import UserError

SIDE = 32
ARCHIVE_LIMIT = 512 << 20  # bytes when unpacked; an official archive has 186 million

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
        """Return the names of all batches."""
        return tuple(name for names in self.batches.values() for name in names)

    @property
    def urls(self) -> tuple[str, ...]:
        """Return where the archive can be had."""
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


def read_cifar(name: str, split: str, root: str = "", may_download: bool = True) -> ImageDataset:
    """Return the split ``train`` (50,000 images in official order) or ``test`` (10,000), 32×32, of a release.

    ``name`` is one of RELEASES, ``root`` what ``find_cifar`` takes. UserError where there are no data, or not the
    right ones. An ``.npz`` as ``root`` gives the images that it holds (see ``arrays``): a part of the set, or pixels
    that went another way.
    """
    release = RELEASES[name]
    if root.endswith(".npz"):
        path = Path(root).expanduser()
        if not path.is_file():
            raise UserError(f"DATA.ROOT names {root}, but there is no such file")
        images, labels = read_arrays(path, split, release.labels, len(release.classes), SIDE)
        return ImageDataset(images, labels, release.classes, name, split)
    source = find_cifar(name, root)
    if source is None:
        folder = Path(root or "data").expanduser()
        source = folder / release.archive
        if not may_download:
            raise UserError(f"no {release.archive} or {release.folder} found under {folder}: put it at "
                            f"{source.absolute()}, or allow the download with -o DATA.DOWNLOAD=true")
        download(source, release.urls, release.sha256, release.size)
    files = [path for path in (source, *(source / file for file in release.files)) if path.exists()]
    batches = _read_batches(name, source, tuple((path.stat().st_mtime_ns, path.stat().st_size) for path in files))
    images, labels = zip(*(batches[file] for file in release.batches[split]), strict=True)
    return ImageDataset(np.concatenate(images), np.concatenate(labels), release.classes, name, split)


def find_cifar(name: str, root: str = "") -> Path | None:
    """Return the archive or the unpacked folder of a release, or None where there is neither.

    ``root`` is the archive itself, the unpacked folder, or a folder that holds one of them, also one level
    down in a folder ``data*`` as on AI Studio, where ``~/data`` is searched after ``data`` itself.
    """
    release = RELEASES[name]
    for place in places(root):
        if place.is_file() or any((place / file).is_file() for file in release.files):
            return place
        for entry in (release.archive, release.folder):
            if (place / entry).exists():
                return place / entry
    return None


@functools.lru_cache(maxsize=1)
def _read_batches(name: str, source: Path, stamps: tuple[tuple[int, int], ...]
                  ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return ``(images, labels)`` of every batch; ``stamps`` (times and sizes) make a changed file a new one."""
    release = RELEASES[name]
    remedy, limit = release.remedy(source), release.member_limit
    if source.is_dir():
        pickles = {file: read_file(source / file, limit, remedy)
                   for file in release.files if (source / file).is_file()}
    else:
        def wanted(parts: list[str]) -> str:
            return parts[1] if len(parts) == 2 and parts[0] == release.folder and parts[1] in release.files else ""

        pickles = read_archive(source, wanted, release.title, remedy, ARCHIVE_LIMIT, limit)
    missing = [file for file in release.files if file not in pickles]
    if missing:
        raise UserError(f"{source} is not {release.title}: it lacks {', '.join(missing)}; {remedy}")
    return {file: _read_batch(pickles.pop(file), release, count, f"{file} in {source}", remedy)
            for split, count in release.batch_images.items() for file in release.batches[split]}


def _read_batch(data: bytes, release: Release, count: int, name: str, remedy: str) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 ``[count, 32, 32, 3]`` and int64 ``[count]`` from one pickled batch."""
    try:
        batch = read_pickle(data)
        pixels, labels = batch.get("data"), batch.get(release.labels)
        if not isinstance(pixels, np.ndarray) or pixels.shape != (count, 3 * 32 * 32):
            shape = f"shape {pixels.shape}" if isinstance(pixels, np.ndarray) else f"a {type(pixels).__name__}"
            raise ValueError(f"its data are {shape}, not ({count}, 3072)")
        kind = release.labels.replace("_", " ")
        if type(labels) is not list or len(labels) != count:
            raise ValueError(f"its {kind} are no list of {count}")
        if not all(type(label) is int and 0 <= label < len(release.classes) for label in labels):
            raise ValueError(f"its {kind} are not all integers from 0 to {len(release.classes) - 1}")
    except ValueError as error:
        raise UserError(f"{name} is no {release.title} batch: {error}; {remedy}") from None
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, np.array(labels, dtype=np.int64)
