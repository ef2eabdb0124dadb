"""CIFAR from a NumPy archive, and what its pixels are: hostile files, and figures that must not be mislabelled."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from configs.load import load_config
from datasets import arrays, build_dataset, origin
from datasets.cifar import read_cifar
from errors import UserError

RNG = np.random.default_rng(3)
IMAGES = RNG.integers(0, 256, (30, 32, 32, 3), np.uint8)
LABELS = np.arange(30, dtype=np.uint8) % 10


def npz(path: Path, method: int = zipfile.ZIP_STORED, **members: np.ndarray | bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, value in members.items():
            buffer = io.BytesIO()
            if not isinstance(value, bytes):
                np.save(buffer, value, allow_pickle=True)
                value = buffer.getvalue()
            archive.writestr(f"{name}.npy", value)
    return path


def header(text: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_images_and_labels_are_those_of_numpy(method: int, tmp_path: Path) -> None:
    path = npz(tmp_path / "part.npz", method, test_images=np.asfortranarray(IMAGES), test_labels=LABELS,
               test_index=np.arange(30), train_images=IMAGES[:20], train_labels=LABELS[:20].astype(np.int64))
    read = read_cifar("cifar10", "test", str(path))
    np.testing.assert_array_equal(read.images, IMAGES)
    np.testing.assert_array_equal(read.labels, LABELS)
    assert read.labels.dtype == np.int64 and read.images.flags["C_CONTIGUOUS"] and read.class_names[3] == "cat"
    config = load_config("configs/convmixer_256_8_cifar10.yaml", [f"DATA.ROOT={path}", "DATA.HOLDOUT=10"])
    assert [len(build_dataset(config.DATA, split)) for split in ("train", "holdout", "test")] == [10, 10, 30]
    assert origin.origin(config.DATA) == "CIFAR-10 (pixels of unknown origin)"


def test_coarse_and_fine_labels(tmp_path: Path) -> None:
    path = npz(tmp_path / "part.npz", test_images=IMAGES, test_fine_labels=LABELS + 90, test_coarse_labels=LABELS)
    assert read_cifar("cifar100", "test", str(path)).labels.max() == 99
    assert read_cifar("cifar100_coarse", "test", str(path)).labels.max() == 9
    with pytest.raises(UserError, match="holds no test_labels, but test_images, test_fine_labels"):
        read_cifar("cifar10", "test", str(path))


GOOD = {"test_images": IMAGES, "test_labels": LABELS}
BROKEN = {
    "no images": ({"test_labels": LABELS}, "holds no test_images, but test_labels"),
    "neither": ({"x": LABELS}, "holds no test_images and no test_labels, but x;"),
    "grey": ({**GOOD, "test_images": IMAGES[..., 0]}, r"is uint8 \[30, 32, 32\], expected uint8 \[N, 32, 32, 3\]"),
    "floats": ({**GOOD, "test_images": IMAGES / 255}, "is float64"),
    "none": ({"test_images": IMAGES[:0], "test_labels": LABELS[:0]}, r"is uint8 \[0, 32, 32, 3\]"),
    "fewer labels": ({**GOOD, "test_labels": LABELS[:29]}, r"is uint8 \[29\], expected whole numbers \[30\]"),
    "shares": ({**GOOD, "test_labels": LABELS / 2}, "is float64"),
    "eleventh class": ({**GOOD, "test_labels": LABELS + 1}, "goes from 1 to 10, expected 0 to 9"),
    "objects": ({**GOOD, "test_labels": np.array([{}] * 30, object)}, "its values are object"),
    "no array": ({**GOOD, "test_labels": b"hello"}, "test_labels in .* is no array"),
    "a lie": ({**GOOD, "test_labels": header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000,)}\n")},
              "0 bytes follow"),
    "negative": ({**GOOD, "test_labels": header("{'descr': '|u1', 'fortran_order': False, 'shape': (-1,)}\n", b"1")},
                 "its shape is"),
    "code": ({**GOOD, "test_labels": header("__import__('os').system('false')\n")}, "is no array"),
    "deep": ({**GOOD, "test_labels": header("(" * 9000)}, "is no array"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_such_archive_is_refused(kind: str, tmp_path: Path) -> None:
    members, words = BROKEN[kind]
    path = npz(tmp_path / "part.npz", **members)
    with pytest.raises(UserError, match=words) as caught:
        read_cifar("cifar10", "test", str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_other_files_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    path = npz(tmp_path / "part.npz", zipfile.ZIP_LZMA, **GOOD)
    whole = path.read_bytes()
    bzip2 = npz(tmp_path / "other.npz", zipfile.ZIP_BZIP2, **GOOD).read_bytes()
    for content in (b"", b"text", bzip2, whole[:-30], whole[:5000] + bytes(40) + whole[5040:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"part\.npz is not a whole NumPy|part\.npz holds no"):
            read_cifar("cifar10", "test", str(path))
    with pytest.raises(UserError, match="no such file"):
        read_cifar("cifar10", "test", str(tmp_path / "nothing.npz"))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_bomb_is_refused_without_its_memory(method: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The member's entry says that it is small; what its packed bytes unfold to is cut at that."""
    path = npz(tmp_path / "bomb.npz", method, test_images=bytes(64 << 20), test_labels=LABELS)
    assert path.stat().st_size < 200_000
    monkeypatch.setattr(arrays, "LIMIT", 1 << 20)
    forged = path.read_bytes().replace((64 << 20).to_bytes(4, "little"), (1 << 19).to_bytes(4, "little"))
    for content in (path.read_bytes(), forged):
        path.write_bytes(content)
        tracemalloc.start()
        try:
            with pytest.raises(UserError, match=r"more than 1 MiB|is not a whole|is no array"):
                read_cifar("cifar10", "test", str(path))
            assert tracemalloc.get_traced_memory()[1] < 80 << 20
        finally:
            tracemalloc.stop()


def test_the_label_is_measured(tmp_path: Path, cifar10_root: str) -> None:
    config = load_config("configs/convmixer_256_8_cifar10.yaml", [f"DATA.ROOT={cifar10_root}", "DATA.MAX_IMAGES=50"])
    assert origin.origin(config.DATA) == "CIFAR-10 (JPEG re-encoding)"
    test = read_cifar("cifar10", "test", cifar10_root)
    images = test.images[:1017].copy()
    part = npz(tmp_path / "part.npz", test_images=images, test_labels=test.labels[:1017].astype(np.uint8))
    config = load_config("configs/convmixer_256_8_cifar10.yaml", [f"DATA.ROOT={part}"])
    assert origin.origin(config.DATA) == "CIFAR-10 (JPEG re-encoding), 1,017 test images"
    images[1016, 31, 31, 2] ^= 1
    npz(part, test_images=images, test_labels=test.labels[:1017].astype(np.uint8))
    assert origin.origin(config.DATA) == "CIFAR-10 (pixels of unknown origin)"
