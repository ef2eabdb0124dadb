"""Pickles that would run something, and small files that claim, repeat or nest without end: refused in one sentence."""

import collections
import copyreg
import io
import os
import pickle
import re
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pickled import LEGACY_KEYS, PLACES, as_legacy, as_paddle, as_zip, name, sized, tensor, text

from engine.weights import read_weights
from errors import UserError

DATA = Path(__file__).parent / "data" / "weights"


class Reduced:
    """An object whose pickle calls `function` with `arguments`."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.called = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.called


def by_numpy_load(command: str) -> bytes:
    """A file beside the weights, read by numpy with pickles allowed."""
    beside = command.split()[-1] + ".npy"
    np.save(beside, np.array([Reduced(os.system, command)], dtype=object), allow_pickle=True)
    return name("numpy", "load") + text(beside) + b"N\x88\x87R"


def inside(command: str) -> bytes:
    """Push a whole pickle as bytes."""
    inner = b"\x80\x02" + name("os", "system") + text(command) + b"\x85R."
    return b"C" + bytes([len(inner)]) + inner


STATE = b"}" + text("__setstate__") + name("os", "system") + b"sb"
# Each takes the command of the canary and gives the opcodes of an object, without PROTO and STOP; then the name
# that the refusal must tell, and whether Python's own unpickler falls for it on this machine.
ATTACKS: dict[str, tuple[Callable[[str], bytes], str, bool]] = {
    "reduce": (lambda command: name("os", "system") + text(command) + b"\x85R", "os.system", True),
    "stack global": (lambda command: text("posix") + text("system") + b"\x93" + text(command) + b"\x85R",
                     "posix.system", True),
    "dotted attribute": (lambda command: text("shutil") + text("os.system") + b"\x93" + text(command) + b"\x85R",
                         "shutil.os.system", True),
    "eval": (lambda command: name("builtins", "eval") + text(f"__import__('os').system({command!r})") + b"\x85R",
             "builtins.eval", True),
    "chain of getattr": (
        lambda command: name("builtins", "getattr") + name("builtins", "__import__") + text("os") + b"\x85R"
        + text("system") + b"\x86R" + text(command) + b"\x85R", "builtins.getattr", True),
    # An allowed class gets ``__setstate__`` from its first state, and the second one calls it.
    "build": (lambda command: name("argparse", "Namespace") + b")\x81" + STATE + text(command) + b"b",
              "os.system", True),
    "reconstructor": (
        lambda command: name("copyreg", "_reconstructor") + name("argparse", "Namespace") + name("builtins", "object")
        + b"N\x87R" + STATE + text(command) + b"b", "copyreg._reconstructor", True),
    "INST": (lambda command: b"(" + text(command) + b"ios\nsystem\n", "os.system", True),
    "OBJ": (lambda command: b"(" + name("os", "system") + text(command) + b"o", "os.system", True),
    "extension": (lambda command: b"\x82\xf0" + text(command) + b"\x85R", "EXT1", True),
    "object array": (lambda command: pickle.dumps(np.array([Reduced(os.system, command)], dtype=object), 4)[2:-1],
                     "numpy.dtype('O8')", True),
    "numpy.load": (by_numpy_load, "numpy.load", True),
    "pickle in a pickle": (lambda command: name("pickle", "loads") + inside(command) + b"\x85R", "pickle.loads", True),
    # ``Popen.__new__`` alone would do nothing; its state would.
    "NEWOBJ": (lambda command: name("subprocess", "Popen") + b"q\x05)\x81}" + text("args") + text(command) + b"sb",
               "subprocess.Popen", False),
    "of Windows": (lambda command: name("nt", "system") + text(command) + b"\x85R", "nt.system", False),
    # What plain pickling of a tensor gives: PyTorch reads the bytes by a ``torch.load`` of its own.
    "torch.load": (lambda command: name("torch.storage", "_load_from_bytes") + inside(command) + b"\x85R",
                   "torch.storage._load_from_bytes", False),
}


def in_storage(payload: bytes) -> bytes:
    return as_zip(b"}" + text("w") + b"(" + text("storage") + payload + text("0") + text("cpu") + b"K\x01tQs")


@pytest.fixture
def extension() -> None:
    copyreg.add_extension("os", "system", 0xF0)
    yield
    copyreg.remove_extension("os", "system", 0xF0)


@pytest.mark.parametrize("place", [*PLACES, in_storage], ids=lambda place: place.__name__)
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_runs(attack: str, place: Callable, tmp_path: Path, extension: None) -> None:
    canary = tmp_path / "canary"
    make, refused, works = ATTACKS[attack]
    payload = make(f"touch {canary}")
    (tmp_path / "weights.pth").write_bytes(place(payload))
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / "weights.pth")
    assert refused in str(error.value) and "weights.pth is refused and nothing of it was run" in str(error.value)
    assert not canary.exists()
    if works and place is as_paddle:  # the attack is one: Python's own unpickler runs it
        pickle.loads(as_paddle(payload))
        assert canary.exists()


def test_references_outside_a_paddle_file(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(as_paddle(b"(" + text("storage") + b"tQ"))
    with pytest.raises(UserError, match="refers to objects outside itself"):
        read_weights(tmp_path / "w")


def test_whole_models_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"names torch\.nn\.modules\.linear\.Linear.*save only the state_dict"):
        read_weights(DATA / "whole_model.pt")


def test_the_budget_of_bytes_leaves_real_files_alone(tmp_path: Path) -> None:
    """Protocol 2 keeps arrays as encoded text; forty of them stay within the file's bytes."""
    state = collections.OrderedDict((f"w{index}", np.full(50, 200 + index, np.uint8)) for index in range(40))
    (tmp_path / "w").write_bytes(pickle.dumps(state, 2))
    assert sum(array.sum() for array in read_weights(tmp_path / "w").arrays.values()) == sum(
        50 * (200 + index) for index in range(40))


