"""Read pickles from strangers: plain data and descriptions of arrays come out, nothing is imported or called.

Python's own unpickler runs what a file names, and a few bytes make it reserve gigabytes (a memo index, a declared
length) or overflow the stack (hashing a deeply nested tuple). This machine knows the opcodes that ``torch.save``,
``paddle.save`` and the CIFAR archives need (protocols 2 to 5). A name that is not in the tables below is refused.
PyTorch's ``weights_only`` loader works the same way.
"""

from __future__ import annotations

import pickletools
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from errors import UserError, printable

MAX_BYTES = 8 << 30  # of one file, and of one array in it
MAX_OPCODES = 3_000_000  # a state dict with its optimizer needs some fifty per tensor
MAX_NAME = 512
MAX_RANK = 32

STORAGES = {
    "Half": "f2", "Float": "f4", "Double": "f8", "BFloat16": "bfloat16", "Char": "i1", "Short": "i2", "Int": "i4",
    "Long": "i8", "Byte": "u1", "Bool": "b1", "ComplexFloat": "c8", "ComplexDouble": "c16",
}
STORAGES = {f"torch.{cuda}{name}Storage": kind for name, kind in STORAGES.items() for cuda in ("", "cuda.")}
NUMPY_KINDS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1", "c8", "c16"}

# Classes found beside the weights in real checkpoints: arguments, configurations, optimizers, schedules. Their
# instances become a `StandIn`.
_BUILTINS = "bool bytearray complex dict float frozenset int list set slice str"
_BY_MODULE = {
    "argparse": "Namespace", "builtins": _BUILTINS, "__builtin__": _BUILTINS, "collections": "Counter defaultdict",
    "easydict": "EasyDict", "numpy": "ndarray", "numpy.core.multiarray": "scalar", "numpy._core.multiarray": "scalar",
    "pathlib": "Path PosixPath WindowsPath PurePosixPath PureWindowsPath",
    "torch": "Size device bfloat16 bool float16 float32 float64 int16 int32 int64 int8 uint8",
    "torch.nn.parameter": "Parameter", "torch.torch_version": "TorchVersion", "yacs.config": "CfgNode",
    "pytorch_lightning.utilities.parsing": "AttributeDict", "lightning_fabric.utilities.data": "AttributeDict",
    "lightning.fabric.utilities.data": "AttributeDict",
}
STAND_INS = {f"{module}.{name}" for module, names in _BY_MODULE.items() for name in names.split()}


class Broken(Exception):
    """The pickle stops making sense."""


class Name(str):
    """An allowed global name with its dots; never the object itself."""


class StandIn:
    """An object that is not needed: it accepts items and states and keeps nothing."""


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
class Array:
    """A numpy array; ``values`` are None until its BUILD opcode."""

    values: np.ndarray | None = None


