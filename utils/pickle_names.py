"""What a pickle of weights may name, and what each name means here: one of our own pure functions, or nothing.

No name is ever imported. Those with a meaning make plain data and descriptions of arrays; those of `STAND_INS`
make an object that swallows whatever is done to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from utils.pickles import Machine

MAX_BYTES = 8 << 30  # of one file, and of one array in it
MAX_RANK = 32

STORAGES = {
    "Half": "f2", "Float": "f4", "Double": "f8", "BFloat16": "bfloat16", "Char": "i1", "Short": "i2", "Int": "i4",
    "Long": "i8", "Byte": "u1", "Bool": "b1", "ComplexFloat": "c8", "ComplexDouble": "c16",
}
STORAGES = {f"torch.{cuda}{name}Storage": kind for name, kind in STORAGES.items() for cuda in ("", "cuda.")}
NUMPY_KINDS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1", "c8", "c16"}

# What stands beside the weights in real checkpoints: arguments, configurations, optimizers, schedules.
STAND_INS = {
    "argparse.Namespace", "collections.Counter", "collections.defaultdict", "easydict.EasyDict",
    "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "torch.Size", "torch.device", "torch.nn.parameter.Parameter", "yacs.config.CfgNode",
}
STAND_INS |= {f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")}
STAND_INS |= {
    f"{module}.{name}"
    for module in ("builtins", "__builtin__")
    for name in ("bool", "bytearray", "complex", "dict", "float", "frozenset", "int", "list", "set", "slice", "str")
}
STAND_INS |= {
    f"torch.{name}"
    for name in ("bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "uint8")
}


@dataclass(frozen=True)
class Name:
    """A global name that is allowed; never the thing itself."""

    dotted: str


class StandIn:
    """What is left of an object that weights do not need: nothing."""


@dataclass(frozen=True)
class Storage:
    """Numbers that a PyTorch file keeps outside its pickle: ``numel`` of ``kind`` under ``key``."""

    key: str
    kind: str
    numel: int


@dataclass(frozen=True)
class Tensor:
    """A PyTorch tensor: a view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class NumpyKind:
    """A numpy dtype by its letter and width."""

    code: str


class Array:
    """A numpy array; complete once its BUILD opcode has come."""

    values: np.ndarray | None = None


class Broken(Exception):
    """The pickle stops making sense."""


def keep_item(target: dict, key: object, value: object) -> None:
    """Set an item if its key's hash is cheap and cannot be forged; drop it otherwise.

    Hashing a deeply nested tuple crashes Python, and large integers can be made to collide; no name of a weight is
    either.
    """
    if type(key) is str or (type(key) is int and abs(key) < 1 << 60):
        target[key] = value


def check_numbers(values: object) -> tuple[int, ...]:
    """Return a tuple of at most `MAX_RANK` counts; raise Broken for anything else."""
    if type(values) not in (tuple, list) or len(values) > MAX_RANK:
        raise Broken("a shape is no tuple of sizes")
    if any(type(value) is not int or not 0 <= value <= MAX_BYTES for value in values):
        raise Broken("a size is no sensible number")
    return tuple(values)


def check_shape(values: object) -> tuple[int, ...]:
    """Return a shape that numpy can be trusted with; raise Broken for anything else."""
    shape = check_numbers(values)
    if prod(size for size in shape if size) > MAX_BYTES:
        raise Broken("an array is larger than any network's")
    return shape


def _ordered_dict(machine: Machine, pairs: object = ()) -> dict:
    made: dict = {}
    machine.spend("listed", len(pairs))
    for key, value in pairs:  # Python 2 wrote a list of pairs
        keep_item(made, key, value)
    return made


def _encode(machine: Machine, text: object, encoding: object) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise Broken("it encodes what is no text, or not as numpy does")
    machine.spend("encoded", len(text))
    return text.encode("latin1")


def _tensor(
    machine: Machine, storage: object, offset: object, shape: object, strides: object, *_rest: object
) -> Tensor:
    (start,), shape, strides = check_numbers((offset,)), check_shape(shape), check_numbers(strides)
    if type(storage) is not Storage or len(shape) != len(strides):
        raise Broken("a tensor has no storage, or more sizes than strides")
    last = start + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if prod(shape) > 0 and (last >= storage.numel or prod(shape) > storage.numel):
        raise Broken("a tensor is larger than its storage")
    return Tensor(storage, start, shape, strides)


def _parameter(machine: Machine, tensor: object, *_rest: object) -> Tensor:
    if type(tensor) is not Tensor:
        raise Broken("a parameter is no tensor")
    return tensor


def _numpy_kind(machine: Machine, code: object, *_rest: object) -> NumpyKind:
    if type(code) is not str or code.lstrip("<|=") not in NUMPY_KINDS:
        machine.refuse(f"numpy.dtype({code!r})" if type(code) is str else "numpy.dtype of something strange")
    return NumpyKind(code.lstrip("<|="))


def fill_array(machine: Machine, target: Array, state: object) -> None:
    """Complete an array from numpy's state: version, shape, dtype, order, bytes."""
    _version, shape, kind, fortran, values = state
    shape = check_shape(shape)
    if type(kind) is not NumpyKind:
        raise Broken("an array has no dtype")
    raw = _encode(machine, values, "latin1") if type(values) is str else values
    dtype = np.dtype("<" + kind.code)
    if type(raw) not in (bytes, memoryview) or prod(shape) * dtype.itemsize != len(raw):
        raise Broken("an array's bytes do not fill its shape")
    machine.spend("array", len(raw))
    target.values = np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran is True else "C")


def _tuple(machine: Machine, values: object = ()) -> tuple:
    if type(values) is not tuple:  # Paddle only ever wraps a tuple; copying lists again and again costs memory
        raise Broken("a tuple is made of something else")
    return values


CALLS: dict[str, Callable] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "numpy.dtype": _numpy_kind,
    "numpy.core.multiarray._reconstruct": lambda machine, *_: Array(),
    "numpy._core.multiarray._reconstruct": lambda machine, *_: Array(),
    "_codecs.encode": _encode,
    "builtins.tuple": _tuple,
    "__builtin__.tuple": _tuple,
}
