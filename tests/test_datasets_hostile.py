"""Archives from strangers: refused in one sentence, nothing executed, nothing written, nothing exhausted."""

from __future__ import annotations

import builtins
import contextlib
import gzip
import io
import os
import pickle
import random
import tarfile
import tracemalloc

import numpy as np
import pytest
from cifar_files import FOLDER, NAMES, batch, change_release, expected, write_archive, write_folder

from datasets import cifar
from datasets.cifar import read as read_cifar
from errors import UserError
from utils import pickles


@pytest.fixture(autouse=True)
def small_batches_and_no_network(monkeypatch):
    change_release(monkeypatch, batch_images={"train": 20, "test": 20}, mirrors=("http://127.0.0.1:9/none/",))


def assert_refused(root, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_cifar("train", str(root))
    message = str(caught.value)
    assert str(root) in message and "delete it" in message and "\n" not in message and len(message) < 600


def special(name: str, **fields: object):
    """Return what adds a member of another kind to an archive."""
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return lambda archive: archive.addfile(info, io.BytesIO(b"\0" * info.size))


STRANGE_MEMBERS = {
    "up": (special("../../etc/passwd", size=4), "the path '../../etc/passwd'"),
    "up inside": (special(f"{FOLDER}/../../x", size=4), "the path"),
    "absolute": (special("/etc/passwd", size=4), "the path '/etc/passwd'"),
    "symbolic link": (special(f"{FOLDER}/data_batch_1", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link"),
    "hard link": (special(f"{FOLDER}/data_batch_1", type=tarfile.LNKTYPE, linkname="/etc/passwd"), "a link"),
    "device": (special(f"{FOLDER}/zero", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "a device"),
    "fifo": (special(f"{FOLDER}/pipe", type=tarfile.FIFOTYPE), "a device"),
    "twice": (special(f"{FOLDER}/test_batch", size=4), "holds test_batch twice"),
    "long batch": (special(f"{FOLDER}/test_batch", size=65 << 20), "test_batch has more than 64 MiB"),
}


@pytest.mark.parametrize("kind", STRANGE_MEMBERS)
def test_strange_members_are_refused(kind, tmp_path):
    before, words = STRANGE_MEMBERS[kind]
    write_archive(tmp_path / "a.tar.gz", before=before)
    assert_refused(tmp_path / "a.tar.gz", words)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_a_bomb_is_refused_without_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "ARCHIVE_LIMIT", 40 << 20)
    write_archive(tmp_path / "a.tar.gz", before=special(f"{FOLDER}/zeros", size=60 << 20))
    tracemalloc.start()
    try:
        assert_refused(tmp_path / "a.tar.gz", "unpacks to more than 40 MiB")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_harmless_strangers_are_passed_over(tmp_path):
    write_archive(tmp_path / "a.tar.gz", {"README.txt": b"hello", "._data_batch_1": b"from a Mac"},
                  before=special(f"./{FOLDER}/", type=tarfile.DIRTYPE))
    np.testing.assert_array_equal(read_cifar("test", str(tmp_path / "a.tar.gz")).images, expected("test")[0])


def test_a_plain_tar_and_other_protocols_are_read(tmp_path):
    changes = {name: batch(seed, protocol) for name, seed, protocol in zip(NAMES["train"], range(5), (2, 3, 4, 2, 3),
                                                                           strict=True)}
    write_archive(tmp_path / "a.tar.gz", changes)
    (tmp_path / "a.tar").write_bytes(gzip.decompress((tmp_path / "a.tar.gz").read_bytes()))
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(read_cifar("train", str(path)).images, expected("train")[0])


PIXELS = np.zeros((20, 3072), np.uint8)
WRONG_BATCHES = {
    "too few images": (batch(0, data=PIXELS[:19]), r"uint8 \[19, 3072\], expected uint8 \[20, 3072\]"),
    "other pixels": (batch(0, data=PIXELS[:, :-1]), r"\[20, 3071\]"),
    "floats": (batch(0, data=PIXELS.astype(np.float32)), "data are float32"),
    "objects": (batch(0, data=np.array([{}, []], object)), "names numpy.dtype"),
    "pixels as text": (batch(0, data=PIXELS.tobytes()), "missing or no array"),
    "no pixels": (batch(0, data=None), "missing or no array"),
    "no labels": (batch(0, labels=None), "labels are not a list"),
    "too few labels": (batch(0, labels=[1] * 19), "labels are not a list of 20"),
    "a label too large": (batch(0, labels=[1] * 19 + [10]), "integers from 0 to 9"),
    "a negative label": (batch(0, labels=[1] * 19 + [-1]), "integers from 0 to 9"),
    "a text among the labels": (batch(0, labels=[1] * 19 + ["1"]), "integers from 0 to 9"),
    "a truth among the labels": (batch(0, labels=[1] * 19 + [True]), "integers from 0 to 9"),
    "a list": (pickle.dumps([1, 2], 2), "holds no dictionary"),
    "no pickle": (b"\x89PNG\r\n", "no opcode 137"),
    "empty": (b"", "stops making sense"),
    "cut off": (batch(0)[:-100], "promises|stops"),
}


@pytest.mark.parametrize("kind", WRONG_BATCHES)
@pytest.mark.parametrize("write", [write_archive, write_folder])
def test_wrong_batches_are_refused(kind, write, tmp_path):
    content, words = WRONG_BATCHES[kind]
    write(tmp_path / "a.tar.gz", {"data_batch_3": content})
    with pytest.raises(UserError, match=f"data_batch_3 in .*a.tar.gz.*{words}.*not a batch of CIFAR-10"):
        read_cifar("train", str(tmp_path / "a.tar.gz"))


@pytest.mark.parametrize("write", [write_archive, write_folder])
def test_missing_batches_are_named(write, tmp_path):
    root = tmp_path / "a.tar.gz"
    write(root, {"data_batch_1": None, "test_batch": None})
    assert_refused(root, "lacks data_batch_1, test_batch")


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b", b"<html></html>", os.urandom(4000), b"\0" * 4000,
                                     gzip.compress(b"nothing")])
def test_files_that_are_no_archives_are_refused(content, tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(content)
    assert_refused(tmp_path / "a.tar.gz", "not a whole CIFAR-10 archive|lacks")


class Evil:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil_pickles(canary) -> dict[str, bytes]:
    """Return pickles that would create the file ``canary``, each by another construction."""
    command, path = f"touch {canary}", str(canary).encode()
    program = f"open({str(canary)!r}, 'w')"
    string = b"X" + len(command).to_bytes(4, "little") + command.encode()
    short = len(path).to_bytes(1, "little")
    return {
        "reduce": pickle.dumps({b"data": Evil(os.system, command)}, 2),
        "eval": pickle.dumps({b"data": Evil(builtins.eval, program)}, 2),
        "getattr": pickle.dumps({b"data": Evil(getattr, Evil(__import__, "os"), "system")}, 2),
        "stack_global": pickle.dumps({b"data": Evil(os.system, command)}, 4),
        "protocol 0": pickle.dumps({b"data": Evil(os.system, command)}, 0),
        "inst": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + string + b"o.",
        "newobj": b"\x80\x02cbuiltins\nopen\n\x8c" + short + path + b"\x8c\x01w\x86\x81.",
        "build": b"\x80\x02cnumpy\nndarray\n}\x8c\x0c__setstate__cos\nsystem\nsb" + string + b"b.",
        "persistent": b"P" + command.encode() + b"\n.",
        "extension": b"\x80\x02\x82\x01" + string + b"\x85R.",
        "numpy's exec": b"\x80\x02cnumpy.testing._private.utils\nrunstring\n" + string + b"}\x86R.",
        "numpy's load": b"\x80\x02cnumpy.core.multiarray\nfromfile\n" + string + b"\x85R.",
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x13ndarray.__class__.x\x93.",
        "codec": b"\x80\x02c_codecs\nencode\n" + string + b"\x8c\x03hex\x86R.",
    }


@pytest.mark.parametrize("kind", evil_pickles("x"))
def test_evil_pickles_execute_nothing(kind, tmp_path):
    canary = tmp_path / "canary"
    content = evil_pickles(canary)[kind]
    write_archive(tmp_path / "a.tar.gz", {"data_batch_2": content})
    assert_refused(tmp_path / "a.tar.gz", "data_batch_2 in .*not a batch of CIFAR-10")
    assert not canary.exists()


def test_the_evil_pickles_are_evil(tmp_path):
    """Python's own reader runs them; otherwise the test above would show nothing."""
    for kind in ("reduce", "eval", "stack_global", "protocol 0", "inst", "obj"):
        canary = tmp_path / kind.replace(" ", "_")
        pickle.loads(evil_pickles(canary)[kind])
        assert canary.exists(), kind


HUNGRY = {
    "a large memo index": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a long text": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "a long byte string": b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"abc.",
    "a large byte array": b"\x80\x05\x96" + (1 << 36).to_bytes(8, "little") + b"abc.",
    "a large frame": b"\x80\x04\x95" + (1 << 40).to_bytes(8, "little") + b"}.",
    "deep tuples as a key": b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns.",
    "deep lists": b"\x80\x02}" + b"\x8c\x04data" + b"]" * 100_000 + b"a" * 99_999 + b"s.",
    "texts unfolding": b"\x80\x02}c_codecs\nencode\nq\x00X\x00\x00\x10\x00" + b"z" * (1 << 20)
    + b"q\x01\x8c\x06latin1\x86q\x02R" + b"h\x00h\x02R" * 5000 + b".",
    "a large shape": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"
    + b"cnumpy\ndtype\n\x8c\x02u1\x85R\x89\x43\x01atb.",
}


@pytest.mark.parametrize("kind", HUNGRY)
def test_hungry_pickles_get_no_memory(kind):
    tracemalloc.start()
    try:
        with contextlib.suppress(UserError):
            pickles.load(memoryview(HUNGRY[kind]), 0, "batch")
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_flipped_and_missing_bytes_of_an_archive_are_noticed(tmp_path):
    """Of an archive nothing is taken that is not what was packed: the gzip checksum covers every byte."""
    path, rng = tmp_path / "a.tar.gz", random.Random(1)
    write_archive(path)
    whole, refused = path.read_bytes(), 0
    for trial in range(150):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            del damaged[rng.randrange(len(whole)) :]
        else:
            damaged[rng.randrange(12, len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        os.utime(path, ns=(trial, trial))
        with pytest.raises(UserError):
            read_cifar("train", str(path))
        refused += 1
    assert refused == 150


def test_damaged_batches_are_refused_or_whole():
    """A loose batch has no checksum: a flipped bit is refused, or it is a wrong pixel, label or name."""
    content, rng, refused = batch(0), random.Random(2), 0
    for _ in range(600):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 4))):
            place = rng.choice((rng.randrange(len(content)), rng.randrange(200), -rng.randrange(1, 300)))
            damaged[place] = rng.randrange(256)
        try:
            images, labels = cifar._read_batch(bytes(damaged), cifar.RELEASES["cifar10"], 20, "batch", "remedy")
        except UserError:
            refused += 1
        else:
            assert images.shape == (20, 32, 32, 3) and images.dtype == np.uint8
            assert labels.shape == (20,) and labels.min() >= 0 and labels.max() < 10
    assert 100 < refused < 590
