"""Images and labels from a NumPy archive (.npz): part of a data set, in exact pixels, in one small file.

The archive holds ``test_images`` (uint8 ``[N, 32, 32, 3]``) and labels as CIFAR names them: ``test_labels``,
``test_fine_labels`` or ``test_coarse_labels`` (``[N]``, whole numbers); the same with ``train_`` where it has training
images. Nothing in it is executed: no pickles are read, and no array is made that the file does not hold.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from tokenize import TokenError

import numpy as np

from datasets.archives import read_archive
from errors import UserError, printable

LIMIT = 256 << 20  # bytes of one array, and of all that are read; 50,000 images of CIFAR have 154 million
_REMEDY = "expected uint8 images [N, 32, 32, 3] and whole numbers [N] as labels, as numpy.savez writes them"
_SUFFIX = ".npy"
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_BROKEN = (ValueError, KeyError, EOFError, TypeError, OverflowError, MemoryError, RecursionError, SyntaxError,
           TokenError)  # what the parser of a header ends with


def read_arrays(path: Path, split: str, labels: str, classes: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (images uint8 ``[N, side, side, 3]``, labels int64 ``[N]``) of a split ``train`` or ``test``.

    ``labels`` names the kind: ``labels``, ``fine_labels``, ``coarse_labels``. Raises UserError where the file is no
    such archive, lacks one of the two arrays, or they do not fit each other.
    """
    names = (f"{split}_images", f"{split}_{labels}")
    held: list[str] = []

    def wanted(parts: list[str]) -> str:
        name = "/".join(parts).removesuffix(_SUFFIX)
        held.append(name)
        return name if name in names else ""

    contents = read_archive(path, wanted, "NumPy (.npz)", _REMEDY, LIMIT, LIMIT)
    missing = [name for name in names if name not in contents]
    if missing:
        raise UserError(f"{path} holds no {' and no '.join(missing)}, but {printable(', '.join(held) or 'nothing')}; "
                        f"{_REMEDY}")
    images, numbers = (_parse(contents.pop(name), f"{name} in {path}") for name in names)
    if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3) or not len(images):
        raise UserError(f"{names[0]} in {path} is {images.dtype} {list(images.shape)}, expected uint8 "
                        f"[N, {side}, {side}, 3]")
    if numbers.dtype.kind not in "ui" or numbers.shape != images.shape[:1]:
        raise UserError(f"{names[1]} in {path} is {numbers.dtype} {list(numbers.shape)}, expected whole numbers "
                        f"[{len(images)}]")
    if numbers.min() < 0 or numbers.max() >= classes:
        raise UserError(f"{names[1]} in {path} goes from {numbers.min()} to {numbers.max()}, expected 0 to "
                        f"{classes - 1}")
    return np.ascontiguousarray(images), numbers.astype(np.int64)


def _parse(data: bytes, name: str) -> np.ndarray:
    """Return the array of a .npy file in memory; what its header says must be exactly what follows."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        shape, by_columns, dtype = _HEADERS[version](file)
        if dtype.hasobject or dtype.kind not in "uif":
            raise ValueError(f"its values are {dtype}, expected numbers")
        if len(shape) > 8 or any(length < 0 for length in shape):
            raise ValueError(f"its shape is {printable(shape)}")
        if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
            raise ValueError(f"{len(data) - file.tell():,} bytes follow where its shape {printable(shape)} has other")
        values = np.frombuffer(data, dtype, offset=file.tell())
    except _BROKEN as error:
        raise UserError(f"{name} is no array: {printable(error, 200)}; {_REMEDY}") from None
    return values.reshape(shape[::-1]).T if by_columns else values.reshape(shape)
