"""Image files in folders: found, labelled, held out, decoded when asked for; and how evaluation crops them."""

import os
import re
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
from paddle.vision.transforms import CenterCrop, Resize
from PIL import Image

from configs.load import dump_config, load_config
from datasets import build_dataset, class_names, files, stratified_holdout
from datasets.files import FolderImages
from datasets.imagefolder import read as read_imagefolder
from datasets.loader import EvalLoader
from datasets.transforms import ResizeCenterCrop, build_eval_transforms
from engine.data import check_classes, record_data, trained_classes
from engine.model import build_model
from engine.weights import save_weights
from errors import UserError
from processes import TINY, call
from utils.fileio import write_text

CLASSES = ("cat", "dog", "emu")


def pixels(number: int) -> np.ndarray:
    """Return the image of a number: of a size of its own, RGB uint8 ``[H, W, 3]``."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (20 + number % 7, 24 + number % 5, 3), dtype=np.uint8)


def save(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), cv2.cvtColor(pixels(number), cv2.COLOR_RGB2BGR))


@pytest.fixture
def root(tmp_path) -> Path:
    """Make train (6, 7, 8 images) and val (2 of each class) of numbered images, as PNG under various names."""
    number = 0
    for split, counts in (("train", (6, 7, 8)), ("val", (2, 2, 2))):
        for name, count in zip(CLASSES, counts, strict=True):
            for index in range(count):
                suffix = (".png", ".PNG", ".bmp")[index % 3]
                save(tmp_path / split / name / f"{name}_{index}{suffix}", number)
                number += 1
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    (tmp_path / "train/cat/._cat_0.png").write_text("of a Mac")
    (tmp_path / "train/.hidden").mkdir()
    return tmp_path


def section(root: Path, **changes):
    given = {"NAME": "imagefolder", "ROOT": root, "HOLDOUT": 0, **changes}
    return load_config(None, [f"DATA.{key}={value}" for key, value in given.items()]).DATA


def test_folders_are_read_in_sorted_order(root):
    train, test = (build_dataset(section(root), split) for split in ("train", "test"))
    assert train.class_names == test.class_names == class_names("imagefolder", str(root)) == CLASSES
    assert train.labels.tolist() == [0] * 6 + [1] * 7 + [2] * 8 and test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_equal([*train.images, *test.images], [pixels(index) for index in range(27)])
    np.testing.assert_equal([test.images[-1], *test.images[2:4]], [pixels(26), pixels(23), pixels(24)])
    with pytest.raises(IndexError):
        test.images[6]


def test_nothing_is_decoded_before_it_is_asked_for(root, monkeypatch):
    read = []
    monkeypatch.setattr(files, "read_image", lambda path: read.append(path) or pixels(0))
    dataset = build_dataset(section(root, HOLDOUT=6), "train")
    assert isinstance(dataset.images[:3], FolderImages) and len(dataset.images[:3]) == 3 and not read
    dataset.images[1]
    assert len(read) == 1


def test_holdout_is_that_of_images_in_memory(root):
    parts = {split: build_dataset(section(root, HOLDOUT=7), split) for split in ("train", "holdout")}
    everything = build_dataset(section(root), "train")
    kept, held_out = stratified_holdout(everything.labels, 7)
    for split, indices in (("train", kept), ("holdout", held_out)):
        assert len(parts[split]) == len(indices) and parts[split].split == split
        np.testing.assert_array_equal(parts[split].labels, everything.labels[indices])
        np.testing.assert_equal(list(parts[split].images), [everything.images[index] for index in indices])
    assert np.bincount(parts["holdout"].labels).tolist() == [2, 2, 3]


@pytest.mark.parametrize("place", ["data", "data/data89857", "data/data89857/imagenet", "data/imagenet"])
def test_splits_are_found_below_the_root(root, place, monkeypatch):
    home = root.parent / f"{root.name}_home"
    (home / place).mkdir(parents=True)
    for split in ("train", "val"):
        os.symlink(root / split, home / place / split)
    monkeypatch.chdir(home)
    assert len(read_imagefolder("train", "data")) == 21
    assert len(read_imagefolder("test", "")) == 6


def write_lists(root: Path) -> None:
    """Replace the folder val by flat files and a list, as ImageNet's validation images come."""
    lines = []
    for index, path in enumerate(sorted((root / "val").rglob("*.*"))):
        (root / "flat").mkdir(exist_ok=True)
        path.rename(root / "flat" / f"ILSVRC val {index}{path.suffix}")
        lines.append(f"flat/ILSVRC val {index}{path.suffix} {index // 2}")
    for folder in (root / "val").iterdir():
        folder.rmdir()
    (root / "val_list.txt").write_text("\r\n".join(lines) + "\n\n")


