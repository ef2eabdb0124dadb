"""Archives from strangers: refused in one sentence, nothing executed, nothing written, nothing exhausted."""

import io
import os
import pickle
import random
import tarfile
import tracemalloc

import numpy as np
import pytest
from cifar_files import FOLDER, NAMES, batch, change_release, expected, write_archive, write_folder
from fuzz_cases import strangers

from datasets import cifar
from datasets.cifar import read as read_cifar
from errors import UserError


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
    for name in ("a.tar.gz", "a.tar"):
        write_archive(tmp_path / name, changes)
        np.testing.assert_array_equal(read_cifar("train", str(tmp_path / name)).images, expected("train")[0])


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
    "no pickle": (b"\x89PNG\r\n", "opcode PERSID"),
    "cut off": (batch(0)[:-100], "promises|stops"),
    **{f"{what} for a pickle": (content, "") for what, content in strangers().items()},
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


@pytest.mark.parametrize("content", [*strangers().values(), b"\x1f\x8b"], ids=lambda content: repr(content[:9]))
def test_files_that_are_no_archives_are_refused(content, tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(content)
    assert_refused(tmp_path / "a.tar.gz", "not a whole CIFAR-10 archive|lacks")


def test_a_batch_that_would_run_a_command(tmp_path):
    """Pickles of every other construction, and bombs, are tested with weights: the reader is the same."""
    canary = tmp_path / "canary"
    command = f"touch {canary}".encode()
    content = b"\x80\x02cos\nsystem\nX" + len(command).to_bytes(4, "little") + command + b"\x85R."
    for write in (write_archive, write_folder):
        write(tmp_path / write.__name__, {"data_batch_2": content})
        assert_refused(tmp_path / write.__name__, "data_batch_2 in .*names os.system")
    assert not canary.exists()
    pickle.loads(content)
    assert canary.exists()


def test_flipped_and_missing_bytes_of_an_archive_are_noticed(tmp_path):
    """Of an archive nothing is taken that is not what was packed: the gzip checksum covers every byte."""
    path, rng = tmp_path / "a.tar.gz", random.Random(1)
    write_archive(path)
    whole = path.read_bytes()
    for trial in range(60):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            del damaged[rng.randrange(len(whole)) :]
        else:
            damaged[rng.randrange(12, len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        os.utime(path, ns=(trial, trial))
        with pytest.raises(UserError):
            read_cifar("train", str(path))
