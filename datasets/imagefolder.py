"""Image files in folders, as ImageNet has them, decoded when they are asked for.

A root holds ``train/<class>/*`` and ``val/<class>/*``, or the lists ``train_list.txt`` and ``val_list.txt`` of
PaddleClas, or one of each. Labels are the positions of the class folders' names in sorted order, as in timm and
torchvision; a list has its own labels.
"""

from __future__ import annotations

import codecs
import functools
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from datasets import ImageDataset
from datasets.archives import contents, data_root, is_folder, read_file, search_paths
from datasets.files import SUFFIXES, FolderImages, find_images, listed
from errors import UserError, file_name, nearest, printable
from utils.fileio import reading

log = logging.getLogger("suite")

FOLDERS = {"train": ("train",), "test": ("val", "validation", "valid", "test")}
LISTS = {"train": ("train_list.txt",), "test": ("val_list.txt", "test_list.txt")}
LIST_LIMIT = 512 << 20  # bytes; ImageNet's training list has 60 million
MAX_CLASSES = 1_000_000
CHECKED = 1_000  # paths of a list that are looked up before they are needed
SHOWN = 5  # classes in a message


def read(split: str, root: str = "", may_download: bool = False, name: str = "imagefolder") -> ImageDataset:
    """Return the split ``train`` or ``test`` (the folder val, validation, valid or test) below ``root``, undecoded.

    ``root`` is the folder that holds the splits, or one above it, also ``data*`` as on AI Studio. One line of the log
    tells what was found and what was ignored. UserError where a split is missing, or its classes are not those of
    training, and where a class folder of training has no images.
    """
    folder = find_imagefolder(root)
    names = class_names(root)
    source = _source(folder, split)
    ignored: Counter[str] = Counter()
    if source is None:
        expected = " or ".join([f"{name}/<class>/" for name in FOLDERS[split]] + [LISTS[split][0]])
        raise UserError(f"{printable(folder, 300)} has no images to {'train on' if split == 'train' else 'evaluate'}"
                        f"{contents(folder)}: expected {expected}")
    if source.is_file():
        paths, labels = _read_list(source)
    else:
        paths, labels, ignored = _read_classes(folder, source, names, split)
    if labels.max() >= len(names):
        raise UserError(f"{printable(source, 300)}: label {labels.max()}, expected 0 to {len(names) - 1}, the classes "
                        "of training")
    _report(source, paths, labels, names, ignored)
    return ImageDataset(FolderImages(folder, paths), labels, names, "imagefolder", split)


def class_names(root: str = "", name: str = "imagefolder") -> tuple[str, ...]:
    """Return what the labels mean: the sorted class folders of training, or of evaluation where that is all there is.

    Of lists alone: the folders of their files where each label has one of its own, else the labels as they are.
    """
    folder = find_imagefolder(root)
    source = _source(folder, "train") or _source(folder, "test")
    return _names_of_list(*_read_list(source)) if source.is_file() else tuple(_class_folders(source))


def find_imagefolder(root: str = "") -> Path:
    """Return the folder that holds the splits: the root, a ``data*`` in it, or one below these."""
    for path in search_paths(root):
        if path.is_dir():
            for folder in (path, *sorted(_folders(path))):
                if any(_source(folder, split) for split in FOLDERS):
                    return folder
    folder = data_root(root)
    raise UserError(f"no images found under {printable(folder, 300)}{contents(folder)}: expected the folders "
                    "train/<class>/ and val/<class>/, or train_list.txt and val_list.txt (DATA.ROOT)")


def _folders(folder: Path) -> Iterator[Path]:
    with reading(folder), os.scandir(folder) as entries:
        yield from (Path(entry) for entry in entries if is_folder(entry))


def _class_folders(folder: Path) -> dict[str, Path]:
    """Return the class folders of a split by their names as text, sorted."""
    found: dict[str, Path] = {}
    for path in _folders(folder):
        name = printable(file_name(path.name), 255)
        if name in found:
            raise UserError(f"{printable(folder, 300)} holds two folders that are both called {name}, in different "
                            "encodings: merge them")
        found[name] = path
    return dict(sorted(found.items()))


def _source(folder: Path, split: str) -> Path | None:
    """Return the list of a split, else its folder where that has class folders."""
    for name in LISTS[split]:
        if (folder / name).is_file():
            return folder / name
    for name in FOLDERS[split]:
        if (folder / name).is_dir() and next(_folders(folder / name), None):
            return folder / name
    return None


def _read_classes(root: Path, folder: Path, names: tuple[str, ...], split: str
                  ) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
    """Return (paths below ``root``, labels, counts of ignored files) of a split, classes and files in sorted order."""
    label_of = {name: label for label, name in enumerate(names)}
    paths: list[bytes] = []
    labels: list[int] = []
    ignored: Counter[str] = Counter()
    for name, class_folder in _class_folders(folder).items():
        if name not in label_of:
            raise UserError(f"{printable(class_folder, 300)} is a class that training has not: expected folders of its "
                            f"{len(names)} classes{nearest(name, names)}")
        found, passed = find_images(class_folder)
        if not found and split == "train":
            raise UserError(f"{printable(class_folder, 300)} is a class without images{listed(passed)}; add files that "
                            f"end in {', '.join(SUFFIXES)}, or delete the folder, also in val")
        ignored += passed
        if found and len(names) == 1 and all("/" in path for path in found):
            inner = sorted({path.split("/")[0] for path in found})
            raise UserError(f"{printable(folder, 300)} holds one folder, {name}, with the folders "
                            f"{', '.join(map(printable, inner[:SHOWN]))}: if these are the classes, move them up into "
                            f"{folder.name}")
        below = os.fsencode(os.path.relpath(class_folder, root))
        paths += [below + b"/" + os.fsencode(path) for path in found]
        labels += [label_of[name]] * len(found)
    if stray := sum(name.lower().endswith(SUFFIXES) and name[0] != "." for name in os.listdir(folder)):
        ignored["images in no class folder"] = stray
    if not paths:
        raise UserError(f"{printable(folder, 300)} holds no images{listed(ignored)}: its class folders have no files "
                        f"that end in {', '.join(SUFFIXES)}")
    return np.array(paths), np.array(labels, np.int64), ignored


