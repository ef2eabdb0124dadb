"""Image files in folders, as ImageNet has them, decoded when they are asked for.

A root holds ``train/<class>/*`` and ``val/<class>/*``, or the lists ``train_list.txt`` and ``val_list.txt`` of
PaddleClas, or one of each. Labels are the places of the class folders' names in sorted order, as in timm and
torchvision; a list brings its own labels.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from datasets.archives import read_file
from datasets.dataset import ImageDataset
from datasets.files import read_image
from datasets.places import places
from errors import UserError, nearest

FOLDERS = {"train": ("train",), "test": ("val", "validation", "test")}
LISTS = {"train": ("train_list.txt",), "test": ("val_list.txt", "test_list.txt")}
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
LIST_LIMIT = 512 << 20  # bytes; ImageNet's training list has 60 million
MAX_CLASSES = 1_000_000


class FolderImages(Sequence[np.ndarray]):
    """Images of files under a folder: each is read when it is indexed, uint8 ``[H, W, 3]`` of its own size.

    A slice or an array of indices gives the images there, unread. Paths take 1 byte a character: 1.3 million of
    ImageNet's some 60 MB.
    """

    def __init__(self, folder: Path, paths: np.ndarray) -> None:
        self.folder, self._paths = folder, paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray | FolderImages:
        """Return one image; UserError, naming the file, where it is missing or no image."""
        if isinstance(index, (slice, np.ndarray, list)):
            return FolderImages(self.folder, self._paths[index])
        return read_image(self.path(index))

    def path(self, index: int) -> Path:
        """Return the file of an image."""
        return self.folder / os.fsdecode(bytes(self._paths[index]))

    def checksum(self) -> int:
        """Return a number that changes with the paths and their order."""
        return zlib.crc32(self._paths.tobytes())


def read_imagefolder(split: str, root: str = "") -> ImageDataset:
    """Return the split ``train`` or ``test`` (the folder val, validation or test) below ``root``; nothing is decoded.

    ``root`` is the folder that holds the splits, or one above it: also ``data*`` as on AI Studio. UserError where
    there is none, a split is missing or empty, or its classes are not those of training.
    """
    folder = find_imagefolder(root)
    names = class_names(root)
    listed = _first_file(folder, LISTS[split])
    if listed:
        paths, labels = _read_list(listed)
    else:
        split_folder = _split_folder(folder, split)
        if split_folder is None:
            expected = " or ".join([*FOLDERS[split], *LISTS[split]])
            raise UserError(f"{folder} has no images to {'train on' if split == 'train' else 'evaluate'}: expected "
                            f"{expected}")
        paths, labels = _read_classes(folder, split_folder, names)
    if labels.max() >= len(names):
        raise UserError(f"{listed}: label {labels.max()}, expected 0 to {len(names) - 1}, the classes of training")
    return ImageDataset(FolderImages(folder, paths), labels, names, "imagefolder", split)


def class_names(root: str = "") -> tuple[str, ...]:
    """Return what the labels mean: the sorted class folders of training, or of evaluation where that is all there is.

    Of lists alone: the folders of their files where each label has one of its own, else the labels as they are.
    """
    folder = find_imagefolder(root)
    for split in FOLDERS:
        listed, split_folder = _first_file(folder, LISTS[split]), _split_folder(folder, split)
        if listed:
            return _names_of_list(*_read_list(listed))
        if split_folder and (names := tuple(sorted(entry.name for entry in _folders(split_folder)))):
            return names
    raise UserError(f"{folder} holds no class folders, expected train/<class>/ and val/<class>/")


def find_imagefolder(root: str = "") -> Path:
    """Return the folder that holds the splits: the root, a ``data*`` in it, or one below these."""
    for place in places(root):
        if place.is_dir():
            for folder in (place, *sorted(_folders(place))):
                if any(_split_folder(folder, split) or _first_file(folder, LISTS[split]) for split in FOLDERS):
                    return folder
    raise UserError(f"no images found under {Path(root or 'data').expanduser()}: expected the folders train/<class>/ "
                    "and val/<class>/, or train_list.txt and val_list.txt (DATA.ROOT)")


def _folders(folder: Path) -> Iterator[Path]:
    try:
        yield from (Path(entry) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None


def _split_folder(folder: Path, split: str) -> Path | None:
    """Return the split's folder where it has class folders."""
    for name in FOLDERS[split]:
        if (folder / name).is_dir() and next(_folders(folder / name), None):
            return folder / name
    return None


def _first_file(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_classes(root: Path, folder: Path, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return (paths below ``root``, labels) of the class folders of a split, classes and files in sorted order."""
    places_of = {name: label for label, name in enumerate(names)}
    paths: list[bytes] = []
    labels: list[int] = []
    for class_folder in sorted(_folders(folder)):
        if class_folder.name not in places_of:
            raise UserError(f"{class_folder} is a class that training has not: expected folders of its {len(names)} "
                            f"classes{nearest(class_folder.name, names)}")
        found = [os.path.join(base, file) for base, _, files in os.walk(class_folder) for file in files
                 if file.lower().endswith(SUFFIXES) and not file.startswith(".")]
        paths += sorted(os.fsencode(os.path.relpath(path, root)) for path in found)
        labels += [places_of[class_folder.name]] * len(found)
    if not paths:
        raise UserError(f"{folder} holds no images: its class folders have no files that end in {', '.join(SUFFIXES)}")
    return np.array(paths), np.array(labels, np.int64)


def _read_list(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return (paths, labels) of a list whose lines are a path below the list's folder, a space, and a label."""
    paths: list[bytes] = []
    labels: list[int] = []
    for number, line in enumerate(read_file(path, LIST_LIMIT, "this is no list of images").splitlines(), 1):
        parts = line.rsplit(None, 1)
        if not parts:
            continue
        if len(parts) != 2 or not (parts[1].isdigit() and int(parts[1][:8]) < MAX_CLASSES and len(parts[1]) < 8):
            raise UserError(f"{path}, line {number}: found {_shown(line)}, expected an image's path and its label")
        name = parts[0].strip().removeprefix(b"./")
        if name.startswith(b"/") or b".." in name.split(b"/") or b"\0" in name:
            raise UserError(f"{path}, line {number}: found the path {_shown(name)}, expected one below {path.parent}")
        paths.append(name)
        labels.append(int(parts[1]))
    if not paths:
        raise UserError(f"{path} is empty, expected lines of an image's path and its label")
    return np.array(paths), np.array(labels, np.int64)


def _names_of_list(paths: np.ndarray, labels: np.ndarray) -> tuple[str, ...]:
    names: dict[int, str] = {}
    for path, label in zip(paths, labels.tolist(), strict=True):
        names.setdefault(label, os.path.basename(os.path.dirname(os.fsdecode(bytes(path)))))
    plain = tuple(map(str, range(int(labels.max()) + 1)))
    ordered = tuple(names.get(label, "") for label in range(len(plain)))
    return ordered if all(ordered) and len(set(ordered)) == len(ordered) else plain


def _shown(text: bytes) -> str:
    return repr(text[:80].decode("utf-8", "replace"))
