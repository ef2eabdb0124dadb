"""CIFAR-10 from the official Python archive, packed or unpacked.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009;
https://www.cs.toronto.edu/~kriz/cifar.html. Nothing of an archive is executed, nothing is written to disk.
"""

from __future__ import annotations

import functools
import glob
import gzip
import os
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from datasets.dataset import ImageDataset
from datasets.download import download
from datasets.pickles import read_pickle
from errors import UserError

ARCHIVE, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
SIZE = 170_498_071
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
MIRRORS = (
    f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",
    f"https://dataset.bj.bcebos.com/cifar/{ARCHIVE}",
)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
BATCH_IMAGES = 10_000
_WANTED = tuple(name for names in BATCHES.values() for name in names)
_BROKEN = (tarfile.TarError, zlib.error, OSError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError)

MEMBER_LIMIT = 64 << 20  # bytes; an official batch has 31 million
ARCHIVE_LIMIT = 512 << 20  # bytes when unpacked; the official archive has 186 million


def read_cifar10(split: str, root: str = "", may_download: bool = True) -> ImageDataset:
    """Return the split ``train`` (50,000 images in official order) or ``test`` (10,000), 32×32.

    ``root`` is what ``find_cifar10`` takes. UserError where there are no data, or not the right ones.
    """
    source = find_cifar10(root)
    if source is None:
        folder = Path(root or "data").expanduser()
        source = folder / ARCHIVE
        if not may_download:
            raise UserError(f"no {ARCHIVE} or {FOLDER} found under {folder}: put it at {source.absolute()}, "
                            "or allow the download with -o DATA.DOWNLOAD=true")
        download(source, MIRRORS, SHA256, SIZE)
    files = [path for path in (source, *(source / name for name in _WANTED)) if path.exists()]
    batches = _read_batches(source, tuple((path.stat().st_mtime_ns, path.stat().st_size) for path in files))
    images, labels = zip(*(batches[name] for name in BATCHES[split]), strict=True)
    return ImageDataset(np.concatenate(images), np.concatenate(labels), CLASSES, "cifar10", split)


def find_cifar10(root: str = "") -> Path | None:
    """Return the archive or the unpacked folder, or None where there is neither.

    ``root`` is the archive itself, the unpacked folder, or a folder that holds one of them, also one level
    down in a folder ``data*`` as on AI Studio, where ``~/data`` is searched after ``data`` itself.
    """
    root = os.path.expanduser(root)
    if root.endswith((".gz", ".tgz", ".tar")) and not Path(root).exists():
        raise UserError(f"DATA.ROOT names {root}, but there is no such file")
    if root and Path(root).is_file():
        return Path(root)
    for folder in ["data", os.path.expanduser("~/data")] if root in ("", "data") else [root]:
        if any((Path(folder) / name).is_file() for name in _WANTED):
            return Path(folder)
        for place in [folder, *sorted(glob.glob(f"{glob.escape(folder)}/data*/"))]:
            for name in (ARCHIVE, FOLDER):
                if (Path(place) / name).exists():
                    return Path(place) / name
    return None


@functools.lru_cache(maxsize=1)
def _read_batches(source: Path, stamps: tuple[tuple[int, int], ...]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return ``(images, labels)`` of every batch; ``stamps`` (times and sizes) make a changed file a new one."""
    pickles = _read_folder(source) if source.is_dir() else _read_archive(source)
    missing = [name for name in _WANTED if name not in pickles]
    if missing:
        raise UserError(f"{source} is not CIFAR-10: it lacks {', '.join(missing)}; {_remedy(source)}")
    return {name: _read_batch(pickles.pop(name), f"{name} in {source}", _remedy(source)) for name in _WANTED}


def _read_batch(data: bytes, name: str, remedy: str) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 ``[10000, 32, 32, 3]`` and int64 ``[10000]`` from one pickled batch."""
    try:
        batch = read_pickle(data)
        pixels, labels = batch.get("data"), batch.get("labels")
        if not isinstance(pixels, np.ndarray) or pixels.shape != (BATCH_IMAGES, 3 * 32 * 32):
            shape = f"shape {pixels.shape}" if isinstance(pixels, np.ndarray) else f"a {type(pixels).__name__}"
            raise ValueError(f"its data are {shape}, not ({BATCH_IMAGES}, 3072)")
        if type(labels) is not list or len(labels) != BATCH_IMAGES:
            raise ValueError(f"its labels are no list of {BATCH_IMAGES}")
        if not all(type(label) is int and 0 <= label < len(CLASSES) for label in labels):
            raise ValueError(f"its labels are not all integers from 0 to {len(CLASSES) - 1}")
    except ValueError as error:
        raise UserError(f"{name} is no CIFAR-10 batch: {error}; {remedy}") from None
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, np.array(labels, dtype=np.int64)


def _read_folder(folder: Path) -> dict[str, bytes]:
    contents = {}
    for path in (folder / name for name in _WANTED):
        if path.is_file():
            try:
                with open(path, "rb") as file:
                    contents[path.name] = file.read(MEMBER_LIMIT + 1)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
            if len(contents[path.name]) > MEMBER_LIMIT:
                raise UserError(f"{path} has more than {MEMBER_LIMIT >> 20} MiB; {_remedy(folder)}")
    return contents


def _read_archive(path: Path) -> dict[str, bytes]:
    """Return the wanted members of a tar.gz or tar file, read in one pass from front to end."""
    contents: dict[str, bytes] = {}
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = _Bounded(gzip.GzipFile(fileobj=raw) if packed else raw, ARCHIVE_LIMIT)
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    name = _member_name(member)
                    if name in contents:
                        raise ValueError(f"it holds {name} twice")
                    if name in _WANTED:
                        if member.size > MEMBER_LIMIT:
                            raise ValueError(f"{name} has more than {MEMBER_LIMIT >> 20} MiB")
                        contents[name] = archive.extractfile(member).read()
            while stream.read(1 << 20):  # up to the checksum behind the last byte
                pass
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except _BROKEN as error:
        what = " ".join(str(error).split())
        raise UserError(f"{path} is not a whole CIFAR-10 archive: {what}; {_remedy(path)}") from None
    return contents


def _member_name(member: tarfile.TarInfo) -> str:
    """Return the name inside the archive's folder, or nothing; refuse what no data archive has."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if member.name.startswith("/") or ".." in parts:
        raise ValueError(f"it holds the path {member.name[:80]!r}")
    if not (member.isdir() or member.isreg()) or member.issparse():
        raise ValueError(f"{member.name[:80]!r} in it is a link or a device")
    return parts[1] if member.isreg() and len(parts) == 2 and parts[0] == FOLDER else ""


class _Bounded:
    """A stream that gives so many bytes and no more: a small file must not unfold without end."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self.stream, self.limit, self.room = stream, limit, limit

    def read(self, count: int) -> bytes:
        data = self.stream.read(count)
        self.room -= len(data)
        if self.room < 0:
            raise ValueError(f"it unpacks to more than {self.limit >> 20} MiB")
        return data


def _remedy(source: Path) -> str:
    what = f"the folder {FOLDER}" if source.is_dir() else ARCHIVE
    return f"delete it and run again to download it, or put {what} of {MIRRORS[0]} in its place"
