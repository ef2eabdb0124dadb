"""Where images come from: the digits, CIFAR-10 in every place and form, splits, and downloads."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import socket
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from cifar_files import batch, change_release, expected, write_archive, write_folder

from configs.schema import default_config
from datasets import build_dataset, cifar, class_names
from datasets import download as download_module
from datasets.cifar import read as read_cifar
from datasets.dataset import stratified_holdout
from datasets.digits import read as read_digits
from datasets.download import download
from errors import UserError

CLOSED = "http://127.0.0.1:9"  # nothing listens on the discard port


def data_section(**changes):
    node = default_config().DATA
    for key, value in changes.items():
        node[key] = value
    return node


@pytest.fixture
def offline(monkeypatch):
    """Send every request to a closed port."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, CLOSED)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

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


@pytest.mark.parametrize(
    ("changes", "split", "words"),
    [
        ({"NAME": "cifar"}, "train", "'cifar'.*nearest: cifar10"),
        ({"NAME": "digits"}, "trian", "'trian'.*nearest: train"),
        ({"NAME": "digits", "HOLDOUT": 5000}, "train", "HOLDOUT is 5000.*1 to 1,427"),
        ({"NAME": "digits", "HOLDOUT": 0}, "holdout", "HOLDOUT is 0.*selection is then on 'test'"),
    ],
)
def test_wrong_names_and_sizes_are_told(changes, split, words):
    with pytest.raises(UserError, match=words):
        build_dataset(data_section(**changes), split)


def test_cifar10_is_what_paddle_reads(cifar10_root):
    from paddle.vision.datasets import Cifar10

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


def test_cifar10_splits(cifar10_root):
    parts = {split: build_dataset(data_section(ROOT=cifar10_root), split) for split in ("train", "holdout", "test")}
    assert [len(part) for part in parts.values()] == [45_000, 5_000, 10_000]
    assert np.bincount(parts["holdout"].labels).tolist() == [500] * 10
    everything = read_cifar("train", cifar10_root)
    kept, held_out = stratified_holdout(everything.labels, 5000)
    np.testing.assert_array_equal(parts["train"].images, everything.images[kept])
    np.testing.assert_array_equal(parts["holdout"].images, everything.images[held_out])


@pytest.fixture
def small(monkeypatch):
    """Make a batch 20 images, so that whole archives are small."""
    change_release(monkeypatch, batch_images={"train": 20, "test": 20})


@pytest.mark.parametrize("place", ["", "cifar-10-python.tar.gz", "up/data152754", "up/cifar-10-batches-py"])
@pytest.mark.usefixtures("small", "offline")
def test_cifar10_is_found_packed_and_unpacked(place, tmp_path):
    folder = tmp_path / place
    folder = folder.parent if folder.suffix else folder
    folder.mkdir(parents=True, exist_ok=True)
    if folder.name == "cifar-10-batches-py":
        write_folder(folder)
    else:
        write_archive(folder / "cifar-10-python.tar.gz")
    root = tmp_path / place if not place.startswith("up") else tmp_path / "up"
    for named in {root, folder}:
        dataset = read_cifar("train", str(named), may_download=False)
        images, labels = expected("train")
        np.testing.assert_array_equal(dataset.images, images)
        np.testing.assert_array_equal(dataset.labels, labels)


@pytest.mark.usefixtures("small", "offline")
def test_cifar10_is_found_in_the_home_of_ai_studio(tmp_path, monkeypatch):
    (tmp_path / "home/data/data9").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    write_archive(tmp_path / "home/data/data9/cifar-10-python.tar.gz")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    assert len(read_cifar("test", "data", may_download=False)) == 20


@pytest.mark.usefixtures("small")
def test_a_replaced_archive_is_read_again(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    write_archive(path)
    first = read_cifar("test", str(path))
    write_archive(path, {"test_batch": batch(77)})
    assert (read_cifar("test", str(path)).images != first.images).any()


@pytest.mark.usefixtures("offline")
def test_without_a_network_one_sentence_says_where_to_put_the_file(tmp_path):
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        read_cifar("train", str(tmp_path / "sets"))
    message = str(caught.value)
    assert time.monotonic() - start < 10
    assert str(tmp_path / "sets" / "cifar-10-python.tar.gz") in message and "\n" not in message
    assert all(url in message for url in cifar.RELEASES["cifar10"].urls) and "DATA.ROOT" in message
    assert list((tmp_path / "sets").iterdir()) == []
    with pytest.raises(UserError, match=r"DATA\.DOWNLOAD"):
        read_cifar("train", str(tmp_path / "sets"), may_download=False)
    with pytest.raises(UserError, match="no such file"):
        read_cifar("train", str(tmp_path / "missing.tar.gz"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot be written"):
        read_cifar("train", str(tmp_path / "file" / "below"))


CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Mirror(http.server.BaseHTTPRequestHandler):
    """Answers by path: the file, or one of the ways in which a mirror fails."""

    def do_GET(self) -> None:
        self.path = self.path.partition("?")[0]
        if self.path == "/absent":
            self.send_error(404)
            return
        bodies = {"/damaged": CONTENT[:-1] + b"!", "/page": b"<html>please log in</html>", "/endless": CONTENT * 3}
        body = bodies.get(self.path, CONTENT)
        self.send_response(200)
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            if self.path == "/broken":
                self.wfile.write(body[:1000])
                self.connection.shutdown(socket.SHUT_RDWR)
            elif self.path == "/silent":
                self.wfile.write(body[:1000])
                self.wfile.flush()
                time.sleep(2)
            else:
                self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def mirror():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download_module, "TIMEOUT_SECONDS", 0.5)


@pytest.mark.parametrize(
    ("bad", "answer"),
    [
        ("absent", "Not Found"),
        ("damaged", "with sha256"),
        ("page", "gave 26 of 1,024,000 bytes"),
        ("endless", "gave more than 1,024,000 bytes"),
        ("broken", "1,000 of 1,024,000 bytes"),
        ("silent", "timed out"),
    ],
)
@pytest.mark.usefixtures("direct")
def test_the_next_mirror_follows_a_bad_one(bad, answer, mirror, tmp_path, capsys):
    path = tmp_path / "new" / "file.bin"
    with pytest.raises(UserError, match=answer) as caught:
        download(path, [f"{mirror}/{bad}", f"{CLOSED}/x"], SHA256, len(CONTENT))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert list(path.parent.iterdir()) == []
    download(path, [f"{mirror}/{bad}", f"{mirror}/good"], SHA256, len(CONTENT))
    assert path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]
    assert "1.0 of 1.0 MB" in capsys.readouterr().err  # a plain line: no terminal here


@pytest.mark.usefixtures("direct")
def test_an_interrupted_download_leaves_nothing(mirror, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(download_module._Progress, "advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download(tmp_path / "file.bin", [f"{mirror}/good"], SHA256, len(CONTENT))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("direct", "small")
def test_a_downloaded_archive_is_read(mirror, tmp_path, monkeypatch):
    archive = tmp_path / "served.tar.gz"
    write_archive(archive)
    content = archive.read_bytes()
    change_release(monkeypatch, mirrors=(f"{mirror}/damaged?", f"{mirror}/good?"), size=len(content),
                   sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(globals(), "CONTENT", content)
    root = tmp_path / "root"
    for _ in range(2):  # the second time from the file
        assert len(build_dataset(data_section(ROOT=str(root), HOLDOUT=10), "train")) == 90
        change_release(monkeypatch, mirrors=())
    assert [Path(entry).name for entry in root.iterdir()] == ["cifar-10-python.tar.gz"]
