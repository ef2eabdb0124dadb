"""Where the suite is, and the sizes of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Size = int | Sequence[int]  # of an image: a side, or (height, width)


def pair(size: Size) -> tuple[int, int]:
    """Return (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
