"""CIFAR-100 by its fine and its coarse labels, through the reader of CIFAR-10."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from cifar_files import change_release

from configs.schema import default_config
from datasets import build_dataset, class_names
from datasets.cifar import read as read_cifar
from errors import UserError

COUNTS = {"train": 300, "test": 100}
FOLDER = "cifar-100-python"


@pytest.fixture(autouse=True)
def small_and_without_network(monkeypatch):
    for name in ("cifar100", "cifar100_coarse"):
        change_release(monkeypatch, name, batch_images=COUNTS, mirrors=("http://127.0.0.1:9/",))


def arrays(split: str) -> dict[str, np.ndarray]:
    """Return images ``[N, 32, 32, 3]`` and both labels ``[N]`` of a split."""
    rng, count = np.random.default_rng(len(split)), COUNTS[split]
    fine = rng.permutation(np.arange(count) % 100)
    return {"images": rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), "fine": fine, "coarse": fine * 7 % 20}


def members(**changes: object) -> dict[str, bytes]:
    """Return the files of an archive, pickled as Python 2 did; ``changes`` are keys of ``train``."""
    contents = {"meta": {b"fine_label_names": [b"apple"], b"coarse_label_names": [b"fish"]}}
    for split in COUNTS:
        parts = arrays(split)
        contents[split] = {
            b"filenames": [b"a_s_000001.png"] * COUNTS[split], b"batch_label": b"training batch 1 of 1",
            b"fine_labels": parts["fine"].tolist(), b"coarse_labels": parts["coarse"].tolist(),
            b"data": parts["images"].transpose(0, 3, 1, 2).reshape(-1, 3072),
        }  # fmt: skip
    contents["train"].update({key.encode(): value for key, value in changes.items()})
    return {name: pickle.dumps(content, 2) for name, content in contents.items()}


def write_archive(path: Path, **changes: object) -> None:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in members(**changes).items():
            info = tarfile.TarInfo(f"{FOLDER}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(("name", "labels", "classes"), [("cifar100", "fine", 100), ("cifar100_coarse", "coarse", 20)])
@pytest.mark.parametrize("place", ["cifar-100-python.tar.gz", "data76994/cifar-100-python.tar.gz", FOLDER])
def test_both_labels_are_read(place, name, labels, classes, tmp_path):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    if path.suffix:
        write_archive(path)
    else:
        path.mkdir()
        for file, content in members().items():
            (path / file).write_bytes(content)
    for root in (tmp_path, path):
        for split in COUNTS:
            dataset = read_cifar(split, str(root), False, name)
            np.testing.assert_array_equal(dataset.images, arrays(split)["images"])
            np.testing.assert_array_equal(dataset.labels, arrays(split)[labels])
            assert (dataset.name, dataset.split, len(dataset.class_names)) == (name, split, classes)


def test_it_is_what_paddle_reads(tmp_path):
    from paddle.vision.datasets import Cifar100

    write_archive(tmp_path / "cifar-100-python.tar.gz")
    for split in COUNTS:
        ours = read_cifar(split, str(tmp_path), name="cifar100")
        theirs = Cifar100(str(tmp_path / "cifar-100-python.tar.gz"), mode=split, backend="cv2")
        np.testing.assert_array_equal(ours.labels, [label for _, label in theirs.data])
        pixels = np.stack([pixels for pixels, _ in theirs.data]).reshape(-1, 3, 32, 32)
        np.testing.assert_array_equal(ours.images.transpose(0, 3, 1, 2), pixels)


def test_holdout_has_every_class(tmp_path):
    write_archive(tmp_path / "cifar-100-python.tar.gz")
    data = default_config().DATA
    data.NAME, data.ROOT, data.HOLDOUT = "cifar100", str(tmp_path), 100
    parts = {split: build_dataset(data, split) for split in ("train", "holdout", "test")}
    assert [len(part) for part in parts.values()] == [200, 100, 100]
    assert np.bincount(parts["holdout"].labels).tolist() == [1] * 100
    data.NAME = "cifar100_coarse"
    assert len(build_dataset(data, "holdout")) == 100 and build_dataset(data, "holdout").labels.max() == 19


def test_names_are_in_the_official_order():
    fine, coarse = class_names("cifar100"), class_names("cifar100_coarse")
    assert len(set(fine)) == 100 and len(set(coarse)) == 20
    assert list(fine) == sorted(fine) and list(coarse) == sorted(coarse)
    assert (fine[0], fine[52], fine[99]) == ("apple", "oak_tree", "worm")  # between them every name stands in order
    assert (coarse[0], coarse[13], coarse[19]) == ("aquatic_mammals", "non-insect_invertebrates", "vehicles_2")


@pytest.mark.parametrize(("changes", "words"), [
    ({"fine_labels": [0] * 299}, "its fine labels are no list of 300"),
    ({"fine_labels": [0] * 299 + [100]}, "fine labels are not all integers from 0 to 99"),
    ({"data": np.zeros((300, 3071), np.uint8)}, r"shape \(300, 3071\), not \(300, 3072\)"),
    ({"data": os.system}, "asks for"),
])
def test_wrong_content_is_refused(changes, words, tmp_path):
    path = tmp_path / "cifar-100-python.tar.gz"
    write_archive(path, **changes)
    with pytest.raises(UserError, match=f"train in .* is no CIFAR-100 batch: .*{words}") as caught:
        read_cifar("test", str(tmp_path), name="cifar100")
    assert str(path) in str(caught.value) and "delete it" in str(caught.value)


def test_the_two_data_sets_are_not_mistaken_for_each_other(tmp_path):
    write_archive(tmp_path / "cifar-100-python.tar.gz")
    with pytest.raises(UserError, match=r"is not CIFAR-10: it lacks data_batch_1"):
        read_cifar("train", str(tmp_path / "cifar-100-python.tar.gz"))
    with pytest.raises(UserError, match=r"no cifar-10-python.tar.gz or cifar-10-batches-py found"):
        read_cifar("train", str(tmp_path), may_download=False)
