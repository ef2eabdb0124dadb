"""Read a file of weights: recognise its format by its first bytes, and find the state dict in it.

Nothing in a file is executed (see `utils/pickles.py`), and nothing is allocated that the file does not hold.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from engine.released import CHECKPOINT, describe_other
from errors import UserError, printable
from utils import pickles
from utils.fileio import reading
from utils.pickles import MAX_BYTES, Array, Storage, Tensor

NESTS = ("state_dict", "model", "model_state_dict", "params", "net")
EMA_NESTS = ("state_dict_ema", "model_ema", "params_ema", "ema")
PADDLE_NAMES = "StructuredToParameterName@@"
PADDLE_SLICES = "UnpackBigParamInfor@@"
TORCH_LEGACY = 0x1950A86A20F9469CFC6C  # magic number
SAFETENSORS_KINDS = {
    "F16": "f2", "BF16": "bfloat16", "F32": "f4", "F64": "f8", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8",
    "U8": "u1", "U16": "u2", "U32": "u4", "U64": "u8", "BOOL": "b1", "C64": "c8",
}
SAFETENSORS_LAYOUTS = {"paddle": "paddle", "pd": "paddle", "pt": "torch"}
TEXT_PICKLE = 1 << 16  # bytes of a text pickle in which a name is looked for
OTHERS = {
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"\x93NUMPY": "a single numpy array",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch it with git lfs pull",
    b"<": "a web page, so the download went wrong",
}

Fetch = Callable[[Tensor], np.ndarray]


@dataclass(frozen=True)
class Weights:
    """What a file of weights holds.

    ``layout`` is "torch" (fully connected weights ``[out, in]``, ``running_mean``), "paddle" (``[in, out]``,
    ``_mean``), or None where the file does not tell.
    """

    arrays: dict[str, np.ndarray]  # in the file's order, read-only; bfloat16 as float32; some may share memory
    layout: str | None
    nested_under: str | None  # keys under which the state dict was found, joined by dots
    path: Path
    kind: str  # the file's format
    skipped: tuple[str, ...] = ()  # names in the state dict that hold no array
    prefix: str = ""  # removed from the front of each name


def read_weights(path: str | os.PathLike, ema: bool = False) -> Weights:
    """Read a file of weights (``.pdparams`` may be left out of its name).

    The state dict is the top level or under the first of `NESTS` that holds arrays, also nested; with ``ema``, or where
    there is no other, under the first of `EMA_NESTS`, else under the only other key that holds arrays. Raises UserError
    for anything but a whole file of weights.
    """
    path = Path(os.path.expanduser(path))
    if not path.exists() and path.with_name(path.name + ".pdparams").exists():
        path = path.with_name(path.name + ".pdparams")
    title = printable(path, 300)
    if other := describe_other(path):
        raise UserError(f"{title} is {other}")
    with reading(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if path.is_dir() else "not an ordinary file"
            raise UserError(f"{title} is {kind}, expected a file of weights")
        if status.st_size > MAX_BYTES:
            raise UserError(f"{title} has {status.st_size:,} bytes, expected at most {MAX_BYTES:,}")
        try:
            return _read(path, title, ema)
        except MemoryError:
            raise UserError(f"{title} has {status.st_size:,} bytes, more than the free memory") from None


def _read(path: Path, title: str, ema: bool) -> Weights:
    with path.open("rb") as file:
        head = file.read(512)
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            tree, fetch = read_zip(file, title)
            return _gather(tree, fetch, path, title, ema, "PyTorch zip", "torch")
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:  # a header's length and its beginning
            arrays, layout = read_safetensors(path.read_bytes(), title)
            return _gather(arrays, lambda array: array, path, title, ema, "safetensors", layout)
        for start, meaning in OTHERS.items():
            if head.lstrip().startswith(start):
                raise UserError(f"{title} is not a file of weights but {meaning}")
        if head[257:262] == b"ustar":
            raise UserError(f"{title} is a tar archive (as of PyTorch before 0.1.10), which is not read")
        if not head.startswith(b"\x80"):
            pickles.refuse_text_pickle(head + file.read(TEXT_PICKLE), title)
            what = "is empty" if not head else f"starts with {head[:8].hex(' ')}"
            raise UserError(f"{title} {what}: not a file of PyTorch (zip or legacy), Paddle or safetensors")
    data = memoryview(path.read_bytes())
    tree, end = pickles.load(data, 0, title)
    if tree == TORCH_LEGACY and type(tree) is int:
        tree, fetch = read_legacy(data, end, title)
        return _gather(tree, fetch, path, title, ema, "PyTorch legacy", "torch")
    pickles.expect_end(data, end, title)
    tree, of_layer = join_slices(tree, len(data), title)
    return _gather(tree, paddle_fetcher(), path, title, ema, "Paddle", "paddle" if of_layer else None)


def _layout_by_names(names: dict[str, object]) -> str | None:
    if any(name.endswith((".running_mean", ".running_var")) for name in names):
        return "torch"
    return "paddle" if any(name.endswith(("._mean", "._variance")) for name in names) else None


def _weight_of(value: object) -> Tensor | Array | np.ndarray | None:
    value = unwrap(value)
    if isinstance(value, Array) and value.values is None:
        return None
    return value if isinstance(value, Tensor | Array | np.ndarray) else None


def _find_state(tree: object, keys: tuple[str, ...], depth: int = 3) -> tuple[dict | None, tuple[str, ...]]:
    """Return the first dictionary under ``keys`` that holds weights, innermost first, and the keys that lead there."""
    if not isinstance(tree, dict):
        return None, ()
    for key in keys if depth else ():
        state, inner = _find_state(tree.get(key), NESTS, depth - 1)
        if state is not None:
            return state, (key, *inner)
    return (tree if any(_weight_of(value) is not None for value in tree.values()) else None), ()


def _no_weights(tree: object, title: str, ema: bool) -> UserError:
    keys = [printable(key, 40) for key in tree] if isinstance(tree, dict) else []
    found = f"its keys are {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}" if keys else "it has no keys"
    if ema:
        return UserError(f"{title} holds no averaged (EMA) weights under {', '.join(EMA_NESTS)}: {found}")
    return UserError(f"{title} holds no weights, neither at its top nor under {', '.join(NESTS + EMA_NESTS)}: {found}")


def _gather(tree: object, fetch: Callable, path: Path, title: str, ema: bool, kind: str, layout: str | None) -> Weights:
    state, nests = _find_state(tree, EMA_NESTS if ema else NESTS)
    if state is None and not ema:
        state, nests = _find_state(tree, EMA_NESTS)
    if state is None and not ema and isinstance(tree, dict):
        others = [key for key, value in tree.items() if "optim" not in str(key) and _find_state(value, NESTS)[0]]
        state, nests = _find_state(tree, tuple(others)) if len(others) == 1 else (None, ())
    if state is None or (ema and not nests):
        raise _no_weights(tree, title, ema)
    arrays, skipped = {}, []
    for key, value in state.items():
        name, weight = str(key), _weight_of(value)
        if name in arrays:
            raise UserError(f"{title} holds {printable(name)} twice, as a text and as a number")
        if weight is None:
            skipped.append(name)
        elif isinstance(weight, Array) and kind != "Paddle":  # a numpy array in a file of PyTorch
            arrays[name] = weight.values
        else:
            arrays[name] = fetch(weight)
    under = ".".join(map(str, nests)) or None
    return Weights(arrays, layout or _layout_by_names(arrays), under, path, kind, tuple(skipped))


def widen(bits: np.ndarray) -> np.ndarray:
    """Return read-only float32 of the same values as bfloat16, given as uint16."""
    return _read_only((bits.astype(np.uint32) << 16).view(np.float32))


def numbers_of(raw: bytes | memoryview, kind: str) -> np.ndarray:
    """Return the numbers of ``kind`` in ``raw``, bfloat16 as float32, read-only."""
    return widen(np.frombuffer(raw, "<u2")) if kind == "bfloat16" else _read_only(np.frombuffer(raw, "<" + kind))


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


# PyTorch's two formats, zip (since 1.6) and legacy. Source: torch/serialization.py of 0.4 to 2.13 ---------------------


def _bytes_of(storage: Storage) -> int:
    return storage.numel * (2 if storage.kind == "bfloat16" else np.dtype(storage.kind).itemsize)


def _fetcher(read: Callable[[Storage], bytes | memoryview]) -> Fetch:
    """Return what gives a tensor's read-only array; its storage is read first then, so an optimizer's costs nothing."""
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


# Paddle's .pdparams, pickles of numpy arrays. Source: paddle/framework/io.py, io_utils.py of 2.0 to 3.3 --------------


def unwrap(value: object) -> object:
    """Return the array of a tensor, which Paddle may write as a pair of its name and its array."""
    return value[1] if type(value) is tuple and len(value) == 2 and type(value[0]) is str else value


def paddle_fetcher() -> Callable[[Array], np.ndarray]:
    """Return the function that gives an array's numbers: Paddle writes bfloat16 as the uint16 of the same bits."""
    widened: dict[int, np.ndarray] = {}

    def fetch(array: Array) -> np.ndarray:
        if array.values.dtype != np.uint16:
            return array.values
        if id(array) not in widened:
            widened[id(array)] = widen(array.values)
        return widened[id(array)]

    return fetch


