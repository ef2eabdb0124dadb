"""Where images come from: the digits, CIFAR-10 in every place and form, and splits."""

import zlib

import numpy as np
import pytest
from cifar_files import batch, change_release, expected, write_archive, write_folder
from paddle.vision.datasets import Cifar10
from sklearn.datasets import load_digits

import datasets
from configs.load import load_config
from datasets import build_dataset, cifar, class_names, origin, pixels_sha256, stratified_holdout
from datasets.cifar import read as read_cifar
from datasets.digits import read as read_digits
from errors import UserError


def data_section(**changes):
    return load_config(None, [f"DATA.{key}={value}" for key, value in changes.items()]).DATA


def test_digits_are_scikit_learns():
    train, test = read_digits("train"), read_digits("test")
    assert (len(train), len(test)) == (1437, 360)
    source = load_digits()
    pixels = np.concatenate([train.images, test.images])
    assert pixels.shape == (1797, 8, 8, 3) and pixels.dtype == np.uint8 and pixels.max() == 255
    assert (pixels == pixels[..., :1]).all()
    lines = {(image.tobytes(), int(label)) for image, label in zip(source.images, source.target, strict=True)}
    back = np.round(pixels[..., 0] * (16 / 255))
    labels = np.concatenate([train.labels, test.labels])
    assert {(image.tobytes(), int(label)) for image, label in zip(back, labels, strict=True)} == lines
    assert np.bincount(test.labels).min() >= 34 and np.bincount(test.labels).max() <= 37
    assert class_names("digits") == train.class_names == tuple("0123456789")


def test_holdout_is_disjoint_balanced_and_the_same_everywhere():
    labels = np.repeat(np.arange(10), 5000)
    np.random.seed(3)
    kept, held_out = stratified_holdout(labels, 5000)
    assert len(kept) == 45_000 and len(np.union1d(kept, held_out)) == 50_000
    assert np.bincount(labels[held_out]).tolist() == [500] * 10
    assert zlib.crc32(held_out.astype("<i8").tobytes()) == 2006803172
    for count in (1, 7, 19):
        assert len(stratified_holdout(labels, count)[1]) == count
    uneven = np.array([0] * 90 + [1] * 9 + [2])
    assert np.bincount(uneven[stratified_holdout(uneven, 20)[1]], minlength=3).tolist() == [18, 2, 0]


def test_splits_of_the_digits():
    parts = [build_dataset(data_section(NAME="digits", HOLDOUT=180), split) for split in ("train", "holdout", "test")]
    assert [len(part) for part in parts] == [1257, 180, 360]
    assert [part.split for part in parts] == ["train", "holdout", "test"]
    everything = np.concatenate([part.images for part in parts])
    assert len(np.unique(everything, axis=0)) == len(np.unique(np.concatenate([read_digits("train").images,
                                                                                read_digits("test").images]), axis=0))
    assert len(build_dataset(data_section(NAME="digits", HOLDOUT=0), "train")) == 1437


def test_a_trial_has_fewer_images_of_every_class():
    splits = ("train", "holdout", "test")
    few = [build_dataset(data_section(NAME="digits", HOLDOUT=180, MAX_IMAGES=100), split) for split in splits]
    assert [len(part) for part in few] == [100, 100, 100] and [part.split for part in few] == list(splits)
    assert all(9 <= count <= 11 for part in few for count in np.bincount(part.labels, minlength=10))
    whole = [build_dataset(data_section(NAME="digits", HOLDOUT=180), split) for split in splits]
    for part, full in zip(few, whole, strict=True):
        known = {image.tobytes(): label for image, label in zip(full.images, full.labels, strict=True)}
        assert [known[image.tobytes()] for image in part.images] == part.labels.tolist()
    assert len(build_dataset(data_section(NAME="digits", HOLDOUT=180, MAX_IMAGES=200), "holdout")) == 180


@pytest.mark.parametrize(("count", "split", "words"), [
    (5000, "train", "HOLDOUT is 5000.*1 to 1,427"), (0, "holdout", "HOLDOUT is 0.*selection is then on 'test'")])
