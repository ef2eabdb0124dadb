"""How metrics compare with those of a released checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def beside_recorded(found: Mapping[str, Any], recorded: Sequence[Mapping[str, Any]]) -> str:
    """Compare top-1 accuracy with what a released checkpoint's ``results.json`` has under ``test``."""
    for row in recorded:
        if row["pixels_sha256"] == found["pixels_sha256"]:
            images = round((found["top1"] - row["top1"]) * row["images"])
            told = "the same here" if not images else f"{abs(images)} images {'fewer' if images < 0 else 'more'} here"
            return f"released with {row['top1']:.2%} on these images ({row['data']}): {told}"
    told = "; ".join(f"{row['top1']:.2%} on {row['data']}, {row['images']:,} images" for row in recorded)
    return f"released with {told}: other images than these"
