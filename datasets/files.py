"""Image files from outside: find them, read them, and report damaged ones."""

from __future__ import annotations

import io
import logging
import os
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from datasets.archives import is_folder
from errors import UserError, is_url, printable
from utils.fileio import reading

log = logging.getLogger("suite")

MAX_BYTES = 64 << 20
MAX_PIXELS = 100_000_000
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".gif", ".ppm",
            ".pgm", ".pbm", ".pnm")

# Decoders' own messages about damaged files are switched off: a UserError reports these.
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)  # OpenCV 4, 5
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_image(path: Path) -> np.ndarray:
    """Return an image file (JPEG, PNG, BMP, WebP, TIFF, GIF, PPM) as RGB uint8 ``[H, W, 3]``.

    Grey, palette, CMYK and 16 bits become RGB of 8 bits, transparency is dropped, of several pictures the first is
    taken, and EXIF orientation is applied. Raises UserError where there is no file, it is not a whole image, or it is
    larger than 64 MiB or 100 million pixels, which its header tells before anything is allocated.
    """
    title = _check_exists(path)
    with reading(path):
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{title}: {size:,} bytes; images of up to {MAX_BYTES:,} are read")
        data = path.read_bytes()
    (width, height), mode = _header(data)
    if width * height > MAX_PIXELS:
        raise UserError(f"{title}: larger than {MAX_PIXELS:,} pixels; images of up to that size are read")
    image = None
    if width and height:
        image = _decode_tiff(data) if mode in ("TIFF RGBA", "TIFF RGBa", "TIFF LA", "TIFF La") else _decode(data)
    if image is None or sorted(image.shape[:2]) != sorted((height, width)):
        raise UserError(f"{title}: not a readable image; expected a whole JPEG, PNG, BMP, WebP, TIFF or GIF")
    return image


def _check_exists(path: Path) -> str:
    """Return the path as messages show it; UserError where it is not a file."""
    title = printable(path, 300)
    if is_url(path):
        raise UserError(f"{title}: a URL; download the image first, for example with curl -LO, and pass the file")
    with reading(path):
        if not path.is_file():
            raise UserError(f"{title}: no such image file")
    return title


def _header(data: bytes) -> tuple[tuple[int, int], str]:
    """Return ((width, height), format and mode) from an image's header, zeros where it has none; decode nothing."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size, f"{image.format} {image.mode}"
    except Image.DecompressionBombError:
        return (MAX_PIXELS, MAX_PIXELS), ""
    except Exception:  # parsers raise anything on a damaged header
        return (0, 0), ""


def _decode(data: bytes) -> np.ndarray | None:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _decode_tiff(data: bytes) -> np.ndarray | None:
    """Decode a TIFF with alpha by Pillow: OpenCV multiplies its colours by alpha, as in no other format."""
    try:
        with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
            image = ImageOps.exif_transpose(image)
            straight = {"RGBa": "RGBA", "La": "LA"}.get(image.mode)
            return np.array((image.convert(straight) if straight else image).convert("RGB"))
    except Exception:  # parsers raise anything on damaged data
        return None


def find_images(folder: Path) -> tuple[list[str], Counter[str]]:
    """Return the paths of the image files below a folder, relative and sorted, and counts of what is ignored.

    Symbolic links are followed, each folder is read once; hidden files and folders are skipped. Raises UserError for a
    folder that cannot be read.
    """
    found: list[str] = []
    ignored: Counter[str] = Counter()
    with reading(folder):  # a link to a folder around this one would add its other folders
        seen = {(status.st_dev, status.st_ino) for status in map(os.stat, folder.resolve().parents)}
    pending = [""]
    while pending:
        prefix = pending.pop()
        path = folder / prefix
        with reading(path), os.scandir(path) as scanned:
            status, entries = path.stat(), sorted(scanned, key=lambda entry: entry.name, reverse=True)
        if (status.st_dev, status.st_ino) in seen:
            ignored["links to folders read already"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                continue
            if is_folder(entry):
                pending.append(f"{prefix}{entry.name}/")
            elif suffix in SUFFIXES:
                found.append(prefix + entry.name)
            else:
                ignored[f"{printable(suffix, 20)} files" if suffix else "files without suffix"] += 1
    return sorted(found, key=os.fsencode), ignored


def expand_images(paths: Sequence[str]) -> Iterator[Path]:
    """Yield image files: a folder's images for each folder, ``~`` expanded. UserError for what does not exist."""
    for name in paths:
        path = Path(os.path.expanduser(name))
        if not path.is_dir():
            _check_exists(path)
            yield path
            continue
        found, ignored = find_images(path)
        if not found:
            raise UserError(f"{printable(path, 300)} holds no images{listed(ignored)}")
        if ignored:
            log.warning("%s: %d images%s", printable(path, 300), len(found), listed(ignored))
        yield from (path / name for name in found)


def listed(ignored: Counter[str]) -> str:
    """Return counts of what is ignored, for the end of a sentence."""
    parts = [f"{count} {what}" for what, count in sorted(ignored.items())]
    return f"; ignored: {', '.join(parts)}" if parts else ""


class FolderImages(Sequence[np.ndarray]):
    """Images of files under a folder: each is read when it is indexed, uint8 ``[H, W, 3]`` of its own size.

    A slice or an array of indices gives the images there, unread. Paths take 1 byte a character: 60 MB for ImageNet's
    1.3 million.
    """

    def __init__(self, folder: Path, paths: np.ndarray) -> None:
        self.folder, self._paths = folder, paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray | FolderImages:
        """Return one image; UserError, naming the file, where it is missing or not an image."""
        if isinstance(index, (slice, np.ndarray, list)):
            return FolderImages(self.folder, self._paths[index])
        return read_image(self.path(index))

    def path(self, index: int) -> Path:
        """Return the file of an image."""
        return self.folder / os.fsdecode(bytes(self._paths[index]))

    def checksum(self) -> int:
        """Return a number that changes with the paths and their order."""
        return zlib.crc32(self._paths.tobytes())


@contextmanager
def damage_check(*splits: Sequence[np.ndarray]) -> Iterator[threading.Thread]:
    """Decode image files in one thread, which is yielded, for the length of the block; log each that cannot be read.

    Images in memory are skipped.
    """
    stopped = threading.Event()

    def run() -> None:
        for images in splits:
            if not isinstance(images, FolderImages):
                continue
            for index in range(len(images)):
                if stopped.is_set():
                    return
                try:
                    images[index]
                except UserError as error:
                    log.warning("damaged image: %s", error)

    thread = threading.Thread(target=run, name="damage-check", daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        stopped.set()
        thread.join()
