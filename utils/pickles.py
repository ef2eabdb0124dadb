"""A pickle machine for files from strangers: it builds plain data and descriptions of arrays, and calls nothing.

Python's own unpickler runs what a file tells it to. Even with ``find_class`` restricted, a few bytes make it
reserve gigabytes (a memo index, a declared length) or overflow the stack (hashing a deeply nested tuple). This
machine knows only the opcodes that ``torch.save`` and ``paddle.save`` write (protocols 2 to 5). A global name is
never imported: it is looked up in `pickle_names`, and one that does not stand there is refused. PyTorch's own
``weights_only`` loader goes the same way.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import struct
from collections.abc import Callable

from errors import UserError, printable
from utils import pickle_names
from utils.pickle_names import CALLS, STAND_INS, STORAGES, Array, Broken, Name, NumpyKind, StandIn, Storage

MAX_OPCODES = 3_000_000  # a state dict with its optimizer needs some fifty per tensor
MAX_NAME = 512


def load(data: memoryview, start: int, told: str,
         storages: dict[str, Storage] | None = None) -> tuple[object, int]:
    """Read one pickle of `data` from byte `start`; return its object and the position after it.

    Arrays come out as `Tensor` and `Array`, bytes as views of `data`; sets and other objects that weights do not
    need as `StandIn`; dictionary entries whose key is neither a string nor an ordinary integer are dropped.
    PyTorch's references to storages are allowed where `storages` is given, and collected there. `told` names the
    file in messages. Raises UserError for a name or opcode that is not allowed, and for anything damaged.
    """
    machine = Machine(data, start, told, storages)
    try:
        return machine.run(), machine.at
    except (Broken, IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
        reason = str(error) if isinstance(error, Broken) else "it stops making sense"
        raise UserError(f"{told} is damaged or not a file of weights: {reason} (byte {machine.at} of the pickle's "
                        f"{len(data)})") from None


def expect_end(data: memoryview, end: int, told: str) -> None:
    """Raise UserError if `data` goes on behind its last object."""
    if end != len(data):
        raise UserError(f"{told} is damaged: it goes on for {len(data) - end} bytes after its last object")


def refuse_text_pickle(data: bytes, told: str) -> None:
    """Raise UserError with the first name in `data` if it is a pickle of protocol 0 or 1; else do nothing.

    Neither PyTorch nor Paddle writes these, so that they are not read, only told.
    """
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("GLOBAL", "INST") and re.fullmatch(r"[\w.]+ [\w.]+", argument):
                raise UserError(f"{told} is refused and nothing of it was run: it is a pickle of a protocol that "
                                "neither torch.save nor paddle.save uses, and names "
                                f"{printable(argument.replace(' ', '.'))}")
    except (ValueError, IndexError, OverflowError, struct.error):  # no pickle
        return


class Machine:
    """One run over one pickle: a stack, its marks, a memo, and what the arrays may still claim."""

    def __init__(self, data: memoryview, start: int, told: str, storages: dict[str, Storage] | None) -> None:
        self.data, self.at, self.told, self.storages = data, start, told, storages
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        self.bytes_left = dict.fromkeys(("array", "encoded", "listed"), len(data))

    def run(self) -> object:
        for _ in range(MAX_OPCODES):
            code = self.data[self.at]
            self.at += 1
            if code == pickle.STOP[0]:
                return self.stack.pop()
            operation = _OPERATIONS.get(code)
            if operation is None:
                self.refuse_opcode(code)
            operation(self)
        raise Broken(f"it has more than {MAX_OPCODES:,} opcodes")

    # Reading arguments -------------------------------------------------------------------------------------------

    def take(self, count: int) -> memoryview:
        if not 0 <= count <= len(self.data) - self.at:
            raise Broken(f"it promises {count} bytes where {len(self.data) - self.at} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, width: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(width), "little", signed=signed)

    def text(self, width: int) -> str:
        return str(self.take(self.number(width)), "utf-8", "surrogatepass")

    def line(self) -> str:
        end = bytes(self.data[self.at : self.at + MAX_NAME]).find(b"\n")
        if end < 0:
            raise Broken("a name does not end")
        return str(self.take(end + 1)[:-1], "utf-8")

    # The stack ---------------------------------------------------------------------------------------------------

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        return self.stack.pop()

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

    # Containers --------------------------------------------------------------------------------------------------

    def extend(self, values: list) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(values)
        elif type(target) is not StandIn:
            raise Broken("it appends to what is no list")

    def set_items(self, values: list) -> None:
        target = self.stack[-1]
        if type(target) is dict:
            for key, value in zip(values[::2], values[1::2], strict=True):
                pickle_names.keep_item(target, key, value)
        elif type(target) is not StandIn:
            raise Broken("it sets items of what is no dictionary")

    # Names and calls ---------------------------------------------------------------------------------------------

    def refuse(self, dotted: str) -> None:
        raise UserError(
            f"{self.told} is refused and nothing of it was run: its pickle names {printable(dotted)}, which is none of "
            "the names that weights need (a whole model or run of your own: save only its state_dict)"
        )

    def refuse_opcode(self, code: int) -> None:
        known = pickletools.code2op.get(chr(code))
        if known is None:
            raise Broken(f"there is no opcode {code}")
        if known.name == "INST":
            self.refuse(f"{self.line()}.{self.line()}")
        raise UserError(f"{self.told} is refused and nothing of it was run: its pickle uses the opcode {known.name}, "
                        "which neither torch.save nor paddle.save writes")

    def name(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise Broken("a name is no text")
        dotted = f"{module}.{name}"
        if dotted not in CALLS and dotted not in STORAGES and dotted not in STAND_INS:
            self.refuse(dotted)
        self.push(Name(dotted))

    def call(self) -> None:
        name, arguments = self.pop_many(2)
        if type(name) is not Name or type(arguments) is not tuple:
            raise Broken("it calls what is no name")
        function = CALLS.get(name.dotted)
        self.push(function(self, *arguments) if function else StandIn())

    def new_object(self, parts: int) -> None:
        values = self.pop_many(parts)
        if type(values[0]) is not Name:
            raise Broken("it makes an object of what is no name")
        self.push({} if values[0].dotted == "collections.OrderedDict" else StandIn())

    def build(self) -> None:
        target, state = self.pop_many(2)
        if type(target) is Array:
            pickle_names.fill_array(self, target, state)
        elif type(target) is NumpyKind and (type(state) is not tuple or state[1] not in ("<", "|", "=")):
            raise UserError(f"{self.told} holds arrays in big-endian or unknown byte order, and these are not read")
        self.push(target)

    def find_storage(self) -> None:
        reference = self.pop()
        if self.storages is None:
            raise UserError(f"{self.told} is refused and nothing of it was run: its pickle refers to objects outside "
                            "itself, which paddle.save never writes")
        if type(reference) is not tuple or not 5 <= len(reference) <= 6 or reference[0] != "storage":
            raise Broken("it refers to something that is no storage")
        _, kind, key, _, numel, *view = reference
        if type(kind) is not Name or kind.dotted not in STORAGES or type(key) is not str or view not in ([], [None]):
            raise Broken("it refers to something that is no storage")
        (numel,) = pickle_names.check_numbers((numel,))
        storage = Storage(key, STORAGES[kind.dotted], numel)
        if self.storages.setdefault(key, storage) != storage:
            raise Broken("it gives one storage two types or sizes")
        self.push(storage)

    def spend(self, what: str, count: int) -> None:
        """Count what is made from the file's bytes; repeating the same ones costs a file nothing, and us memory."""
        self.bytes_left[what] -= count
        if self.bytes_left[what] < 0:
            raise Broken(f"its {what} values are more than the file holds")