def join_slices(tree: object, limit: int, title: str) -> tuple[object, bool]:
    """Join arrays beyond a gigabyte, which protocols 2 and 3 cut; return the tree and whether a layer's state it is.

    ``limit``: bytes that the joined arrays may have, which are those of the file.
    """
    if not isinstance(tree, dict):
        return tree, False
    of_layer = tree.pop(PADDLE_NAMES, None) is not None
    cuts = tree.pop(PADDLE_SLICES, {})
    try:
        for name, cut in cuts.items():
            parts = [unwrap(tree.pop(part)).values for part in cut["slices"]]
            limit -= sum(part.nbytes for part in parts)
            if limit < 0:
                raise ValueError("the same slice again and again")
            tree[name] = Array(np.concatenate(parts).reshape(cut["OriginShape"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{title} is damaged: the slices of its large parameters do not fit together") from None
    return tree, of_layer


# safetensors, in which the layout of fully connected weights is often not recorded ------------------------------------


def read_safetensors(data: bytes, title: str) -> tuple[dict[str, np.ndarray], str | None]:
    """Return the read-only arrays and the layout that the metadata name ("torch", "paddle" or None)."""
    import safetensors

    try:
        found = dict(safetensors.deserialize(data))  # checks the header and all sizes and offsets
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{title} is damaged: {printable(error)}") from None
    if metadata.get("format") == "checkpoint":
        raise UserError(f"{title} is {CHECKPOINT}")
    arrays = {}
    for name, entry in found.items():
        if entry["dtype"] not in SAFETENSORS_KINDS:
            raise UserError(f"{title} holds {printable(name)} as {printable(entry['dtype'])}, which is not read")
        arrays[name] = numbers_of(entry["data"], SAFETENSORS_KINDS[entry["dtype"]]).reshape(entry["shape"])
    return arrays, SAFETENSORS_LAYOUTS.get(metadata.get("format"))
