"""Image files from outside."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from errors import UserError

MAX_BYTES = 64 << 20
MAX_PIXELS = 100_000_000


def read_image(path: Path) -> np.ndarray:
    """Return an image file (JPEG, PNG, BMP, WebP, ...) as RGB uint8 ``[H, W, 3]``; grey and alpha become RGB.

    Raises UserError where there is no file, it is no image, or it is larger than 64 MiB or 100 million pixels.
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
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    except cv2.error:
        image = None
    if image is None:
        raise UserError(f"{path}: not a readable image; expected JPEG, PNG, BMP, WebP or TIFF")
    if image.shape[0] * image.shape[1] > MAX_PIXELS:
        raise UserError(f"{path}: {image.shape[1]}×{image.shape[0]} pixels; images of up to {MAX_PIXELS:,} are read")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