def test_a_flat_folder_with_a_list(root):
    write_lists(root)
    test = read_imagefolder("test", str(root))
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2] and test.class_names == CLASSES
    np.testing.assert_equal(list(test.images), [pixels(21 + index) for index in range(6)])


def test_two_lists_as_paddleclas_has_them(root):
    train = [f"{root}/train/cat/cat_0.png\t7", "train/emu/emu_0.png\t0"]
    (root / "train_list.txt").write_text("\n".join(train))
    (root / "val_list.txt").write_text("./val/cat/cat_0.png 7")
    dataset = read_imagefolder("train", str(root))
    assert dataset.labels.tolist() == [7, 0] and dataset.class_names == tuple("01234567")
    np.testing.assert_array_equal(dataset.images[1], pixels(13))
    np.testing.assert_array_equal(read_imagefolder("test", str(root)).images[0], pixels(21))
    (root / "train_list.txt").write_text("\n".join(f"train/{name}/{name}_0.png {label}"
                                                   for label, name in ((1, "cat"), (0, "emu"))))
    assert class_names("imagefolder", str(root)) == ("emu", "cat")


@pytest.mark.parametrize(("lines", "words"), [
    ("train/cat/cat_0.png", "line 1: found 'train/cat/cat_0.png', expected an image's path and its label"),
    ("train/cat/cat_0.png 0\nx.png cat", "line 2: found 'x.png cat'"),
    ("train/cat/cat_0.png -1", "line 1"),
    ("x.png 99999999999999999999", "line 1"),
    ("/etc/passwd 0", "found the path '/etc/passwd', expected one below"),
    ("C:\\set\\x.png 0", "found the path 'C:/set/x.png', expected one below"),
    ("train/../../x.png 0", "expected one below"),
    ("cat/cat_0.png 0", r"names 'cat/cat_0.png', but .* has no such file \(it holds train/, train_list.txt, val/\)"),
    ("\n", "is empty"),
    ("\xff\x00 1", "found the path"),
])
def test_strange_lists_are_refused(lines, words, root):
    (root / "train_list.txt").write_bytes(lines.encode("latin1"))
    with pytest.raises(UserError, match=words) as caught:
        read_imagefolder("train", str(root))
    assert "train_list.txt" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("encode", [
    lambda text: b"\xef\xbb\xbf" + text.encode(), lambda text: text.replace("/", "\\").encode(),
    lambda text: text.replace("\n", "\r\n").encode(), lambda text: text.replace("\n", "\r").encode("utf-16"),
    lambda text: re.sub("(.*) (.)", r'"\1" \2', text).encode(),
    lambda text: text.encode("gb18030"), lambda text: unicodedata.normalize("NFD", text).encode()])
def test_lists_of_other_systems(encode, root):
    """Of Windows: a byte order mark, backslashes, line ends, UTF-16, quotes, GBK; of a Mac: decomposed characters."""
    save(root / "train/猫é/猫 0.png", 5)
    (root / "train_list.txt").write_bytes(encode("train/猫é/猫 0.png 0\ntrain/emu/emu_0.png 1\n"))
    dataset = read_imagefolder("train", str(root))
    assert dataset.labels.tolist() == [0, 1] and dataset.class_names == ("猫é", "emu")
    np.testing.assert_array_equal(dataset.images[0], pixels(5))


def test_every_format_is_read_from_folders_and_other_files_are_counted(root, caplog):
    for index, suffix in enumerate(files.SUFFIXES):
        kind = {".jp": "JPEG", ".jf": "JPEG", ".ji": "JPEG", ".gi": "GIF", ".ti": "TIFF", ".we": "WEBP", ".pn": "PNG",
                ".bm": "BMP", ".di": "BMP"}.get("PPM" if suffix == ".pnm" else suffix[:3], "PPM")
        Image.fromarray(pixels(index)).save(root / f"train/dog/x{index}{suffix.upper()}", kind)
    for name in ("a.heic", "b.heic", "plain"):
        (root / "train/emu" / name).touch()
    save(root / "train/stray.png", 0)
    (root / "train/__MACOSX").mkdir()
    dataset = read_imagefolder("train", str(root))
    assert len(dataset) == 21 + len(files.SUFFIXES) and len([dataset.images[index] for index in range(len(dataset))])
    assert (f"{root}/train: 3 classes, 37 images; ignored: 2 .heic files, 1 .txt files, 1 files without suffix, "
            "1 images in no class folder") in caplog.text


def test_links_are_followed_and_loops_end(root, tmp_path_factory, caplog):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for index in range(3):
        save(elsewhere / f"deep/{index}.png", index)
    (root / "train/dog/more").symlink_to(elsewhere)
    (root / "train/dog/more/up").symlink_to(root / "train/dog")
    (root / "train/dog/self").symlink_to("self")
    (root / "train/dog/all").symlink_to(root)
    dataset = read_imagefolder("train", str(root))
    assert len(dataset) == 24 and "2 links to folders read already" in caplog.text
    np.testing.assert_array_equal(dataset.images[13], pixels(0))


