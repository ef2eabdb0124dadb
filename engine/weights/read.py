"""Reading files of weights: PyTorch's (zip and legacy), safetensors and Paddle's, without PyTorch.

What a file is shows in its first bytes, never in its name. Nothing in it is executed (see `pickles`), and nothing
is allocated that the file does not hold. Sources for the formats: ``paddle/framework/io.py`` and ``io_utils.py`` of
Paddle 2.0 to 3.3, the safetensors specification, and for PyTorch see `torch_files`.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.weights.pytorch import MAGIC, numbers_of, read_legacy, read_zip, widen
from errors import UserError, printable
from utils import pickles
from utils.pickle_names import MAX_BYTES, Array, Broken, Tensor

NESTS = ("state_dict", "model", "model_state_dict", "params", "net")
EMA_NESTS = ("state_dict_ema", "model_ema", "params_ema")
PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")
TEXT_PICKLE = 1 << 16  # bytes in which a name is looked for, of a pickle that nobody writes weights as
PADDLE_NAMES = "StructuredToParameterName@@"
PADDLE_SLICES = "UnpackBigParamInfor@@"
SAFETENSORS_KINDS = {
    "F16": "f2", "BF16": "bfloat16", "F32": "f4", "F64": "f8", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8",
    "U8": "u1", "U16": "u2", "U32": "u4", "U64": "u8", "BOOL": "b1", "C64": "c8",
}
STRANGERS = {
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

    ``arrays``: by name, in the file's order; bfloat16 has become float32 exactly; some may share memory, all are
    read-only. ``layout``: "torch" (fully connected weights ``[out, in]``, ``running_mean``) or "paddle"
    (``[in, out]``, ``_mean``). ``nested_under``: the keys under which the state dict was found, joined by dots.
    ``skipped``: names in the state dict that hold no array.
    """

    arrays: dict[str, np.ndarray]
    layout: str
    nested_under: str | None
    path: Path
    kind: str
    skipped: tuple[str, ...] = ()