_OPERATIONS: dict[int, Callable[[Machine], object]] = {
    opcode[0]: operation
    for opcode, operation in {
        pickle.PROTO: lambda m: m.take(1),
        pickle.FRAME: lambda m: m.take(8),
        pickle.NONE: lambda m: m.push(None),
        pickle.NEWTRUE: lambda m: m.push(True),
        pickle.NEWFALSE: lambda m: m.push(False),
        pickle.BININT: lambda m: m.push(m.number(4, signed=True)),
        pickle.BININT1: lambda m: m.push(m.number(1)),
        pickle.BININT2: lambda m: m.push(m.number(2)),
        pickle.LONG1: lambda m: m.push(m.number(m.number(1), signed=True)),
        pickle.BINFLOAT: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
        pickle.SHORT_BINSTRING: lambda m: m.push(str(m.take(m.number(1)), "latin1")),
        pickle.BINSTRING: lambda m: m.push(str(m.take(m.number(4)), "latin1")),
        pickle.SHORT_BINUNICODE: lambda m: m.push(m.text(1)),
        pickle.BINUNICODE: lambda m: m.push(m.text(4)),
        pickle.BINUNICODE8: lambda m: m.push(m.text(8)),
        pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.number(1))),
        pickle.BINBYTES: lambda m: m.push(m.take(m.number(4))),
        pickle.BINBYTES8: lambda m: m.push(m.take(m.number(8))),
        pickle.MARK: lambda m: m.marks.append(len(m.stack)),
        pickle.POP: lambda m: m.pop(),
        pickle.POP_MARK: lambda m: m.pop_to_mark(),
        pickle.EMPTY_TUPLE: lambda m: m.push(()),
        pickle.TUPLE1: lambda m: m.push(m.pop_many(1)),
        pickle.TUPLE2: lambda m: m.push(m.pop_many(2)),
        pickle.TUPLE3: lambda m: m.push(m.pop_many(3)),
        pickle.TUPLE: lambda m: m.push(tuple(m.pop_to_mark())),
        pickle.EMPTY_LIST: lambda m: m.push([]),
        pickle.APPEND: lambda m: m.extend(list(m.pop_many(1))),
        pickle.APPENDS: lambda m: m.extend(m.pop_to_mark()),
        pickle.EMPTY_DICT: lambda m: m.push({}),
        pickle.SETITEM: lambda m: m.set_items(list(m.pop_many(2))),
        pickle.SETITEMS: lambda m: m.set_items(m.pop_to_mark()),
        pickle.EMPTY_SET: lambda m: m.push(StandIn()),
        pickle.ADDITEMS: lambda m: m.extend(m.pop_to_mark()),
        pickle.FROZENSET: lambda m: (m.pop_to_mark(), m.push(StandIn())),
        pickle.BINPUT: lambda m: m.memoize(m.number(1)),
        pickle.LONG_BINPUT: lambda m: m.memoize(m.number(4)),
        pickle.MEMOIZE: lambda m: m.memoize(len(m.memo)),
        pickle.BINGET: lambda m: m.push(m.memo[m.number(1)]),
        pickle.LONG_BINGET: lambda m: m.push(m.memo[m.number(4)]),
        pickle.GLOBAL: lambda m: m.name(m.line(), m.line()),
        pickle.STACK_GLOBAL: lambda m: m.name(*m.pop_many(2)),
        pickle.REDUCE: lambda m: m.call(),
        pickle.NEWOBJ: lambda m: m.new_object(2),
        pickle.NEWOBJ_EX: lambda m: m.new_object(3),
        pickle.BUILD: lambda m: m.build(),
        pickle.BINPERSID: lambda m: m.find_storage(),
    }.items()
}
