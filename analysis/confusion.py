"""The confusion matrix as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from analysis.figures import save_figure
from analysis.formatting import text_table


def confusion_table(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Return the matrix as text: a row for each true class, a column for each predicted one."""
    width = max(4, len(str(max(map(max, confusion)))))
    return text_table(("true \\ predicted", *(name[:width] for name in names)),
                      [(name, *map(str, row)) for name, row in zip(names, confusion, strict=True)])


def draw_confusion(confusion: ArrayLike, names: Sequence[str], path: Path, title: str = "") -> Path:
    """Write the matrix as a picture, in % of each true class."""
    counts = np.asarray(confusion, dtype=float)
    percents = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 1.8 + 0.55 * len(names)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(percents, cmap="Blues", vmin=0, vmax=100)
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=45, ha="right")
    axes.set_yticks(ticks, names)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if len(names) <= 20:
        for row, column in np.ndindex(percents.shape):
            percent = percents[row, column]
            axes.text(column, row, f"{percent:.1f}" if percent else "·", ha="center", va="center", fontsize=7,
                      color="white" if percent > 55 else "black")
    figure.colorbar(image, label="% of the true class", shrink=0.8)
    return save_figure(figure, path)