NUMBERS = name("numpy._core.multiarray", "_reconstruct") + name("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
KIND = name("numpy", "dtype") + text("f4") + b"\x89\x88\x87R"
BOMBS = {  # what they are: the file, and the reason given
    "memo index": (as_paddle(b"Nr\xff\xff\xff\xff"), "holds no weights"),
    "bytes of 2**60": (as_paddle(b"\x8e" + sized(2**60)), "promises 1152921504606846976 bytes where 2 are left"),
    "text of 2**63": (as_paddle(b"\x8d" + sized(2**63)), "promises 9223372036854775808 bytes where 2 are left"),
    "frame of 2**62": (b"\x80\x04\x95" + sized(2**62) + b"}.", "holds no weights"),
    "long of 2**31": (as_paddle(b"\x8b\xff\xff\xff\x7f"), "opcode LONG4"),
    "nested tuples as a key": (b"\x80\x04})" + b"\x85" * 300_000 + b"K\x01s.", "holds no weights"),
    "nested lists": (b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".", "holds no weights"),
    "too many opcodes": (b"\x80\x04}" + b"N0" * 2_000_000 + b".", "more than 3,000,000 opcodes"),
    "a text encoded again and again": (
        b"\x80\x04" + text("x" * 100_000) + b"q\x00"
        + (name("_codecs", "encode") + b"h\x00" + text("latin1") + b"\x86R") * 20_000 + b".",
        "encoded values are more than the file holds"),
    "pairs again and again": (
        b"\x80\x04](" + (text("a") + b"N\x86") * 100_000 + b"eq\x000"
        + (name("collections", "OrderedDict") + b"h\x00\x85R") * 20_000 + b".",
        "listed values are more than the file holds"),
    "one array's bytes again and again": (
        b"\x80\x04B" + struct.pack("<I", 400_000) + bytes(400_000) + b"q\x000}("
        + b"".join(text(f"w{i}") + NUMBERS + b"(K\x01J" + struct.pack("<i", 100_000) + b"\x85" + KIND + b"\x89h\x00tb"
                   for i in range(5_000)) + b"u.",
        "array values are more than the file holds"),
    "array shape beyond its bytes": (
        as_paddle(NUMBERS + b"(K\x01\x8a\x05\x00\x00\x00\x00\x01\x85" + KIND + b"\x89C\x04aaaatb"),
        "bytes do not fill its shape"),
    "empty array of enormous sides": (
        as_paddle(NUMBERS + b"(K\x01K\x00" + b"\x8a\x05\xff\xff\xff\xff\x01" * 2 + b"\x87" + KIND + b"\x89C\x00tb"),
        "larger than any network's"),
    "storage beyond its entry": (as_zip(tensor(2**32, 0, (2**32,), (1,))), "has 16 bytes where 4294967296 numbers"),
    "tensor beyond its storage": (as_zip(tensor(4, 0, (5,), (1,))), "larger than its storage"),
    "tensor behind its storage": (as_zip(tensor(4, 4, (1,), (1,))), "larger than its storage"),
    "stride 0": (as_zip(tensor(4, 0, (2**32,), (0,))), "larger than its storage"),
    "negative stride": (as_zip(tensor(4, 3, (4,), (-1,))), "a size is not from 0 to"),
    "negative size": (as_zip(tensor(4, 0, (-1,), (1,))), "a size is not from 0 to"),
    "empty tensor of enormous sides": (as_zip(tensor(4, 0, (0, 2**33, 2**33), (1, 1, 1))), "larger than any network's"),
    "sixty-four axes": (as_zip(tensor(4, 0, (1,) * 64, (1,) * 64)), "a shape is not a tuple of at most 32 sizes"),
    "one storage as two types": (
        as_zip(b"](" + tensor(4, 0, (4,), (1,)) + tensor(4, 0, (4,), (1,), "LongStorage") + b"e"),
        "two types or sizes"),
    "empty stack": (b"\x80\x04.", "stops making sense"),
    "popping nothing": (b"\x80\x04\x87R.", "takes more than it has"),
    "no mark": (b"\x80\x04Nt.", "stops making sense"),
    "legacy storage of 2**60": (
        as_legacy(tensor(2**32, 0, (4,), (1,))).removesuffix(LEGACY_KEYS) + pickle.dumps(["0"], 2) + sized(2**60),
        "not as long as promised"),
    "safetensors header of 2**39": (sized(2**39) + b"{" + b" " * 100, "header too large"),
    "safetensors nested": (sized(200_000) + b'{"a":' * 40_000, "recursion limit"),
    "safetensors shape": (
        sized(75) + b'{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}} ', "overflow"),
}


def compressed_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x04" + tensor(2**24, 0, (2**24,), (1,)) + b".")
        archive.writestr("archive/data/0", bytes(2**26))
    return buffer.getvalue()


def overlapping_zip() -> bytes:
    """Many entries of the directory share the bytes of one."""
    data = as_zip(b"}", storage=bytes(1_000_000))
    directory, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    last = data.rindex(b"PK\x01\x02")
    entries = data[directory:last] + data[last:end] * 2_000
    tail = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 2001, 2001, len(entries), directory, 0)
    return data[:directory] + entries + tail


BOMBS |= {
    "compressed zip": (compressed_zip(), "compressed zip archive"),
    "overlapping zip": (overlapping_zip(), "claim more bytes than the file has"),
    "dictionary in itself": (b"\x80\x04}q\x00" + text("state_dict") + b"h\x00s.", "holds no weights"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_end_in_one_sentence(bomb: str, tmp_path: Path) -> None:
    content, reason = BOMBS[bomb]
    (tmp_path / "w.pth").write_bytes(content)
    begin, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=rf"w\.pth.* {re.escape(reason)}"):
        read_weights(tmp_path / "w.pth")
    assert time.process_time() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000  # KiB
