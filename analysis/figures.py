"""How every picture of the suite is written."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from engine.files import write_atomically


def save_figure(figure: Figure, path: Path, dpi: int = 130) -> Path:
    """Write a figure as PNG, atomically; returns ``path``."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))
    return path
