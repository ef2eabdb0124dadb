"""Read safetensors files; which layout their fully connected weights have is often not recorded in them."""

from __future__ import annotations

import json

import numpy as np

from engine.weights.pytorch import numbers_of
from engine.weights.released import CHECKPOINT
from errors import UserError, printable

KINDS = {
    "F16": "f2", "BF16": "bfloat16", "F32": "f4", "F64": "f8", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8",
    "U8": "u1", "U16": "u2", "U32": "u4", "U64": "u8", "BOOL": "b1", "C64": "c8",
}
LAYOUTS = {"paddle": "paddle", "pd": "paddle", "pt": "torch"}


def is_safetensors(head: bytes) -> bool:
    """Return whether a file's first bytes are a header's length and its opening brace."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40


def read(data: bytes, title: str) -> tuple[dict[str, np.ndarray], str | None]:
    """Return the read-only arrays and the layout that the metadata name ("torch", "paddle" or None)."""
    import safetensors

    try:
        found = dict(safetensors.deserialize(data))  # checks the header and all sizes and offsets
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{title} is damaged: {printable(error)}") from None
    if metadata.get("format") == "checkpoint":
        raise UserError(f"{title} is {CHECKPOINT}")
    arrays = {}
    for name, entry in found.items():
        if entry["dtype"] not in KINDS:
            raise UserError(f"{title} holds {printable(name)} as {printable(entry['dtype'])}, which is not read")
        arrays[name] = numbers_of(entry["data"], KINDS[entry["dtype"]]).reshape(entry["shape"])
        arrays[name].flags.writeable = False
    return arrays, LAYOUTS.get(metadata.get("format"))
