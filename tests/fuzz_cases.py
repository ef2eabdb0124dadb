"""Damaged and hostile files of every kind that the commands read.

Random damage of weights, batches and images is given to their readers directly, in the tests of these.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cifar_files
import numpy as np
from pickled import LEGACY_KEYS, as_legacy, as_paddle, name, sized, text
from PIL import Image
from safetensors.numpy import save

TINY = """
MODEL:
  NAME: poolformer_s12
  ARGS: {depths: [1, 1], embed_dims: [8, 16]}
DATA: {NAME: digits, IMAGE_SIZE: 32, BATCH_SIZE: 64, EVAL_BATCH_SIZE: 360, HOLDOUT: 180, WORKERS: 0, DOWNLOAD: false}
TRAIN: {EPOCHS: 1, MAX_STEPS: 2, LOG_EVERY: 1}
RUNTIME: {KERNELS: stock}
"""
CIFAR = TINY.replace("digits", "cifar10")

State = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One input: its ``kind``, what was done to it, and its files by name (the first is the damaged one).

    ``must_refuse``: nothing of it may be taken. ``whole``: the name of the undamaged file, where there is one.
    """

    kind: str
    damage: str
    files: dict[str, bytes] = field(repr=False)
    must_refuse: bool = False
    whole: str = ""


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


def random_cases(kind: str, file: str, data: bytes, rounds: int, seed: int, **others: bytes) -> Iterator[Case]:
    """Yield seven damages a round of one file."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{kind} {file}".encode())])
    for _ in range(rounds):
        for damage, content in damaged(data, rng):
            if content != data:
                yield Case(kind, damage, {file: content, f"whole_{file}": data, **others}, whole=f"whole_{file}")


# Weights -----------------------------------------------------------------------------------------------------------


def as_torch(state: State) -> State:
    """Return a state of ours as PyTorch would name and lay it out."""
    renamed = {key.replace("._mean", ".running_mean").replace("._variance", ".running_var"): value
               for key, value in state.items()}
    return {key: value.T.copy() if key == "head.weight" else value for key, value in renamed.items()}


def _tensors(state: State) -> bytes:
    parts = [b"}"]
    for key, (label, array) in enumerate(state.items()):
        kind = {"f4": "FloatStorage", "f8": "DoubleStorage", "i8": "LongStorage"}[array.dtype.str[1:]]
        strides = tuple(stride // array.itemsize for stride in array.strides)
        count, *numbers = (pickle.dumps(part, 2)[2:-1] for part in (array.size, 0, array.shape, strides))
        storage = b"(" + text("storage") + name("torch", kind) + text(str(key)) + text("cpu") + count + b"tQ"
        rebuilt = name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"".join(numbers)
        parts.append(text(label) + rebuilt + b"\x89NtRs")
    return b"".join(parts)


def torch_zip(state: State) -> bytes:
    """Return what ``torch.save`` writes since 1.6."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + _tensors(state) + b".")
        for key, array in enumerate(state.values()):
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return buffer.getvalue()


def torch_legacy(state: State) -> bytes:
    """Return what ``torch.save`` wrote before."""
    keys = [str(key) for key in range(len(state))]
    storages = b"".join(sized(array.size) + array.tobytes() for array in state.values())
    return as_legacy(_tensors(state)).removesuffix(LEGACY_KEYS) + pickle.dumps(keys, 2) + storages


def paddle_file(state: State) -> bytes:
    """Return what ``paddle.save`` writes."""
    return pickle.dumps({**state, "StructuredToParameterName@@": {key: key for key in state}}, 4)


FORMATS: dict[str, Callable[[State], bytes]] = {
    "weights.pdparams": paddle_file,
    "weights.safetensors": lambda state: save(state, {"format": "paddle"}),
    "zip.pth": lambda state: torch_zip(as_torch(state)),
    "legacy.pth": lambda state: torch_legacy(as_torch(state)),
}


def wrong_states(state: State) -> Iterator[tuple[str, State]]:
    """Yield states of which every file is whole, and none fits."""
    first, *_ = (key for key, value in state.items() if value.ndim > 1)
    vector, *_ = (key for key, value in state.items() if value.ndim == 1)
    yield "wrong keys", {key: value for key, value in state.items() if key != first}
    yield "wrong keys", {**state, "something.else": state[first]}
    yield "wrong keys", {("x" + key if key == first else key): value for key, value in state.items()}
    yield "wrong keys", {f"{key}\n\x1b[31m": value for key, value in state.items()}
    yield "wrong keys", {"k" * 100_000: state[first], **state}
    yield "wrong shape", {**state, first: state[first][..., :-1].copy()}
    yield "wrong shape", {**state, first: state[first].reshape(-1)}
    yield "wrong shape", {**state, vector: state[vector][None]}
    yield "wrong shape", {**state, vector: np.zeros(0, "f4")}
    yield "wrong type", {**state, first: state[first].astype("i8")}
    yield "wrong type", {**state, vector: np.full_like(state[vector], np.nan)}
    yield "wrong type", {**state, vector: np.full(state[vector].shape, 1e300)}