def test_classes_without_images_are_reported(root, caplog):
    (root / "val/cat").rename(root / "cats")
    (root / "val/cat").mkdir()
    assert len(read_imagefolder("test", str(root))) == 4
    assert "2 classes, 4 images; no images of 1 classes: cat" in caplog.text
    (root / "train_list.txt").write_text("train/cat/cat_0.png 1\n" + 2 * "train/emu/emu_0.png 2\n")
    read_imagefolder("train", str(root))
    assert ("1 of these are there twice; no images of 1 classes: 0 (labels start at 0; do these start at 1?)"
            in caplog.text)
    (root / "train_list.txt").unlink()
    (root / "train/fox").mkdir()
    (root / "train/fox/x.heic").touch()
    with pytest.raises(UserError, match=r"fox is a class without images; ignored: 1 .heic files; add files that end"):
        read_imagefolder("train", str(root))
    for split in ("train", "val"):
        (root / "deep" / split).mkdir(parents=True)
        (root / split).rename(root / "deep" / split / "images")
    with pytest.raises(UserError, match=r"holds one folder, images, with the folders cat, dog, emu: .* move them up"):
        read_imagefolder("train", str(root / "deep"))


def test_names_in_other_encodings(root, tmp_path, caplog):
    """GBK (a Chinese Windows), Latin-1, and decomposed characters (a Mac) in one split, UTF-8 in the other."""
    for split, encodings in (("train", ("gbk", "latin1", "NFD")), ("val", ("utf-8", "latin1", "NFC"))):
        for old, new, encoding in zip(CLASSES, ("狗", "ñandú", "é"), encodings, strict=True):
            raw = (unicodedata.normalize(encoding, new).encode() if encoding[:2] == "NF" else new.encode(encoding))
            os.rename(root / split / old, os.path.join(os.fsencode(root / split), raw))
            (first, *_) = os.listdir(os.path.join(os.fsencode(root / split), raw))
            os.rename(os.path.join(os.fsencode(root / split), raw, first),
                      os.path.join(os.fsencode(root / split), raw, "狗".encode("gbk") + b".png"))
    train, test = (read_imagefolder(split, str(root)) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("\\xf1and\\xfa", "é", "狗") and len(test) == 6
    assert all(image.ndim == 3 for image in (train.images[index] for index in range(21)))
    record_data(tmp_path, train, resume=False)
    check_classes(tmp_path / "best_model.pdparams", test)
    train.images.path(0).write_bytes(b"")
    damaged = next(i for i in range(21) if "\udcb9" in train.images.path(i).name)
    train.images.path(damaged).write_bytes(b"")
    with pytest.raises(UserError, match=r"狗\.png: not a readable image"):
        train.images[damaged]


def test_damaged_images_are_named_in_the_background(root, caplog):
    images = read_imagefolder("test", str(root)).images
    images.path(3).write_bytes(b"\x89PNG")
    with files.damage_check(np.zeros((1, 2, 2, 3), np.uint8), images) as thread:
        thread.join()
    (message,) = [text for text in caplog.messages if text.startswith("damaged image")]
    assert message.startswith(f"damaged image: {images.path(3)}: not a readable image")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_colours_of_tiffs_with_alpha_are_those_of_pngs(mode, tmp_path):
    rgba = np.full((8, 6, 4), 200, np.uint8)
    rgba[..., 3] = 64
    picture = Image.fromarray(rgba).convert(mode)
    picture.save(tmp_path / "a.tif", compression="tiff_lzw")
    found = files.read_image(tmp_path / "a.tif")
    assert found.shape == (8, 6, 3) and abs(found.astype(int) - 200).max() == 0


def test_what_is_missing_is_named(root, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match=r"no images found under .*holds nothing.*train/<class>/ and val/<class>/"):
        read_imagefolder("train", str(empty))
    (empty / "train/a").mkdir(parents=True)
    with pytest.raises(UserError, match=r"train\): expected val/<class>/ or .* or val_list|it holds train/"):
        read_imagefolder("test", str(empty))
    save(root / "val/emus/x.png", 1)
    with pytest.raises(UserError, match=r"val/emus is a class that training has not.*3 classes \(nearest: emu\)"):
        read_imagefolder("test", str(root))
    write_lists(root)
    (root / "val_list.txt").write_text("train/cat/cat_0.png 3")
    with pytest.raises(UserError, match="label 3, expected 0 to 2, the classes of training"):
        read_imagefolder("test", str(root))
    for scheme in ("https", "S3", "file"):
        with pytest.raises(UserError, match=rf"{scheme}:/x/a.png: a URL; download the image first"):
            files.read_image(Path(f"{scheme}://x/a.png"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"no image", None])
def test_a_broken_image_ends_an_epoch_with_its_name(content, workers, root):
    path = root / "val/dog/dog_1.PNG"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    else:
        path.symlink_to(root / "nowhere.png")
    dataset = build_dataset(section(root), "test")
    loader = EvalLoader(dataset, build_eval_transforms(load_config(None).AUGMENT, 16), 2, workers)
    with pytest.raises(UserError, match=r"dog_1\.PNG: ") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(30, 40), (61, 37), (100, 100), (50, 333), (57, 57)])
