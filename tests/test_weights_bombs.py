"""Small files that claim, repeat or nest without end: one sentence each, in little time and memory."""

from __future__ import annotations

import io
import pickle
import re
import resource
import struct
import time
import zipfile
from pathlib import Path

import pytest
from pickled import LEGACY_KEYS, as_legacy, as_paddle, as_zip, name, sized, tensor, text

from engine.weights.read import read_weights
from errors import UserError

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
