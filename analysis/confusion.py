"""The confusion matrix of an evaluation, as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from analysis.figures import save_figure


def confusion_table(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Return the matrix as aligned text: a row for each true class, a column for each predicted one."""
    width = max(5, len(str(max(map(max, confusion)))) + 1)
    corner = "true \\ predicted"
    left = max(map(len, (corner, *names)))
    lines = [corner.ljust(left) + "".join(name[: width - 1].rjust(width) for name in names)]
    for name, row in zip(names, confusion, strict=True):
        lines.append(name.ljust(left) + "".join(str(count).rjust(width) for count in row))
    return "\n".join(lines)


def draw_confusion(confusion: Sequence[Sequence[int]], names: Sequence[str], path: Path, title: str = "") -> Path:
    """Write the matrix as a picture: shares of each true class in %, rows sum to 100."""
    counts = np.asarray(confusion, dtype=float)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 1.8 + 0.55 * len(names)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=45, ha="right")
    axes.set_yticks(ticks, names)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if len(names) <= 20:
        for row, column in np.ndindex(shares.shape):
            share = shares[row, column]
            axes.text(column, row, f"{share:.1f}" if share else "·", ha="center", va="center", fontsize=7,
                      color="white" if share > 55 else "black")
    figure.colorbar(image, label="% of the true class", shrink=0.8)
    return save_figure(figure, path)
