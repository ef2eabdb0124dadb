"""Read PyTorch's two file formats without PyTorch: zip (since 1.6) and legacy.

Source: ``torch/serialization.py`` of PyTorch 0.4 to 2.13. Both readers return the saved tree, with a `Tensor` for each
tensor, and a function that gives a tensor's read-only array. A storage is read with its first array, so an optimizer's
state costs nothing.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from errors import UserError, printable
from utils import pickles
from utils.pickles import Storage, Tensor

MAGIC = 0x1950A86A20F9469CFC6C

Fetch = Callable[[Tensor], np.ndarray]


def widen(bits: np.ndarray) -> np.ndarray:
    """Return read-only float32 of the same values as bfloat16, given as uint16."""
    return _read_only((bits.astype(np.uint32) << 16).view(np.float32))


def numbers_of(raw: bytes | memoryview, kind: str) -> np.ndarray:
    """Return the numbers of ``kind`` in ``raw``, bfloat16 as float32, read-only."""
    return widen(np.frombuffer(raw, "<u2")) if kind == "bfloat16" else _read_only(np.frombuffer(raw, "<" + kind))


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _bytes_of(storage: Storage) -> int:
    return storage.numel * (2 if storage.kind == "bfloat16" else np.dtype(storage.kind).itemsize)


def _fetcher(read: Callable[[Storage], bytes | memoryview]) -> Fetch:
    storages: dict[Storage, np.ndarray] = {}

    def fetch(tensor: Tensor) -> np.ndarray:
        numbers = storages.get(tensor.storage)
        if numbers is None:
            numbers = storages[tensor.storage] = numbers_of(read(tensor.storage), tensor.storage.kind)
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, numbers.dtype)
        step = numbers.itemsize
        strides = tuple(stride * step for stride in tensor.strides)
        return np.ndarray(tensor.shape, numbers.dtype, numbers, tensor.offset * step, strides)

    return fetch


def read_zip(file: BinaryIO, title: str) -> tuple[object, Fetch]:
    """Read ``<name>/data.pkl`` and a stored entry ``<name>/data/<key>`` per storage; CRC-32 of each is checked."""
    try:
        archive = zipfile.ZipFile(file)
        entries = archive.infolist()
        size = file.seek(0, os.SEEK_END)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OverflowError) as error:
        raise UserError(f"{title} is damaged: its zip directory cannot be read ({printable(error)})") from None
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
        raise UserError(f"{title} is a compressed zip archive, which torch.save never writes; unpack it or save again")
    if sum(entry.file_size for entry in entries) > size:
        raise UserError(f"{title} is damaged: its entries claim more bytes than the file has")

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except KeyError:
            raise UserError(f"{title} is damaged: it has no entry {printable(name)}") from None
        except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError, struct.error) as error:
            raise UserError(f"{title} is damaged, or was written with PyTorch's checksums switched off: "
                            f"{printable(error)}") from None

    names = {entry.filename for entry in entries}
    found = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise UserError(f"{title} is a zip archive, but not one of torch.save: it has {len(found)} data.pkl")
    folder = found[0].removesuffix("data.pkl")
    if folder + "constants.pkl" in names:
        raise UserError(f"{title} is a TorchScript program; save the state_dict of the model instead")
    if folder + "byteorder" in names and read(folder + "byteorder") != b"little":
        raise UserError(f"{title} was written in big-endian byte order, which is not read")
    data = memoryview(read(found[0]))
    tree, end = pickles.load(data, 0, title, {})
    pickles.expect_end(data, end, title)

    def read_storage(storage: Storage) -> bytes:
        raw = read(f"{folder}data/{storage.key}")
        if len(raw) != _bytes_of(storage):
            raise UserError(f"{title} is damaged: its storage {printable(storage.key)} has {len(raw)} bytes where "
                            f"{storage.numel} numbers were promised")
        return raw

    return tree, _fetcher(read_storage)


def read_legacy(data: memoryview, at: int, title: str) -> tuple[object, Fetch]:
    """Read what follows the magic number: version, system, objects, keys; then each storage after its length."""
    version, at = pickles.load(data, at, title)
    system, at = pickles.load(data, at, title)
    if version != 1001 or not isinstance(system, dict):
        raise UserError(f"{title} is damaged, or of an unknown version of PyTorch's legacy format")
    if system.get("little_endian") is not True:
        raise UserError(f"{title} was written in big-endian byte order, which is not read")
    known: dict[str, Storage] = {}
    tree, at = pickles.load(data, at, title, known)
    keys, at = pickles.load(data, at, title)
    parts: dict[Storage, memoryview] = {}
    for key in keys if isinstance(keys, list) else ():
        storage = known.get(key) if isinstance(key, str) else None
        if storage is None or storage in parts:
            raise UserError(f"{title} is damaged: it has a storage that no tensor uses, or one twice")
        size = _bytes_of(storage)
        if bytes(data[at : at + 8]) != storage.numel.to_bytes(8, "little") or at + 8 + size > len(data):
            raise UserError(f"{title} is damaged: its storage {printable(key)} is not as long as promised")
        parts[storage] = data[at + 8 : at + 8 + size]
        at += 8 + size
    if len(parts) != len(known):
        raise UserError(f"{title} is damaged: storages are missing")
    pickles.expect_end(data, at, title)
    return tree, _fetcher(parts.__getitem__)