def test_holdouts_that_cannot_be_made_are_refused(count, split, words):
    with pytest.raises(UserError, match=words):
        build_dataset(data_section(NAME="digits", HOLDOUT=count), split)


def test_cifar10_is_what_paddle_reads(cifar10_root):
    test, train = read_cifar("test", cifar10_root), read_cifar("train", cifar10_root)
    reference = Cifar10(str(cifar.find_cifar("cifar10", cifar10_root)), mode="test", backend="cv2")
    np.testing.assert_array_equal(test.labels, [label for _, label in reference.data])
    pixels = np.stack([pixels for pixels, _ in reference.data]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(test.images.transpose(0, 3, 1, 2), pixels)
    for dataset, count in ((train, 50_000), (test, 10_000)):
        assert dataset.images.shape == (count, 32, 32, 3) and dataset.images.dtype == np.uint8
        assert dataset.labels.dtype == np.int64 and np.bincount(dataset.labels).tolist() == [count // 10] * 10
    assert train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]  # the official order
    means = train.images.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=0.001)  # red, green, blue as published
    assert pixels_sha256(test) == datasets.OFFICIAL


@pytest.fixture
def small(monkeypatch):
    """Make a batch 20 images, so that whole archives are small."""
    change_release(monkeypatch, batch_images={"train": 20, "test": 20})


ARCHIVE, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
PLACES = {  # where the data are below the home folder, and DATA.ROOT
    ARCHIVE: ("~", f"~/{ARCHIVE}"),
    f"set/{ARCHIVE}": ("~/set", "set"),
    f"up/data152754/{ARCHIVE}": ("~/up",),  # AI Studio
    f"data/data9/{ARCHIVE}": ("", "data"),
    f"up/{FOLDER}/": ("~/up", f"~/up/{FOLDER}"),
    f"up/cifar-10-python/{FOLDER}/": ("~/up",),  # unpacked into a folder of its own
    f"up/{FOLDER}/{FOLDER}/": ("~/up",),  # into one of its name
    "up/cifar-10-python (1).tar.gz": ("~/up",),  # a browser's second download
    "up/cifar-10-python.tar": ("~/up",),  # Safari unpacks
    f".keras/datasets/cifar-10-batches-py-target/{FOLDER}/": ("", "~/.keras/datasets"),
    ".keras/datasets/cifar-10-batches-py-target_archive": ("data",),
    f".cache/paddle/dataset/cifar/{ARCHIVE}": ("data",),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.usefixtures("small")
def test_cifar10_is_found(place, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path if "set" in PLACES[place] else tmp_path / "work")
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    if place.endswith("/"):
        write_folder(path)
    else:
        write_archive(path)
    for root in PLACES[place]:
        for split in ("train", "test"):
            dataset = read_cifar(split, root, may_download=False)
            images, labels = expected(split)
            np.testing.assert_array_equal(dataset.images, images)
            np.testing.assert_array_equal(dataset.labels, labels)


@pytest.mark.usefixtures("small")
def test_what_is_there_instead_is_named(tmp_path):
    write_archive(tmp_path / f"{ARCHIVE}.part")  # a download that is not finished
    (tmp_path / "cifar10.rar").touch()
    (tmp_path / "images").mkdir()
    words = r"no cifar-10-python.tar.gz .* \(it holds .*\.part, cifar10.rar, images/\): put it at"
    with pytest.raises(UserError, match=words):
        read_cifar("train", str(tmp_path), may_download=False)


@pytest.mark.usefixtures("small")
def test_a_replaced_archive_is_read_again_and_pixels_are_labelled(tmp_path, monkeypatch):
    path = tmp_path / ARCHIVE
    write_archive(path)
    first = read_cifar("test", str(path))
    section = data_section(ROOT=str(path), MAX_IMAGES=5)
    assert origin(section) == "CIFAR-10 (unofficial pixels)"
    monkeypatch.setattr(datasets, "OFFICIAL", pixels_sha256(first))
    assert origin(section) == "CIFAR-10" and origin(data_section(NAME="digits")) == "digits"
    write_archive(path, {"test_batch": batch(77)})
    assert (read_cifar("test", str(path)).images != first.images).any()
    assert origin(section) == "CIFAR-10 (unofficial pixels)"
