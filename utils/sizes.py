"""Sizes of images: a side, or (height, width)."""

from __future__ import annotations

from collections.abc import Sequence

Size = int | Sequence[int]


def pair(size: Size) -> tuple[int, int]:
    """Return (height, width) of a side or of a pair."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
