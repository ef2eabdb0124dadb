"""Read a file of weights: recognise its format by its first bytes, and find the state dict in it.

Nothing in a file is executed (see `utils/pickles.py`), and nothing is allocated that the file does not hold.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.weights import paddle, pytorch, safetensors
from engine.weights.released import describe_other
from errors import UserError, printable
from utils import pickles
from utils.fileio import reading
from utils.pickles import MAX_BYTES, Array, Tensor

NESTS = ("state_dict", "model", "model_state_dict", "params", "net")
EMA_NESTS = ("state_dict_ema", "model_ema", "params_ema")
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
    there is no other, under the first of `EMA_NESTS`. Raises UserError for anything but a whole file of weights.
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
        if safetensors.is_safetensors(head):
            arrays, layout = safetensors.read(path.read_bytes(), title)
            return _gather(arrays, fetch_plain, path, title, ema, "safetensors", layout)
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
    tree, of_layer = paddle.join_slices(tree, len(data), title)
    return _gather(tree, paddle.fetcher(), path, title, ema, "Paddle", "paddle" if of_layer else None)


def fetch_plain(array: np.ndarray) -> np.ndarray:
    """Return an array as it is."""
    return array


def _layout_by_names(names: dict[str, object]) -> str | None:
    if any(name.endswith((".running_mean", ".running_var")) for name in names):
        return "torch"
    return "paddle" if any(name.endswith(("._mean", "._variance")) for name in names) else None


def _weight_of(value: object) -> Tensor | Array | np.ndarray | None:
    value = paddle.unwrap(value)
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
    return Weights(arrays, layout or _layout_by_names(arrays), ".".join(nests) or None, path, kind, tuple(skipped))
