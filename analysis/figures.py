"""How every picture of the suite is written."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.text import Text

from utils.fileio import write_atomically


def save_figure(figure: Figure, path: Path, dpi: int = 130) -> Path:
    """Write a figure as PNG, atomically, its texts as they are (a ``$`` in a name is no formula); returns ``path``."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))
    return path
