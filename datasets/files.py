"""Image files from outside."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from errors import UserError

MAX_BYTES = 64 << 20
MAX_PIXELS = 100_000_000
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")

# What decoders say of a damaged file on their own is said by us in one sentence.
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)  # OpenCV 4, 5
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_image(path: Path) -> np.ndarray:
    """Return an image file (JPEG, PNG, BMP, WebP, TIFF, GIF, PPM) as RGB uint8 ``[H, W, 3]``.

    Grey, palette, CMYK and 16 bits become RGB of 8 bits, transparency is left out, of several pictures the first is
    taken, and a photograph is turned as its EXIF data say. Raises UserError where there is no file, it is no image or
    a part of one, or it is larger than 64 MiB or 100 million pixels, which its header tells before anything is made.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such image file")
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_BYTES else b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if size > MAX_BYTES:
        raise UserError(f"{path}: {size:,} bytes; images of up to {MAX_BYTES:,} are read")
    width, height = _size(data) or (0, 0)
    if width * height > MAX_PIXELS:
        raise UserError(f"{path}: larger than {MAX_PIXELS:,} pixels; images of up to that size are read")
    image = _decoded(data) if width and height else None
    if image is None or sorted(image.shape[:2]) != sorted((height, width)):
        raise UserError(f"{path}: not a readable image; expected a whole JPEG, PNG, BMP, WebP, TIFF or GIF")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) as an image's header has them, None where it has none; no pixel is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size
    except Image.DecompressionBombError:
        return MAX_PIXELS, MAX_PIXELS
    except Exception:  # a damaged header makes its parsers raise anything
        return None


def _decoded(data: bytes) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