def read_weights(path: str | os.PathLike, ema: bool = False) -> Weights:
    """Read a file of weights (``.pdparams`` may be left out of its name).

    The state dict is the top level itself or stands under the first of `NESTS` that holds arrays, also nested;
    with `ema`, or where there is no other, it is the first of `EMA_NESTS`. Prefixes that wrappers leave
    (``module.``, ``_orig_mod.``) are removed. Raises UserError for everything that is not a whole file of weights,
    and for pickles that name anything but weights.
    """
    path = Path(path)
    if not path.exists() and path.with_name(path.name + ".pdparams").exists():
        path = path.with_name(path.name + ".pdparams")
    told = printable(path, 300)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if path.is_dir() else "no ordinary file"
            raise UserError(f"{told} is {kind}, and a file of weights was expected")
        if status.st_size > MAX_BYTES:
            raise UserError(f"{told} has {status.st_size:,} bytes, and at most {MAX_BYTES:,} are read")
        return _read(path, told, ema)
    except OSError as error:
        raise UserError(f"{told} cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise UserError(f"{told} has {status.st_size:,} bytes, and this machine's memory does not suffice") from None


def _read(path: Path, told: str, ema: bool) -> Weights:
    with path.open("rb") as file:
        head = file.read(512)
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            tree, fetch = read_zip(file, told)
            return _gather(tree, fetch, path, told, ema, "PyTorch zip", "torch")
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:  # a length, and no text
            return _read_safetensors(path.read_bytes(), path, told, ema)
        for start, meaning in STRANGERS.items():
            if head.lstrip().startswith(start):
                raise UserError(f"{told} is no file of weights but {meaning}")
        if head[257:262] == b"ustar":
            raise UserError(f"{told} is a tar archive (PyTorch before 0.1.10 wrote weights so), and that is not read")
        if not head.startswith(b"\x80"):
            pickles.refuse_text_pickle(head + file.read(TEXT_PICKLE), told)
            what = "is empty" if not head else f"starts with {head[:8].hex(' ')}"
            raise UserError(f"{told} {what}: neither PyTorch (zip or legacy) nor Paddle nor safetensors wrote it")
    data = memoryview(path.read_bytes())
    tree, end = pickles.load(data, 0, told)
    if tree == MAGIC and type(tree) is int:
        tree, fetch = read_legacy(data, end, told)
        return _gather(tree, fetch, path, told, ema, "PyTorch legacy", "torch")
    pickles.expect_end(data, end, told)
    structured = isinstance(tree, dict) and PADDLE_NAMES in tree
    tree = _join_slices(tree, len(data), told)
    weights = _gather(tree, _paddle_fetcher(), path, told, ema, "Paddle", "paddle")
    if not structured and _layout_by_names(weights.arrays) == "torch":
        return replace(weights, layout="torch")
    return weights


def _layout_by_names(names: dict[str, object]) -> str | None:
    if any(name.endswith((".running_mean", ".running_var")) for name in names):
        return "torch"
    if any(name.endswith(("._mean", "._variance")) for name in names):
        return "paddle"
    return None


# safetensors and Paddle --------------------------------------------------------------------------------------------


def _read_safetensors(data: bytes, path: Path, told: str, ema: bool) -> Weights:
    import safetensors

    try:
        found = dict(safetensors.deserialize(data))  # checks the header, all sizes and places
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{told} is damaged: {printable(error)}") from None
    arrays = {}
    for name, entry in found.items():
        if entry["dtype"] not in SAFETENSORS_KINDS:
            raise UserError(f"{told} holds {printable(name)} as {printable(entry['dtype'])}, and that is not read")
        arrays[name] = numbers_of(entry["data"], SAFETENSORS_KINDS[entry["dtype"]]).reshape(entry["shape"])
        arrays[name].flags.writeable = False
    layout = {"paddle": "paddle", "pt": "torch"}.get(metadata.get("format")) or _layout_by_names(arrays) or "torch"
    return _gather(arrays, lambda array: array, path, told, ema, "safetensors", layout)


def _paddle_fetcher() -> Callable[[Array], np.ndarray]:
    """Return the function that gives an array's numbers; Paddle keeps bfloat16 as the uint16 of the same bits."""
    widened: dict[int, np.ndarray] = {}

    def fetch(array: Array) -> np.ndarray:
        if array.values is None:
            raise Broken("an array has no values")
        if array.values.dtype != np.uint16:
            return array.values
        if id(array) not in widened:
            widened[id(array)] = widen(array.values)
            widened[id(array)].flags.writeable = False
        return widened[id(array)]

    return fetch


def _join_slices(tree: object, limit: int, told: str) -> object:
    """Undo Paddle's cutting of arrays beyond a gigabyte (protocols 2 and 3), and drop its table of names."""
    if not isinstance(tree, dict):
        return tree
    tree.pop(PADDLE_NAMES, None)
    cuts = tree.pop(PADDLE_SLICES, {})
    try:
        for name, cut in cuts.items():
            parts = [_weight_of(tree.pop(part)).values for part in cut["slices"]]
            limit -= sum(part.nbytes for part in parts)
            if limit < 0:
                raise ValueError("the same slice again and again")
            joined = Array()
            joined.values = np.concatenate(parts).reshape(cut["OriginShape"])
            tree[name] = joined
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{told} is damaged: the slices of its large parameters do not fit together") from None
    return tree


# Finding the state dict --------------------------------------------------------------------------------------------


def _weight_of(value: object) -> Tensor | Array | np.ndarray | None:
    if type(value) is tuple and len(value) == 2 and type(value[0]) is str:
        value = value[1]  # Paddle writes a tensor as its name and its array
    return value if isinstance(value, Tensor | Array | np.ndarray) else None


def _find_state(tree: object, keys: tuple[str, ...], depth: int = 3) -> tuple[dict | None, tuple[str, ...]]:
    """Return the first dictionary under `keys` that holds weights, innermost first, and the keys that lead there."""
    if not isinstance(tree, dict):
        return None, ()
    for key in keys if depth else ():
        state, inner = _find_state(tree.get(key), NESTS, depth - 1)
        if state is not None:
            return state, (key, *inner)
    return (tree if _holds_weights(tree) else None), ()


def _holds_weights(tree: dict) -> bool:
    return any(_weight_of(value) is not None for value in tree.values())


def _no_weights(tree: object, told: str, ema: bool) -> UserError:
    keys = [printable(key, 40) for key in tree] if isinstance(tree, dict) else []
    found = f"its keys are {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}" if keys else "it has no keys"
    if ema:
        return UserError(f"{told} holds no averaged (EMA) weights under {', '.join(EMA_NESTS)}: {found}")
    return UserError(f"{told} holds no weights, neither at its top nor under {', '.join(NESTS + EMA_NESTS)}: {found}")


def _gather(tree: object, fetch: Callable, path: Path, told: str, ema: bool, kind: str, layout: str) -> Weights:
    state, nests = _find_state(tree, EMA_NESTS if ema else NESTS)
    if state is None and not ema:
        state, nests = _find_state(tree, EMA_NESTS)
    if state is None or (ema and not nests):
        raise _no_weights(tree, told, ema)
    arrays, skipped = {}, []
    for key, value in state.items():
        name = PREFIXES.sub("", str(key))
        weight = _weight_of(value)
        if name in arrays:
            raise UserError(f"{told} holds {printable(name)} twice, once behind a prefix such as module.")
        if weight is None:
            skipped.append(name)
        else:
            try:
                arrays[name] = fetch(weight)
            except Broken as error:
                raise UserError(f"{told} is damaged: {printable(name)}: {error}") from None
    return Weights(arrays, layout, ".".join(nests) or None, path, kind, tuple(skipped))