def load(data: memoryview, start: int, title: str, storages: dict[str, Storage] | None = None) -> tuple[object, int]:
    """Read one pickle of ``data`` from byte ``start``; return its object and the position after it.

    Arrays become `Tensor` or `Array`, bytes become views of ``data``, other objects `StandIn`. Dictionary entries whose
    key is neither a text nor an ordinary integer are dropped. References to PyTorch's storages are allowed where
    ``storages`` is given, and collected there. Raises UserError, which begins with ``title``, for a name or opcode that
    is not allowed and for damage.
    """
    machine = Machine(data, start, title, storages)
    try:
        return machine.run(), machine.at
    except (Broken, IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
        reason = str(error) if isinstance(error, Broken) else "it stops making sense"
        raise UserError(f"{title} is damaged or of another kind: {reason} (byte {machine.at} of the pickle's "
                        f"{len(data)})") from None


def expect_end(data: memoryview, end: int, title: str) -> None:
    """Raise UserError if ``data`` continues after its last object."""
    if end != len(data):
        raise UserError(f"{title} is damaged: {len(data) - end} bytes follow its last object")


def refuse_text_pickle(data: bytes, title: str) -> None:
    """Raise UserError with the first name in ``data`` if it is a pickle of protocol 0 or 1, which is not read."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("GLOBAL", "INST") and re.fullmatch(r"[\w.]+ [\w.]+", argument):
                raise UserError(f"{title} is refused and nothing of it was run: it is a pickle of protocol 0 or 1 and "
                                f"names {printable(argument.replace(' ', '.'))}")
    except (ValueError, IndexError, OverflowError, struct.error):  # not a pickle
        return


class Machine:
    """One run over one pickle: a stack, its marks, a memo, and the bytes that arrays may still claim."""

    def __init__(self, data: memoryview, start: int, title: str, storages: dict[str, Storage] | None) -> None:
        self.data, self.at, self.title, self.storages = data, start, title, storages
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        self.bytes_left = dict.fromkeys(("array", "encoded", "listed"), len(data))

    def run(self) -> object:
        for _ in range(MAX_OPCODES):
            code = self.data[self.at]
            self.at += 1
            opcode = pickletools.code2op.get(chr(code))
            if opcode is None:
                raise Broken(f"there is no opcode {code}")
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name not in _MAKES and opcode.name not in _DOES:
                self.refuse_opcode(opcode.name)
            argument = opcode.arg.reader(self) if opcode.arg and opcode.name not in _READ_BY_US else None
            if opcode.name in _MAKES:
                self.stack.append(_MAKES[opcode.name](self, argument))
            else:
                _DOES[opcode.name](self, argument)
        raise Broken(f"it has more than {MAX_OPCODES:,} opcodes")

    # Arguments of opcodes ----------------------------------------------------------------------------------------

    def read(self, count: int) -> memoryview:
        """Return the next bytes; called by the readers of ``pickletools``."""
        if not 0 <= count <= len(self.data) - self.at:
            raise Broken(f"it promises {count} bytes where {len(self.data) - self.at} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def sized(self, width: int) -> memoryview:
        return self.read(int.from_bytes(self.read(width), "little"))

    def line(self) -> str:
        end = bytes(self.data[self.at : self.at + MAX_NAME]).find(b"\n")
        if end < 0:
            raise Broken("a name does not end")
        return str(self.read(end + 1)[:-1], "utf-8")

    # The stack ---------------------------------------------------------------------------------------------------

    def pop_many(self, count: int) -> tuple:
        if len(self.stack) < count:
            raise Broken("it takes more than it has")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def pop_to_mark(self) -> list:
        height = self.marks.pop()
        values = self.stack[height:]
        del self.stack[height:]
        return values

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def spend(self, what: str, count: int) -> None:
        """Count what is made of the file's bytes: repeating the same ones costs a file nothing, and us memory."""
        self.bytes_left[what] -= count
        if self.bytes_left[what] < 0:
            raise Broken(f"its {what} values are more than the file holds")

    # Containers --------------------------------------------------------------------------------------------------

    def extend(self, values: Sequence) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(values)
        elif type(target) is not StandIn:
            raise Broken("it appends to something other than a list")

    def set_items(self, values: Sequence) -> None:
        target = self.stack[-1]
        if type(target) is dict:
            for key, value in zip(values[::2], values[1::2], strict=True):
                _set_item(target, key, value)
        elif type(target) is not StandIn:
            raise Broken("it sets items of something other than a dictionary")

    # Names and calls ---------------------------------------------------------------------------------------------

    def refuse(self, dotted: str) -> None:
        raise UserError(f"{self.title} is refused and nothing of it was run: its pickle names {printable(dotted)}, "
                        "which is not allowed (of a whole model, save only the state_dict)")

    def refuse_opcode(self, name: str) -> None:
        if name == "INST":
            self.refuse(f"{self.line()}.{self.line()}")
        raise UserError(f"{self.title} is refused and nothing of it was run: its pickle uses the opcode {name}, "
                        "which neither torch.save nor paddle.save writes")

    def name(self, module: object, name: object) -> Name:
        if type(module) is not str or type(name) is not str:
            raise Broken("a name is not a text")
        dotted = f"{module}.{name}"
        if dotted not in CALLS and dotted not in STORAGES and dotted not in STAND_INS:
            self.refuse(dotted)
        return Name(dotted)

    def call(self) -> object:
        name, arguments = self.pop_many(2)
        if type(name) is not Name or type(arguments) is not tuple:
            raise Broken("it calls something other than a name")
        function = CALLS.get(name)
        return function(self, *arguments) if function else StandIn()

    def new_object(self, parts: int) -> dict | StandIn:
        values = self.pop_many(parts)
        if type(values[0]) is not Name:
            raise Broken("it makes an object of something other than a name")
        return {} if values[0] == "collections.OrderedDict" else StandIn()

    def build(self) -> object:
        target, state = self.pop_many(2)
        if type(target) is Array:
            _version, shape, kind, fortran, values = state
            target.values = _values(self, values, kind, shape, "F" if fortran is True else "C")
        elif isinstance(target, np.dtype) and (type(state) is not tuple or state[1] not in ("<", "|", "=")):
            raise UserError(f"{self.title} holds arrays in big-endian or unknown byte order, which are not read")
        return target

    def find_storage(self) -> Storage:
        reference = self.stack.pop()
        if self.storages is None:
            raise UserError(f"{self.title} is refused and nothing of it was run: its pickle refers to objects outside "
                            "itself, which paddle.save never writes")
        if type(reference) is not tuple or not 5 <= len(reference) <= 6 or reference[0] != "storage":
            raise Broken("it refers to something other than a storage")
        _, kind, key, _, numel, *view = reference
        if type(kind) is not Name or kind not in STORAGES or type(key) is not str or view not in ([], [None]):
            raise Broken("it refers to something other than a storage")
        storage = Storage(key, STORAGES[kind], *_sizes((numel,)))
        if self.storages.setdefault(key, storage) != storage:
            raise Broken("it gives one storage two types or sizes")
        return storage


def _set_item(target: dict, key: object, value: object) -> None:
    """Set an item whose key has a cheap hash; drop any other.

    Hashing a deeply nested tuple crashes Python, and large integers can be made to collide. Short bytes are texts of
    Python 2.
    """
    if type(key) in (bytes, memoryview) and len(key) <= MAX_NAME:
        key = str(key, "latin1")
    if type(key) is str or (type(key) is int and abs(key) < 1 << 60):
        target[key] = value


def _sizes(values: object) -> tuple[int, ...]:
    if type(values) not in (tuple, list) or len(values) > MAX_RANK:
        raise Broken(f"a shape is not a tuple of at most {MAX_RANK} sizes")
    if any(type(value) is not int or not 0 <= value <= MAX_BYTES for value in values):
        raise Broken(f"a size is not from 0 to {MAX_BYTES:,}")
    return tuple(values)


def _shape(values: object) -> tuple[int, ...]:
    shape = _sizes(values)
    if prod(size for size in shape if size) > MAX_BYTES:
        raise Broken("an array is larger than any network's")
    return shape


def _values(machine: Machine, values: object, kind: object, shape: object, order: str) -> np.ndarray:
    """Return the array of a shape that these bytes hold."""
    shape = _shape(shape)
    if not isinstance(kind, np.dtype):
        raise Broken("an array has no dtype")
    raw = _encode(machine, values, "latin1") if type(values) is str else values
    if type(raw) not in (bytes, memoryview) or prod(shape) * kind.itemsize != len(raw):
        raise Broken("an array's bytes do not fill its shape")
    machine.spend("array", len(raw))
    array = np.frombuffer(raw, kind).reshape(shape, order=order)
    array.flags.writeable = False
    return array


# What the names mean -------------------------------------------------------------------------------------------------


def _ordered_dict(machine: Machine, pairs: object = ()) -> dict:
    made: dict = {}
    machine.spend("listed", len(pairs))
    for key, value in pairs:  # Python 2 wrote a list of pairs
        _set_item(made, key, value)
    return made


def _encode(machine: Machine, text: object, encoding: object) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise Broken("it encodes something other than a text, or not as latin1")
    machine.spend("encoded", len(text))
    return text.encode("latin1")


def _tensor(machine: Machine, storage: object, offset: object, shape: object, strides: object, *_: object) -> Tensor:
    (start,), shape, strides = _sizes((offset,)), _shape(shape), _sizes(strides)
    if type(storage) is not Storage or len(shape) != len(strides):
        raise Broken("a tensor has no storage, or more sizes than strides")
    last = start + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if prod(shape) > 0 and (last >= storage.numel or prod(shape) > storage.numel):
        raise Broken("a tensor is larger than its storage")
    return Tensor(storage, start, shape, strides)


def _parameter(machine: Machine, tensor: object, *_: object) -> Tensor:
    if type(tensor) is not Tensor:
        raise Broken("a parameter is not a tensor")
    return tensor


def _dtype(machine: Machine, code: object, *_: object) -> np.dtype:
    if type(code) is not str or code.lstrip("<|=") not in NUMPY_KINDS:
        machine.refuse(f"numpy.dtype({code!r})" if type(code) is str else "numpy.dtype of something strange")
    return np.dtype("<" + code.lstrip("<|="))


def _from_buffer(machine: Machine, values: object, kind: object, shape: object, order: object) -> Array:
    """Return an array as protocol 5 writes it."""
    if order not in ("C", "F"):
        raise Broken("an array has no order")
    return Array(_values(machine, values, kind, shape, order))


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
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
}
for _core in ("numpy.core", "numpy._core"):
    CALLS[f"{_core}.multiarray._reconstruct"] = lambda machine, *_: Array()
    CALLS[f"{_core}.numeric._frombuffer"] = _from_buffer