def _report(source: Path, paths: np.ndarray, labels: np.ndarray, names: tuple[str, ...], ignored: Counter[str]) -> None:
    """Log what was found, once for each finding: as a warning where classes have no images or files are ignored."""
    counts = np.bincount(labels, minlength=len(names))
    empty = [names[label] for label in np.flatnonzero(counts == 0)]
    text = f"{printable(source, 300)}: {len(names) - len(empty)} classes, {len(labels):,} images{listed(ignored)}"
    if twice := len(paths) - len(set(paths.tolist())):
        text += f"; {twice} of these are there twice"
    if empty:
        rest = f" and {len(empty) - SHOWN} more" if len(empty) > SHOWN else ""
        text += f"; no images of {len(empty)} classes: {', '.join(empty[:SHOWN])}{rest}"
        if counts[0] == 0 and len(empty) == 1 and source.suffix == ".txt":
            text += " (labels start at 0; do these start at 1?)"
    _log_once(logging.WARNING if empty or ignored or twice else logging.INFO, text)


@functools.cache
def _log_once(level: int, text: str) -> None:
    log.log(level, "%s", text)


# Lists ---------------------------------------------------------------------------------------------------------------


def _read_list(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return (paths, labels) of a list whose lines are a path below the list's folder, a space, and a label."""
    with reading(path):
        status = path.stat()
    return _parse_list(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4)
def _parse_list(path: Path, changed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    paths: list[bytes] = []
    labels: list[int] = []
    title, folder = printable(path, 300), os.fsencode(path.parent.absolute()) + b"/"
    for number, line in enumerate(_utf8(read_file(path, LIST_LIMIT, "expected a list of images")).splitlines(), 1):
        parts = line.rsplit(None, 1)
        if not parts:
            continue
        if len(parts) != 2 or not (parts[1].isdigit() and len(parts[1]) < 8 and int(parts[1]) < MAX_CLASSES):
            raise UserError(f"{title}, line {number}: found {_shown(line)}, expected an image's path and its label")
        name = re.sub(rb'^"(.*)"$', rb"\1", parts[0].strip()).replace(b"\\", b"/").removeprefix(b"./")
        name = name.removeprefix(folder)
        if name.startswith(b"/") or name[1:3] == b":/" or b".." in name.split(b"/") or b"\0" in name:
            raise UserError(f"{title}, line {number}: found the path {_shown(name)}, expected one below "
                            f"{printable(path.parent, 300)}")
        paths.append(name)
        labels.append(int(parts[1]))
    if not paths:
        raise UserError(f"{title} is empty, expected lines of an image's path and its label")
    return np.array(_as_on_disk(path, paths)), np.array(labels, np.int64)


def _utf8(content: bytes) -> bytes:
    """Return a text file's bytes without a byte order mark, UTF-16 (of PowerShell) as UTF-8."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace").encode()
    return content.removeprefix(codecs.BOM_UTF8)


def _respell(source: str, target: str, form: str) -> Callable[[bytes], bytes]:
    def respell(name: bytes) -> bytes:
        try:
            return unicodedata.normalize(form, name.decode(source)).encode(target)
        except UnicodeError:
            return name

    return respell


_SPELLINGS = (bytes, _respell("utf-8", "utf-8", "NFC"), _respell("utf-8", "utf-8", "NFD"),
              _respell("gb18030", "utf-8", "NFC"), _respell("utf-8", "gb18030", "NFC"))


def _as_on_disk(path: Path, names: list[bytes]) -> list[bytes]:
    """Return the paths of a list in the encoding and Unicode form of the files; UserError for one that is missing.

    The first path with characters beyond ASCII decides. At most `CHECKED` paths, evenly spaced, are looked up.
    """
    folder = os.fsencode(path.parent)
    beyond = next((name for name in names if not name.isascii()), b"")
    spelling = next((spell for spell in _SPELLINGS if os.path.exists(os.path.join(folder, spell(beyond)))), bytes)
    names = [spelling(name) for name in names]
    for index in np.linspace(0, len(names) - 1, min(len(names), CHECKED)).astype(int):
        if not os.path.lexists(os.path.join(folder, names[index])):
            raise UserError(f"{printable(path, 300)} names {_shown(names[index])}, but "
                            f"{printable(path.parent, 300)} has no such file{contents(path.parent)}")
    return names


def _names_of_list(paths: np.ndarray, labels: np.ndarray) -> tuple[str, ...]:
    names: dict[int, str] = {}
    for path, label in zip(paths, labels.tolist(), strict=True):
        if label not in names:
            names[label] = printable(file_name(os.fsdecode(os.path.basename(os.path.dirname(bytes(path))))), 255)
    plain = tuple(map(str, range(int(labels.max()) + 1)))
    ordered = tuple(names.get(label, "") for label in range(len(plain)))
    return ordered if all(ordered) and len(set(ordered)) == len(ordered) else plain


def _shown(text: bytes) -> str:
    return f"'{printable(os.fsdecode(text), 80)}'"