def test_center_crop_is_that_of_paddle_on_pillow_images(height, width, interpolation):
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for size, share in ((32, 0.9), (32, 0.875), (33, 1.0), (50, 0.95)):
        scaled = Resize(int(size / share), interpolation)(Image.fromarray(image))
        expected = np.asarray(CenterCrop(size)(scaled))
        ours = ResizeCenterCrop((size, size), share, interpolation).apply(image)
        assert ours.shape == (size, size, 3)
        np.testing.assert_array_equal(ours, expected)


def test_center_crop_of_boxes_and_of_endless_images():
    image = np.random.default_rng(0).integers(0, 256, (90, 40, 3), dtype=np.uint8)
    for size in ((32, 64), (64, 32), (20, 20)):
        assert ResizeCenterCrop(size, 0.9).apply(image).shape == (*size, 3)
    np.testing.assert_array_equal(ResizeCenterCrop((90, 40), 1.0).apply(image), image)
    with pytest.raises(UserError, match="1×3000000 pixels is too long"):
        ResizeCenterCrop((224, 224), 0.9).apply(np.zeros((3_000_000, 1, 3), np.uint8))


def test_predictions_for_folders(root, tmp_path, monkeypatch):
    """The run's classes are known without its images; a CSV has every image, the grid the first ones."""
    run = tmp_path / "run"
    config = load_config("configs/quickstart.yaml", [*TINY, "MODEL.NUM_CLASSES=3", "DATA.NAME=imagefolder",
                                                     "DATA.ROOT=nowhere", "DATA.EVAL_BATCH_SIZE=5"])
    write_text(run / "config.yaml", dump_config(config))
    save_weights(run / "best_model.pdparams", build_model(config).state_dict())
    record_data(run, read_imagefolder("train", str(root)), resume=False)
    assert trained_classes(run / "best_model.pdparams") == CLASSES
    monkeypatch.setattr("tools.predict.SHOWN", 7)
    done = call("predict", "-w", run, root / "train", root / "val/emu/emu_0.png", "--out", tmp_path / "p.png")
    assert all(f"  {name} " in done.stdout for name in CLASSES), done.stderr
    assert "emu_" not in done.stdout and "the first 7 images" in done.stdout and "p.csv: 22 images" in done.stdout
    rows = (tmp_path / "p.csv").read_text().splitlines()
    assert len(rows) == 1 + 22 and rows[1].startswith(f"{root}/train/cat/cat_0.png,,")
    assert cv2.imread(str(tmp_path / "p.png")) is not None


def test_a_run_goes_on_with_the_same_images_only(root, tmp_path):
    weights = tmp_path / "best_model.pdparams"
    check_classes(weights, read_imagefolder("test", str(root)))  # outside of a run nothing is known
    record_data(tmp_path, read_imagefolder("train", str(root)), resume=False)
    record_data(tmp_path, read_imagefolder("train", str(root)), resume=True)
    check_classes(weights, read_imagefolder("test", str(root)))
    (root / "train/cat/cat_0.png").rename(root / "train/cat/first.png")
    with pytest.raises(UserError, match=r"dataset.json: --resume continues a run as it was.*checksum"):
        record_data(tmp_path, read_imagefolder("train", str(root)), resume=True)
    (root / "train/cat/first.png").unlink()
    with pytest.raises(UserError, match="with 21 training images, but imagefolder now has 20"):
        record_data(tmp_path, read_imagefolder("train", str(root)), resume=True)
    for split in ("train", "val"):
        (root / split / "dog").rename(root / split / "ant")
    for action in (lambda: record_data(tmp_path, read_imagefolder("train", str(root)), resume=True),
                   lambda: check_classes(weights, read_imagefolder("test", str(root)))):
        with pytest.raises(UserError, match="trained on 'cat' as class 0, not 'ant' as imagefolder has now"):
            action()
    for split in ("train", "val"):
        (root / split / "ant").rename(root / split / "dog")
        (root / split / "fox").mkdir()
    with pytest.raises(UserError, match="trained on 3 classes, not 4"):
        check_classes(weights, read_imagefolder("test", str(root)))
    for content in ("[]", "{", '{"classes": [1]}'):
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(UserError, match=r"dataset.json"):
            check_classes(weights, read_imagefolder("test", str(root)))
