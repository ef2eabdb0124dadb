"""MNIST from its four original idx files, packed (.gz) or not, in a folder or in an archive.

Source: Y. LeCun, C. Cortes, C. J. C. Burges, The MNIST Database of Handwritten Digits, 1998;
http://yann.lecun.com/exdb/mnist/. Nothing is written to disk but a download.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from datasets.dataset import ImageDataset
from datasets.download import download
from datasets.places import places
from errors import UserError

CLASSES = tuple("0123456789")
COUNTS = {"train": 60_000, "test": 10_000}
SIDE = 28
FOLDERS = ("", "mnist", "MNIST", "MNIST/raw")  # the last is torchvision's
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


def read_mnist(split: str, root: str = "", may_download: bool = True) -> ImageDataset:
    """Return the split ``train`` (60,000 images in official order) or ``test`` (10,000), 28×28, grey in 3 channels.

    ``root`` is a folder that holds the files, also in ``mnist`` or ``MNIST/raw`` in it, or one level down in a
    folder ``data*`` as on AI Studio. UserError where there are no data, or not the right ones.
    """
    images_name, labels_name = NAMES[split]
    count = COUNTS[split]
    grey = read_idx(_find(images_name, root, may_download), (count, SIDE, SIDE))
    labels = read_idx(_find(labels_name, root, may_download), (count,))
    if labels.max(initial=0) >= len(CLASSES):
        raise UserError(f"{_find(labels_name, root, may_download)} is no file of MNIST's labels: it holds a "
                        f"{labels.max()}, expected 0 to {len(CLASSES) - 1}")
    return ImageDataset(np.repeat(grey[..., None], 3, axis=3), labels.astype(np.int64), CLASSES, "mnist", split)


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return the uint8 array of ``shape`` that an idx file holds, with or without gzip around it.

    UserError for any other content: the header must be that of ``shape``, and not a byte may be missing or too
    much. Never more than that is read, whatever the file unpacks to.
    """
    header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
    length = len(header) + int(np.prod(shape))
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            content = (gzip.GzipFile(fileobj=raw) if packed else raw).read(length + 1)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole file: {' '.join(str(error).split())}; {_remedy(path)}") from None
    expected = f"expected idx data of {'×'.join(map(str, shape))} bytes"
    if not content.startswith(header):
        raise UserError(f"{path} is no file of MNIST: it begins with {content[: len(header)].hex() or 'nothing'}, "
                        f"{expected}; {_remedy(path)}")
    if len(content) != length:
        found = "more" if len(content) > length else f"{len(content) - len(header):,}"
        raise UserError(f"{path} is no file of MNIST: it holds {found} bytes of data, {expected}; {_remedy(path)}")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def _find(name: str, root: str, may_download: bool) -> Path:
    """Return the file ``name``, downloaded into ``root``/mnist where there is none."""
    for place in places(root):
        for folder in FOLDERS:
            for spelled in (name, f"{name}.gz", name.replace("-idx", ".idx"), f"{name.replace('-idx', '.idx')}.gz"):
                if (place / folder / spelled).is_file():
                    return place / folder / spelled
    path = Path(root or "data").expanduser() / "mnist" / f"{name}.gz"
    if not may_download:
        raise UserError(f"no {name}.gz found under {path.parent.parent}: put it at {path.absolute()}, "
                        "or allow the download with -o DATA.DOWNLOAD=true")
    size, sha256 = FILES[name]
    download(path, [mirror + path.name for mirror in MIRRORS], sha256, size)
    return path


def _remedy(path: Path) -> str:
    return f"delete it and run again to download it, or put {path.name} of {MIRRORS[0]} in its place"
