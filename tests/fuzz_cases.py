"""Damaged files, files of other kinds, and whole files that hold something else."""

import gzip
import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

State = dict[str, np.ndarray]


def damaged(data: bytes, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Yield the bytes cut, with flipped bits, with a stretch overwritten, left out, or doubled; never as they were."""
    start, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
    yield "truncated", data[:start]
    for count in (1, 1, 8):
        flipped = bytearray(data)
        for place in rng.integers(len(data), size=count):
            flipped[place] ^= 1 << int(rng.integers(8))
        yield "bits flipped", bytes(flipped)
    yield "overwritten", data[:start] + rng.bytes(length) + data[start + length :]
    yield "bytes left out", data[:start] + data[start + length :]
    yield "bytes doubled", data[: start + length] + data[start:]


def strangers() -> dict[str, bytes]:
    """Return files of other kinds under the name of the right one, always the same bytes: they are in tests' names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("readme.txt"), "hello")
    return {"empty": b"", "zeros": bytes(5000), "text": b"hello\n" * 50, "html": b"<!DOCTYPE html><html>404</html>",
            "json": b'{"a": [1, 2]}', "png": encoded("PNG"), "zip": buffer.getvalue(),
            "gzip": gzip.compress(b"x" * 99, mtime=0), "noise": np.random.default_rng(1).bytes(4000),
            "number": pickle.dumps(5, 4), "list": pickle.dumps([1], 2), "nul": b"\0"}


def wrong_states(state: State) -> Iterator[tuple[str, State]]:
    """Yield states that do not fit where ``state`` does, each with what a message says of it."""
    first, *_ = (key for key, value in state.items() if value.ndim > 1)
    vector, *_ = (key for key, value in state.items() if value.ndim == 1)
    yield "missing", {key: value for key, value in state.items() if key != first}
    yield "not in the model", {**state, "something.else": state[first]}
    yield "missing", {("x" + key if key == first else key): value for key, value in state.items()}
    yield "missing", {f"{key}\n\x1b[31m": value for key, value in state.items()}
    yield "not in the model", {"k" * 100_000: state[first], **state}
    yield "of another shape", {**state, first: state[first][..., :-1].copy()}
    yield "of another shape", {**state, first: state[first].reshape(-1)}
    yield "of another shape", {**state, vector: state[vector][None]}
    yield "of another shape", {**state, vector: np.zeros(0, "f4")}
    yield "as int64, and float32 was expected", {**state, first: state[first].astype("i8")}
    yield "not finite", {**state, vector: np.full_like(state[vector], np.nan)}
    yield "not finite", {**state, vector: np.full(state[vector].shape, 1e300)}


def encoded(kind: str) -> bytes:
    """Return a picture of 40×30 pixels in a file format."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8).repeat(6, 0).repeat(5, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def png(width: int, height: int, data: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """Return a PNG file whose header promises whatever is asked."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
