"""Pickles by their opcodes, and the files of weights that hold them."""

import io
import pickle
import struct
import zipfile

MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_KEYS = pickle.dumps([], 2)


def text(value: str) -> bytes:
    """Return the opcode that pushes a string."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, attribute: str) -> bytes:
    """Return the opcode that pushes a global."""
    return f"c{module}\n{attribute}\n".encode()


def sized(count: int) -> bytes:
    return struct.pack("<Q", count)


def tensor(numel: int, offset: int, shape: tuple, strides: tuple, kind: str = "FloatStorage") -> bytes:
    """Return the opcodes of a dictionary with one tensor, ``w``."""
    count, *numbers = (pickle.dumps(part, 2)[2:-1] for part in (numel, offset, shape, strides))
    storage = b"(" + text("storage") + name("torch", kind) + text("0") + text("cpu") + count + b"tQ"
    rebuilt = name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"".join(numbers) + b"\x89NtR"
    return b"}" + text("w") + rebuilt + b"s"


def as_zip(payload: bytes, storage: bytes = bytes(16)) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x04" + payload + b".")
        archive.writestr("archive/data/0", storage)
    return buffer.getvalue()


def as_legacy(payload: bytes) -> bytes:
    head = [MAGIC, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    return b"".join(pickle.dumps(part, 2) for part in head) + b"\x80\x04" + payload + b"." + LEGACY_KEYS


def as_legacy_version(payload: bytes) -> bytes:
    return pickle.dumps(MAGIC, 2) + b"\x80\x04" + payload + b"."


def as_legacy_system(payload: bytes) -> bytes:
    return pickle.dumps(MAGIC, 2) + pickle.dumps(1001, 2) + b"\x80\x04" + payload + b"."


def as_legacy_keys(payload: bytes) -> bytes:
    return as_legacy(b"}").removesuffix(LEGACY_KEYS) + b"\x80\x04" + payload + b"."


def as_paddle(payload: bytes) -> bytes:
    return b"\x80\x04}" + text("weight") + payload + b"s."


PLACES = [as_zip, as_legacy, as_legacy_version, as_legacy_system, as_legacy_keys, as_paddle]
