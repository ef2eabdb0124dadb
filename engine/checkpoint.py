"""Checkpoints: everything that resuming needs in one safetensors file, written atomically.

Tensors are named ``model.*``, ``optimizer.*`` and ``ema.*``. The header holds the training progress as JSON and the
SHA-256 of both. Reading such a file cannot execute code.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import paddle
from paddle import nn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from errors import UserError, printable
from utils.fileio import write_atomically

Arrays = dict[str, np.ndarray]
T = TypeVar("T")
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a file: named arrays by part (``model``, ``optimizer``, ``ema``), and the training progress."""

    path: Path
    parts: Mapping[str, Arrays]
    progress: dict[str, Any]


def save_checkpoint(folder: Path, global_step: int, parts: Mapping[str, Arrays], progress: Mapping[str, Any],
                    keep: int) -> Path:
    """Write a checkpoint atomically, then delete all but the ``keep`` newest; UserError where it cannot be written."""
    arrays = {f"{part}.{name}": np.ascontiguousarray(array)
              for part, named in parts.items() for name, array in named.items()}
    text = json.dumps(progress)
    header = {"format": "checkpoint", "progress": text, "sha256": _digest(arrays, text)}
    path = folder / f"{global_step:09d}{_SUFFIX}"

    def write(temporary: Path) -> None:
        try:
            save_file(arrays, temporary, header)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_atomically(path, write)
    for old in list_checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def check_space(folder: Path, model: nn.Layer, ema: bool) -> None:
    """Raise UserError where the disk has no room for two checkpoints: a new one is complete before an old one goes."""
    size = (3 + ema) * sum(4 * tensor.size for tensor in model.state_dict().values())  # weights, two moments, EMA
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise UserError(f"{printable(folder, 300)}: its disk has {free / 1e6:,.0f} MB free, expected at least "
                        f"{2 * size / 1e6:,.0f} MB for checkpoints: free some, or choose another with -o OUTPUT=...")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, newest first."""
    found = [path for path in folder.glob(f"*{_SUFFIX}") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem), reverse=True)


def load_newest(folder: Path, warn: Callable[[str], object]) -> Checkpoint | None:
    """Load the newest intact checkpoint, None where there is none; ``warn`` gets a sentence for each damaged one."""
    for path in list_checkpoints(folder):
        try:
            return load_checkpoint(path)
        except UserError as error:
            warn(f"{error}; trying the one before it")
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint; UserError where it is truncated, damaged, or another kind of file."""
    if not path.is_file():
        raise UserError(f"{path}: not a whole checkpoint (not a regular file)")
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        progress = json.loads(header["progress"])
        intact = header["format"] == "checkpoint" and header["sha256"] == _digest(arrays, header["progress"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a whole checkpoint ({type(error).__name__}: {printable(error, 200)})") from None
    if not intact or not isinstance(progress, dict):
        raise UserError(f"{path}: damaged: its contents do not match its checksum")
    parts: dict[str, Arrays] = {}
    for name, array in arrays.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = array
    return Checkpoint(path, parts, progress)


def read_progress(saved: Checkpoint, default: T) -> T:
    """Return the progress of a checkpoint as a dataclass like ``default``; UserError where a value does not fit."""
    expected = asdict(default)
    for name, value in saved.progress.items():
        if name not in expected or not _is_like(value, expected[name]):
            raise UserError(f"{saved.path}: not the checkpoint of a run: its progress has {printable(name)} = "
                            f"{printable(value)}")
    return replace(default, **saved.progress)


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, (list, tuple)):
        return isinstance(value, list) and len(value) == len(default) and all(map(_is_like, value, default))
    if isinstance(default, float):
        return type(value) in (int, float) and math.isfinite(value)
    if isinstance(default, int):
        return type(value) is int and 0 <= value < 1 << 53
    return isinstance(value, type(default))


def model_arrays(model: nn.Layer) -> Arrays:
    """Return the state of a network as arrays."""
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def optimizer_arrays(optimizer: paddle.optimizer.Optimizer, model: nn.Layer) -> Arrays:
    """Return the state of an optimizer under the network's names, such as ``head.weight/moment1_0``.

    Paddle's own keys (``linear_7.w_0_moment1_0``) count the layers built in the process.
    """
    names = {parameter.name: name for name, parameter in model.named_parameters()}
    arrays = {}
    for key, value in optimizer.state_dict().items():
        if isinstance(value, paddle.Tensor):
            owner = max((name for name in names if key.startswith(f"{name}_")), key=len)
            arrays[f"{names[owner]}/{key[len(owner) + 1 :]}"] = value.numpy()
    return arrays


def restore_optimizer(optimizer: paddle.optimizer.Optimizer, model: nn.Layer, arrays: Arrays,
                      path: Path | str = "the checkpoint") -> None:
    """Load the arrays of ``optimizer_arrays``; UserError, naming ``path``, where they belong to another network."""
    own = dict(model.named_parameters())
    state = {}
    for key, array in arrays.items():
        name, _, kind = key.rpartition("/")
        if name not in own or (array.size > 1 and array.shape != tuple(own[name].shape)):
            raise UserError(f"{path}: its optimizer state has {printable(key)} {list(array.shape)}, which "
                            "belongs to another network")
        state[f"{own[name].name}_{kind}"] = paddle.to_tensor(array)
    optimizer.set_state_dict(state)


def _digest(arrays: Arrays, progress: str) -> str:
    digest = hashlib.sha256(progress.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()
