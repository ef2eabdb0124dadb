"""MNIST: read from every place and form, and refused in one sentence where it is not MNIST."""

import gzip
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from cifar_files import pack

from datasets import mnist
from datasets.mnist import NAMES, parse_idx
from datasets.mnist import read as read_mnist
from errors import UserError

COUNTS = {"train": 60, "test": 20}


@pytest.fixture(autouse=True)
def small_and_without_network(monkeypatch):
    monkeypatch.setattr(mnist, "COUNTS", COUNTS)
    monkeypatch.setattr(mnist, "MIRRORS", ("http://127.0.0.1:9/",))
    monkeypatch.setenv("no_proxy", "*")


def idx(array: np.ndarray) -> bytes:
    """Return a uint8 array as an idx file, written as the format's page says."""
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def expected(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return grey images ``[N, 28, 28]`` and labels ``[N]``."""
    rng = np.random.default_rng(len(split))
    count = COUNTS[split]
    return rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), (np.arange(count) % 10).astype(np.uint8)


def files(packed: bool = True, dotted: bool = False) -> dict[str, bytes]:
    contents = {name: idx(part) for split in NAMES for name, part in zip(NAMES[split], expected(split), strict=True)}
    if dotted:
        contents = {name.replace("-idx", ".idx"): content for name, content in contents.items()}
    return {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in contents.items()} if packed else contents


def write(folder: Path, contents: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def assert_read(root: Path | str) -> None:
    for split in NAMES:
        dataset = read_mnist(split, str(root), may_download=False)
        images, labels = expected(split)
        np.testing.assert_array_equal(dataset.images, images[..., None].repeat(3, axis=-1), strict=True)
        np.testing.assert_array_equal(dataset.labels, labels)
        assert dataset.labels.dtype == np.int64 and dataset.class_names == tuple("0123456789")


@pytest.mark.parametrize(("place", "dotted", "packed"), [
    ("", False, True), ("mnist", True, False), ("MNIST/raw", False, False), ("data65", True, True),
    ("data65/mnist", False, True)])
def test_files_are_found(place, dotted, packed, tmp_path):
    write(tmp_path / place, files(packed, dotted))
    assert_read(tmp_path)


def write_tar(path: Path, contents: dict[str, bytes]) -> None:
    pack(path, {f"mnist/{name}": content for name, content in contents.items()})


def write_zip(path: Path, contents: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("MNIST/", b"")
        archive.writestr("__MACOSX/MNIST/train-images-idx3-ubyte.gz", b"of a Mac")
        for name, content in contents.items():
            archive.writestr(f"MNIST/{name}", content)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["mnist.zip", "MNIST.tar.gz", "mnist.tar"])
def test_archives_are_read(name, packed, tmp_path):
    folder = tmp_path / "data131"
    folder.mkdir()
    (write_zip if name.endswith(".zip") else write_tar)(folder / name, files(packed))
    assert_read(tmp_path)
    assert_read(folder / name)
    assert {path.name for path in tmp_path.rglob("*")} == {"data131", name}


IMAGES, LABELS = NAMES["train"]
GREY, NUMBERS = expected("train")
WRONG = {
    "cut": (IMAGES, idx(GREY)[:-1], "47,039 bytes of data, expected idx data of 60×28×28"),
    "too long": (IMAGES, idx(GREY) + b"\0", "more bytes of data"),
    "only a header": (IMAGES, idx(GREY)[:16], "holds 0 bytes"),
    "fewer images": (IMAGES, idx(GREY[:59]), "begins with 000008030000003b"),
    "labels for images": (IMAGES, idx(NUMBERS), "begins with 00000801"),
    "other numbers": (IMAGES, idx(GREY).replace(b"\0\0\x08", b"\0\0\x0d", 1), "begins with 00000d03"),
    "other sides": (IMAGES, idx(GREY.reshape(60, 14, 56)), "begins with 00000803"),
    "a page": (IMAGES, b"<html>log in</html>", "begins with 3c68746d6c"),
    "empty": (IMAGES, b"", "begins with nothing"),
    "a label too large": (LABELS, idx(np.where(NUMBERS == 9, 10, NUMBERS).astype(np.uint8)), "holds a 10, expected 0"),
    "one label less": (LABELS, idx(NUMBERS)[:-1], "59 bytes"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_other_content_is_refused(kind, tmp_path):
    packed = len(kind) % 2 == 0
    name, content, words = WRONG[kind]
    write(tmp_path, files(packed=False))
    (tmp_path / name).unlink()
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(UserError, match=words) as caught:
        read_mnist("train", str(tmp_path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "delete it" in str(caught.value)


def test_any_damage_to_a_packed_file_is_noticed(tmp_path):
    rng, whole = np.random.default_rng(1), gzip.compress(idx(GREY))
    for _ in range(60):
        place, bit = int(rng.integers(10, len(whole))), int(rng.integers(8))
        damaged = whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
        for content in (damaged, whole[:place]):
            with pytest.raises(UserError):
                parse_idx(content, GREY.shape, "file")


@pytest.mark.parametrize("kind", ["gz", "zip", "tar"])
def test_a_bomb_gets_no_memory(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "MEMBER_LIMIT", 4 << 20)
    monkeypatch.setattr(mnist, "ARCHIVE_LIMIT", 8 << 20)
    zeros = b"\0" * (24 << 20)
    if kind == "gz":
        write(tmp_path, {f"{IMAGES}.gz": gzip.compress(idx(GREY) + zeros, 1), f"{LABELS}.gz": b""})
    else:
        (write_zip if kind == "zip" else write_tar)(tmp_path / f"mnist.{kind}", {IMAGES: zeros, "else": zeros})
    del zeros
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"more bytes of data|more than 4 MiB"):
            read_mnist("train", str(tmp_path))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["../train-images-idx3-ubyte", "/train-images-idx3-ubyte"])
def test_paths_out_of_a_zip_are_refused(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "mnist.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), idx(GREY))
    with pytest.raises(UserError, match="holds the path"):
        read_mnist("train", str(tmp_path))


def test_a_zip_is_whole_or_refused(tmp_path):
    write_zip(tmp_path / "mnist.zip", files())
    whole, rng, refused = (tmp_path / "mnist.zip").read_bytes(), np.random.default_rng(3), 0
    for _ in range(40):
        place = int(rng.integers(len(whole)))
        (tmp_path / "mnist.zip").write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            dataset = read_mnist("train", str(tmp_path), may_download=False)
        except UserError:
            refused += 1
        else:
            np.testing.assert_array_equal(dataset.images[..., 0], GREY)
    assert refused > 10


def test_files_are_downloaded_into_a_folder_of_their_own(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(mnist, "download", lambda path, urls, sha256, size: asked.append((path, urls, sha256, size)) or
                        write(path.parent, {path.name: files()[path.name]}))
    read_mnist("test", str(tmp_path))
    assert asked[0] == (tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz",
                        ["http://127.0.0.1:9/t10k-images-idx3-ubyte.gz"], *reversed(mnist.FILES[NAMES["test"][0]]))
    read_mnist("test", str(tmp_path))
    assert len(asked) == 2


def test_an_archive_without_the_files_is_refused(tmp_path):
    (tmp_path / "other.zip").write_bytes(b"PK\x05\x06" + b"\0" * 18)
    with pytest.raises(UserError, match=r"not a whole MNIST archive|lacks"):
        read_mnist("train", str(tmp_path / "other.zip"))
