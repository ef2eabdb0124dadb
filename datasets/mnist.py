"""MNIST from its four original idx files, packed (.gz) or not, in a folder or in an archive.

Source: Y. LeCun, C. Cortes, C. J. C. Burges, The MNIST Database of Handwritten Digits, 1998;
http://yann.lecun.com/exdb/mnist/. Nothing is written to disk but a download.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib

import numpy as np

from datasets import ImageDataset
from datasets.archives import ARCHIVES, CACHES, data_root, download, missing, read_archive, read_file, search_paths
from errors import UserError, printable

CLASSES = tuple("0123456789")
COUNTS = {"train": 60_000, "test": 10_000}
SIDE = 28
FOLDERS = ("", "mnist", "MNIST", "MNIST/raw")  # the last is torchvision's
MEMBER_LIMIT, ARCHIVE_LIMIT = 64 << 20, 256 << 20  # bytes; the largest file has 47 million, all have 55 million
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://dataset.bj.bcebos.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
FILES = {  # size in bytes and sha256 of the original .gz
    "train-images-idx3-ubyte": (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
    "train-labels-idx1-ubyte": (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
    "t10k-images-idx3-ubyte": (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
    "t10k-labels-idx1-ubyte": (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
}


def class_names(root: str = "", name: str = "mnist") -> tuple[str, ...]:
    return CLASSES


def read(split: str, root: str = "", may_download: bool = True, name: str = "mnist") -> ImageDataset:
    """Return the split ``train`` (60,000 images in official order) or ``test`` (10,000), 28×28, grey in 3 channels.

    ``root`` is an archive of the files, or a folder with them or with ``mnist.zip`` (or .tar, .tar.gz),
    also in ``mnist`` or ``MNIST/raw`` in it, or one level down in a folder ``data*`` as on AI Studio. UserError where
    there are no data, or not the right ones.
    """
    count = COUNTS[split]
    (images_at, images), (labels_at, labels) = (_read(name, root, may_download) for name in NAMES[split])
    grey = parse_idx(images, (count, SIDE, SIDE), images_at)
    numbers = parse_idx(labels, (count,), labels_at)
    if numbers.max(initial=0) >= len(CLASSES):
        raise UserError(f"{labels_at} is not MNIST's labels: it holds a {numbers.max()}, expected 0 to "
                        f"{len(CLASSES) - 1}; {_REMEDY}")
    return ImageDataset(np.repeat(grey[..., None], 3, axis=3), numbers.astype(np.int64), CLASSES, "mnist", split)


def parse_idx(data: bytes, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Return the uint8 array of ``shape`` that the bytes of an idx file hold, with or without gzip around it.

    UserError, which begins with ``name``, for another header, or a byte missing or too many. No more is unpacked.
    """
    header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
    length = len(header) + math.prod(shape)
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(length + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{name} is not a whole file: {' '.join(str(error).split())}; {_REMEDY}") from None
    expected = f"expected idx data of {'×'.join(map(str, shape))} bytes; {_REMEDY}"
    if not data.startswith(header):
        found = data[: len(header)].hex() or "nothing"
        raise UserError(f"{name} is not a file of MNIST: it begins with {found}, {expected}")
    if len(data) != length:
        found = "more" if len(data) > length else f"{len(data) - len(header):,}"
        raise UserError(f"{name} is not a file of MNIST: it holds {found} bytes of data, {expected}")
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)


_REMEDY = f"delete it and run again to download it, or put the file of {MIRRORS[0]} in its place"


def _read(name: str, root: str, may_download: bool) -> tuple[str, bytes]:
    """Return the file ``name`` as messages call it, and its bytes; download it into ``root``/mnist if it is missing."""
    spelled = [word + end for word in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    roots = list(search_paths(root, CACHES))
    folders = [path / folder for path in roots for folder in FOLDERS]
    for path in (folder / word for folder in folders for word in spelled):
        if path.is_file():
            return printable(path, 300), read_file(path, MEMBER_LIMIT, _REMEDY)
    archives = (folder / f"{word}{end}" for folder in folders for word in ("mnist", "MNIST") for end in ARCHIVES)
    for path in (*roots, *archives):
        if path.is_file():
            found = read_archive(path, dict.fromkeys(spelled, name), "MNIST", _REMEDY, ARCHIVE_LIMIT, MEMBER_LIMIT)
            if not found:
                raise UserError(f"{printable(path, 300)} is not MNIST: it lacks {name}")
            return f"{name} in {printable(path, 300)}", found[name]
    path = data_root(root) / "mnist" / f"{name}.gz"
    if not may_download:
        raise missing(path.name, root, path)
    size, sha256 = FILES[name]
    download(path, [mirror + path.name for mirror in MIRRORS], sha256, size)
    return printable(path, 300), read_file(path, MEMBER_LIMIT, _REMEDY)