for _builtins in ("builtins", "__builtin__"):
    CALLS[f"{_builtins}.tuple"] = _tuple

# What the opcodes do. Each gets the machine and its argument, which `pickletools` reads but for these.
_READ_BY_US = {"GLOBAL", "SHORT_BINSTRING", "BINSTRING", "BINUNICODE8", "BINBYTES8", "BYTEARRAY8"}
_Operation = Callable[[Machine, object], object]
_MAKES: dict[str, _Operation] = {  # and the result is pushed
    **dict.fromkeys(
        ["BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES",
         "BINBYTES"], lambda m, argument: argument),
    "SHORT_BINSTRING": lambda m, _: str(m.sized(1), "latin1"),
    "BINSTRING": lambda m, _: str(m.sized(4), "latin1"),
    "BINUNICODE8": lambda m, _: str(m.sized(8), "utf-8", "surrogatepass"),
    **dict.fromkeys(["BINBYTES8", "BYTEARRAY8"], lambda m, _: m.sized(8)),
    "NONE": lambda m, _: None,
    "NEWTRUE": lambda m, _: True,
    "NEWFALSE": lambda m, _: False,
    "EMPTY_TUPLE": lambda m, _: (),
    "EMPTY_LIST": lambda m, _: [],
    "EMPTY_DICT": lambda m, _: {},
    "EMPTY_SET": lambda m, _: StandIn(),
    "FROZENSET": lambda m, _: (m.pop_to_mark(), StandIn())[1],
    "TUPLE1": lambda m, _: m.pop_many(1),
    "TUPLE2": lambda m, _: m.pop_many(2),
    "TUPLE3": lambda m, _: m.pop_many(3),
    "TUPLE": lambda m, _: tuple(m.pop_to_mark()),
    **dict.fromkeys(["BINGET", "LONG_BINGET"], lambda m, index: m.memo[index]),
    "GLOBAL": lambda m, _: m.name(m.line(), m.line()),
    "STACK_GLOBAL": lambda m, _: m.name(*m.pop_many(2)),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.new_object(2),
    "NEWOBJ_EX": lambda m, _: m.new_object(3),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.find_storage(),
}
_DOES: dict[str, _Operation] = {
    **dict.fromkeys(["PROTO", "FRAME"], lambda m, _: None),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.pop_to_mark(),
    "APPEND": lambda m, _: m.extend(m.pop_many(1)),
    **dict.fromkeys(["APPENDS", "ADDITEMS"], lambda m, _: m.extend(m.pop_to_mark())),
    "SETITEM": lambda m, _: m.set_items(m.pop_many(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    **dict.fromkeys(["BINPUT", "LONG_BINPUT"], lambda m, index: m.memoize(index)),
    "MEMOIZE": lambda m, _: m.memoize(len(m.memo)),
}
