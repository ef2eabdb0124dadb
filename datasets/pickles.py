"""Reading the pickles of the CIFAR archives without unpickling: a reader of data that cannot call anything.

``pickle`` builds whatever a file names. This reader knows the opcodes that plain data needs, and of the names
only the four that spell a uint8 array; it looks up no module and calls nothing but the functions below.
It stands on pickle's pure Python reader, whose memo is a dictionary, so that no index in a file makes it
allocate memory.
"""

from __future__ import annotations

import io
import math
import pickle

import numpy as np

_OPCODES = (
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINUNICODE", "SHORT_BINUNICODE", "EMPTY_DICT", "EMPTY_LIST",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPUT",
    "LONG_BINPUT", "BINGET", "LONG_BINGET", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
)  # fmt: skip
_ERRORS = (ValueError, TypeError, LookupError, AttributeError, EOFError, OverflowError, MemoryError)


class _Array:
    """A uint8 array under construction: pickle makes it empty first and gives its state later."""

    value: np.ndarray | None = None


class _Reader(pickle._Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.room = len(data)  # texts turned into bytes may not grow beyond what the file holds

    def find_class(self, module: str, name: str) -> str:
        spelled = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if spelled not in ("numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype", "_codecs.encode"):
            raise ValueError(f"it asks for {module}.{name}"[:200])
        return spelled

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if function == "numpy.core.multiarray._reconstruct":
            result = _Array()
        elif function == "numpy.dtype" and arguments[0] in ("u1", b"u1"):
            result = "uint8"
        elif function == "_codecs.encode" and arguments[1] == "latin1":
            self.room -= len(arguments[0])
            if self.room < 0:
                raise ValueError("it unfolds beyond its own size")
            result = arguments[0].encode("latin1")
        else:
            raise ValueError("it holds something that is no uint8 array")
        self.stack[-1] = result

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Array):
            _, shape, dtype, fortran_order, data = state
            if dtype != "uint8" or len(shape) != 2 or min(shape) < 0 or math.prod(shape) != len(data):
                raise ValueError("an array does not fill its shape")
            target.value = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran_order else "C")
        elif target != "uint8":  # a dtype's state only repeats what its name says
            raise ValueError("it gives a state to something that is no array")

    def set_items(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.set_pair(key, value)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_pair(key, value)

    def set_pair(self, key: object, value: object) -> None:
        if not isinstance(key, (bytes, str)):  # hashing anything deeper could exhaust the C stack
            raise ValueError("a dictionary has a key that is no text")
        self.stack[-1].update({key: value})

    dispatch = {  # noqa: RUF012 - the name and the type that pickle reads
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES
    }
    dispatch[pickle.REDUCE[0]] = reduce
    dispatch[pickle.BUILD[0]] = build
    dispatch[pickle.SETITEMS[0]] = set_items
    dispatch[pickle.SETITEM[0]] = set_item


def read_pickle(data: bytes) -> dict[str, object]:
    """Return the dictionary pickled in ``data``: texts, integers, lists and uint8 arrays, nothing else.

    Keys come as str, whether Python 2 or 3 wrote them. ValueError says why other content is refused.
    """
    try:
        content = _Reader(data).load()
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from None
    except _ERRORS as error:
        raise ValueError(str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}") from None
    if type(content) is not dict:
        raise ValueError("it holds no dictionary")
    plain = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    return {key: value.value if isinstance(value, _Array) else value for key, value in plain.items()}
