"""CIFAR-100 by its fine and its coarse labels, through the reader of CIFAR-10."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from cifar_files import change_release, pack
from paddle.vision.datasets import Cifar100

from datasets import class_names
from datasets.cifar import read
from errors import UserError

COUNTS = {"train": 300, "test": 100}
ARCHIVE = "cifar-100-python.tar.gz"


@pytest.fixture(autouse=True)
def small_and_without_network(monkeypatch):
    for name in ("cifar100", "cifar100_coarse"):
        change_release(monkeypatch, name, batch_images=COUNTS, mirrors=("http://127.0.0.1:9/",))


def arrays(split: str) -> dict[str, np.ndarray]:
    """Return images ``[N, 32, 32, 3]`` and both labels ``[N]`` of a split."""
    rng, count = np.random.default_rng(len(split)), COUNTS[split]
    fine = rng.permutation(np.arange(count) % 100)
    return {"images": rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), "fine": fine, "coarse": fine * 7 % 20}


def write_archive(path: Path, **changes: object) -> None:
    """Write an archive, pickled as Python 2 did; ``changes`` are keys of ``train``."""
    contents = {"meta": {b"fine_label_names": [b"apple"], b"coarse_label_names": [b"fish"]}}
    for split in COUNTS:
        parts = arrays(split)
        contents[split] = {
            b"filenames": [b"a_s_000001.png"] * COUNTS[split], b"batch_label": b"training batch 1 of 1",
            b"fine_labels": parts["fine"].tolist(), b"coarse_labels": parts["coarse"].tolist(),
            b"data": parts["images"].transpose(0, 3, 1, 2).reshape(-1, 3072),
        }  # fmt: skip
    contents["train"].update({key.encode(): value for key, value in changes.items()})
    pack(path, {f"cifar-100-python/{name}": pickle.dumps(content, 2) for name, content in contents.items()})


def test_both_labels_are_read_as_paddle_reads_the_fine_ones(tmp_path):
    write_archive(tmp_path / ARCHIVE)
    for split in COUNTS:
        for name, labels, classes in (("cifar100", "fine", 100), ("cifar100_coarse", "coarse", 20)):
            dataset = read(split, str(tmp_path), may_download=False, name=name)
            np.testing.assert_array_equal(dataset.images, arrays(split)["images"])
            np.testing.assert_array_equal(dataset.labels, arrays(split)[labels])
            assert (dataset.name, dataset.split, len(dataset.class_names)) == (name, split, classes)
        theirs = Cifar100(str(tmp_path / ARCHIVE), mode=split, backend="cv2")
        assert [label for _, label in theirs.data] == arrays(split)["fine"].tolist()
        pixels = np.stack([pixels for pixels, _ in theirs.data]).reshape(-1, 3, 32, 32)
        np.testing.assert_array_equal(dataset.images.transpose(0, 3, 1, 2), pixels)


def test_names_are_in_the_official_order():
    fine, coarse = class_names("cifar100"), class_names("cifar100_coarse")
    assert len(set(fine)) == 100 and len(set(coarse)) == 20
    assert list(fine) == sorted(fine) and list(coarse) == sorted(coarse)
    assert (fine[0], fine[52], fine[99]) == ("apple", "oak_tree", "worm")  # between them every name is in order
    assert (coarse[0], coarse[13], coarse[19]) == ("aquatic_mammals", "non-insect_invertebrates", "vehicles_2")


def test_wrong_labels_are_refused(tmp_path):
    """All else is as for CIFAR-10, in test_datasets_hostile.py."""
    write_archive(tmp_path / ARCHIVE, fine_labels=[0] * 299 + [100])
    with pytest.raises(UserError, match=r"train in .* fine labels are not all integers from 0 to 99.* of CIFAR-100: "):
        read("test", str(tmp_path), name="cifar100")


def test_the_two_data_sets_are_not_mistaken_for_each_other(tmp_path):
    write_archive(tmp_path / ARCHIVE)
    with pytest.raises(UserError, match=r"is not CIFAR-10: it lacks data_batch_1"):
        read("train", str(tmp_path / ARCHIVE))
    with pytest.raises(UserError, match=r"no cifar-10-python.tar.gz or cifar-10-batches-py found"):
        read("train", str(tmp_path), may_download=False)
