"""Files that are no weights, and whole ones that were damaged: one sentence each, or the right numbers."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fuzz_cases import damaged, strangers

from engine.weights import read_weights
from errors import UserError
from processes import python

DATA = Path(__file__).parent / "data" / "weights"


@pytest.mark.parametrize(("content", "words"), [
    (b"", "is empty"), (b"\x1f\x8b\x08data", "compressed with gzip"), (b"\n<!DOCTYPE html><html>", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"), (b"weights", "starts with 77 65"),
    (bytes(257) + b"ustar" + bytes(300), "tar archive"), (b"PK\x05\x06" + bytes(18), "0 data.pkl"),
    (b"PK\x03\x04", "zip directory cannot be read"),
    (b"cos\nsystem\n(S'true'\ntR.", "nothing of it was run.* names os.system"),
    (b"(S'true'\nios\nsystem\n.", "names os.system"),
    (b"config: some text\nand more of it\n", "starts with 63 6f"),
    *((content, r"w\.pth") for content in strangers().values()),
], ids=lambda value: repr(value)[:30])
def test_other_files_and_pickles_of_old_protocols(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_weights(tmp_path / "w.pth")


def test_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "pipe", "not an ordinary file"),
                       (tmp_path / "none.pth", "No such file")):
        with pytest.raises(UserError, match=words):
            read_weights(path)


def test_big_endian_and_torchscript(tmp_path: Path) -> None:
    for entry, content, words in (("byteorder", b"big", "big-endian"), ("constants.pkl", b"", "TorchScript")):
        with zipfile.ZipFile(tmp_path / "w", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
            archive.writestr(f"archive/{entry}", content)
        with pytest.raises(UserError, match=words):
            read_weights(tmp_path / "w")
    (tmp_path / "w").write_bytes(pickle.dumps({"w": np.ones(3, ">f4")}, 4))
    with pytest.raises(UserError, match="big-endian"):
        read_weights(tmp_path / "w")


def test_reading_needs_neither_torch_nor_paddle() -> None:
    """In a process of its own, because the tests import Paddle."""
    code = ("import sys; from engine.weights.read import read_weights; read_weights(sys.argv[1]); "
            "assert not {'paddle', 'torch'} & set(sys.modules)")
    python(code, DATA / "timm_zip.pth.tar")


# Damage ------------------------------------------------------------------------------------------------------------


def one_damage(data: bytes, rng: np.random.Generator) -> bytes:
    return list(damaged(data, rng))[int(rng.integers(7))][1]


def paddle_file(protocol: int) -> bytes:
    state = {f"{index}.weight": np.arange(12, dtype=np.float32).reshape(3, 4) for index in range(4)}
    return pickle.dumps({**state, "StructuredToParameterName@@": {key: f"linear_{key}" for key in state}}, protocol)


def with_damaged_pickle(data: bytes, rng: np.random.Generator) -> bytes:
    """Return the zip file with a damaged data.pkl and right checksums, as a stranger would make it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, one_damage(content, rng) if name.endswith("data.pkl") else content)
    return buffer.getvalue()


FUZZED = ["kinds_zip.pth", "kinds_legacy.pth", "timm_zip.pth.tar", "timm_legacy.pth.tar", "kinds.safetensors", 2, 3, 4]


@pytest.mark.parametrize("source", FUZZED)
def test_damaged_files(source: str | int, tmp_path: Path) -> None:
    """Every damage is refused, or, where the format has no checksum and only numbers changed, gives arrays."""
    data = paddle_file(source) if isinstance(source, int) else (DATA / source).read_bytes()
    path = tmp_path / "w.pth"
    path.write_bytes(data)
    whole = read_weights(path)
    rng = np.random.default_rng(20 + FUZZED.index(source))
    refused = 0
    for _ in range(100):
        wrong = one_damage(data, rng)
        path.write_bytes(wrong)
        try:
            weights = read_weights(path)
        except UserError as error:
            assert "w.pth" in str(error) and "\n" not in str(error)
            refused += 1
            continue
        assert not (len(wrong) < len(data) and data.startswith(wrong))  # nothing cut short passes
        if "zip" in str(source):  # every entry has its checksum
            np.testing.assert_equal(weights.arrays, whole.arrays)
            assert weights.nested_under == whole.nested_under
    assert refused > 50


@pytest.mark.parametrize("name", ["kinds_zip.pth", "timm_zip.pth.tar"])
def test_damaged_pickles_with_right_checksums(name: str, tmp_path: Path) -> None:
    data, rng, refused = (DATA / name).read_bytes(), np.random.default_rng(7), 0
    for _ in range(80):
        (tmp_path / "w.pth").write_bytes(with_damaged_pickle(data, rng))
        try:
            assert sum(array.nbytes for array in read_weights(tmp_path / "w.pth").arrays.values()) < 2 * len(data)
        except UserError:
            refused += 1
    assert refused > 50