def strangers() -> dict[str, bytes]:
    """Return files of other kinds under the name of the right one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return {"empty": b"", "zeros": bytes(5000), "text": b"hello\n" * 50, "html": b"<!DOCTYPE html><html>404</html>",
            "json": b'{"a": [1, 2]}', "png": encoded("PNG"), "zip": buffer.getvalue(), "gzip": gzip.compress(b"x" * 99),
            "noise": np.random.default_rng(1).bytes(4000), "number": pickle.dumps(5, 4), "list": pickle.dumps([1], 2),
            "nul": b"\0"}


def weight_cases(state: State) -> Iterator[Case]:
    """Yield weights of all formats that are whole and do not fit, and files of other kinds."""
    for file, write in FORMATS.items():
        for damage, wrong in wrong_states(state):
            yield Case(file, damage, {file: write(wrong)}, must_refuse=True)
        for what, content in strangers().items():
            yield Case(file, f"wrong type: {what}", {file: content}, must_refuse=True)


# Archives and images -----------------------------------------------------------------------------------------------


def archive_cases(folder: Path) -> Iterator[Case]:
    """Yield whole CIFAR-10 archives with wrong batches in them, and files of other kinds."""
    path = folder / "a.tar.gz"
    for what, content in strangers().items():
        yield Case("cifar-10-python.tar.gz", f"wrong type: {what}", {"a.tar.gz": content}, must_refuse=True)
        cifar_files.write_archive(path, {"test_batch": content})
        yield Case("batch in an archive", f"wrong type: {what}", {"a.tar.gz": path.read_bytes()}, must_refuse=True)
    pixels = np.zeros((20, 3072), np.uint8)
    for damage, changes in {
        "wrong shape": {"data": pixels[:, 1:]}, "wrong keys": {"data": None},
        "wrong type": {"data": pixels.astype("f4")},
        "wrong type ": {"labels": "7" * 20}, "wrong shape ": {"labels": [1]}, "wrong keys ": {"labels": None},
    }.items():
        cifar_files.write_archive(path, {"test_batch": cifar_files.batch(5, **changes)})
        yield Case("batch in an archive", damage.strip(), {"a.tar.gz": path.read_bytes()}, must_refuse=True)


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    """Return a picture of 40×30 pixels in a file format."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8).repeat(6, 0).repeat(5, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, data: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """Return a PNG file whose header promises whatever is asked."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


IMAGES = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")


def image_cases() -> Iterator[Case]:
    """Yield image bombs, and files that are not images."""
    for kind in IMAGES:
        file = f"image.{kind.lower()}"
        for what, content in strangers().items():
            if what != "png":
                yield Case(f"{kind} image", f"wrong type: {what}", {file: content}, must_refuse=True)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + 30_000 // 8)) for _ in range(30_000)) + packer.flush()
    for damage, content in {
        "bomb: 900 million pixels in 100 KB": png(30_000, 30_000, rows, 1, 0),
        "bomb: sides of 2^31": png(2**31 - 1, 2**31 - 1, rows), "bomb: sides in the header alone": png(9999, 9999, b""),
        "no pixels": png(0, 0, b""), "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    }.items():
        yield Case("PNG image", damage, {"image.png": content}, must_refuse=True)


def malicious_cases(folder: Path) -> Iterator[Case]:
    """Yield pickles that would create ``folder``/canary, in each place where a command reads a pickle."""
    from test_weights_malicious import ATTACKS, PLACES

    canary, path = folder / "canary", folder / "a.tar.gz"
    for attack in ATTACKS:
        payload = attack(f"touch {canary}")
        for place in PLACES:
            yield Case(f"malicious weights, {place.__name__}", attack.__name__, {"weights.pth": place(payload)}, True)
        cifar_files.write_archive(path, {"test_batch": as_paddle(payload)})
        yield Case("malicious batch in an archive", attack.__name__, {"a.tar.gz": path.read_bytes()}, True)
        loose = cifar_files.members({"test_batch": as_paddle(payload)})
        yield Case("malicious batch in a folder", attack.__name__, {f"cifar/{k}": v for k, v in loose.items()}, True)


# Resume checkpoints ------------------------------------------------------------------------------------------------


def checkpoint_cases(data: bytes, digest: Callable, seed: int, rounds: int) -> Iterator[Case]:
    """Yield damaged checkpoints of a run, also such whose checksum a stranger made right."""
    kind, file = "resume checkpoint", "000000002.safetensors"
    yield from random_cases(kind, file, data, rounds, seed)
    for what, content in strangers().items():
        yield Case(kind, f"wrong type: {what}", {file: content}, must_refuse=True)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    progress = json.loads(header["__metadata__"]["progress"])
    arrays = {key: np.frombuffer(data[8 + length :][slice(*value["data_offsets"])], "f4").reshape(value["shape"])
              for key, value in header.items() if key != "__metadata__"}

    def forged(changed: State, value: object) -> bytes:
        text = value if isinstance(value, str) else json.dumps(value)
        return save(changed, {"format": "checkpoint", "progress": text, "sha256": digest(changed, text)})

    for damage, state in wrong_states({k: v for k, v in arrays.items() if k.startswith("model.")}):
        rest = {k: v for k, v in arrays.items() if not k.startswith("model.")}
        if "type" not in damage:
            renamed = {k if k.startswith("model.") else f"model.{k}": v for k, v in state.items()}
            yield Case(kind, f"forged: {damage}", {file: forged({**renamed, **rest}, progress)}, must_refuse=True)
    for key in ("optimizer.head.weight/moment1_0", "optimizer.nowhere/moment1_0", "optimizer."):
        yield Case(kind, "forged: wrong keys", {file: forged({**arrays, key: np.zeros(3, "f4")}, progress)},
                   must_refuse=True)
    values = [[], 5, None, "[" * 100_000, "{", {**progress, "epoch": -1}, {**progress, "epoch": "1"},
              {**progress, "sums": [1]}, {**progress, "sums": 3}, {**progress, "best_loss": 1e999},
              {**progress, "global_step": 10**400}, {**progress, "scaler": []}, {**progress, "__class__": 1},
              {**progress, "step": True}]
    for value in values:
        yield Case(kind, "forged: wrong progress", {file: forged(arrays, value)}, must_refuse=True)
