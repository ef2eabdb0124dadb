"""Read a file of weights: recognise its format by its first bytes, and find the state dict in it.

Nothing in a file is executed (see `utils/pickles.py`), and nothing is allocated that the file does not hold.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.weights import pytorch
from engine.weights.released import CHECKPOINT, describe_other
from errors import UserError, printable
from utils import pickles
from utils.fileio import reading
from utils.pickles import MAX_BYTES, Array, Tensor

NESTS = ("state_dict", "model", "model_state_dict", "params", "net")
EMA_NESTS = ("state_dict_ema", "model_ema", "params_ema", "ema")
PADDLE_NAMES = "StructuredToParameterName@@"
PADDLE_SLICES = "UnpackBigParamInfor@@"
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


@dataclass(frozen=True)
class Weights:
    """What a file of weights holds.

    Attributes:
        arrays: by name, in the file's order, read-only; bfloat16 has become float32 exactly; some may share memory.
        layout: "torch" (fully connected weights ``[out, in]``, ``running_mean``), "paddle" (``[in, out]``, ``_mean``),
            or None where the file does not tell.
        nested_under: the keys under which the state dict was found, joined by dots.
        kind: the file's format.
        skipped: names in the state dict that hold no array.
        prefix: what was removed from the front of each name.
    """

    arrays: dict[str, np.ndarray]
    layout: str | None
    nested_under: str | None
    path: Path
    kind: str
    skipped: tuple[str, ...] = ()
    prefix: str = ""


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
            tree, fetch = pytorch.read_zip(file, title)
            return _gather(tree, fetch, path, title, ema, "PyTorch zip", "torch")
        if is_safetensors(head):
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
    if tree == pytorch.MAGIC and type(tree) is int:
        tree, fetch = pytorch.read_legacy(data, end, title)
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
            widened[id(array)] = pytorch.widen(array.values)
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


def is_safetensors(head: bytes) -> bool:
    """Return whether a file's first bytes are a header's length and its opening brace."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40


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
        arrays[name] = pytorch.numbers_of(entry["data"], SAFETENSORS_KINDS[entry["dtype"]]).reshape(entry["shape"])
    return arrays, SAFETENSORS_LAYOUTS.get(metadata.get("format"))
