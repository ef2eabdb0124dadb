"""Explanations as pictures: the image in its true colours, and each map over it in grey."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from analysis.explain.explanation import Explanation
from analysis.explain.methods import METHODS, Method
from analysis.explain.subject import Subject
from analysis.figures import save_figure
from analysis.grids import RIGHT, UNKNOWN, WRONG

# Transparent at 0: grey image where the map says nothing.
SIGNED = LinearSegmentedColormap.from_list("against_for", [(0.10, 0.25, 0.85, 0.9), (0.45, 0.6, 1.0, 0.5),
                                                           (1.0, 1.0, 1.0, 0.0), (1.0, 0.6, 0.4, 0.5),
                                                           (0.85, 0.1, 0.05, 0.9)])
UNSIGNED = LinearSegmentedColormap.from_list("none_much", [(1.0, 0.9, 0.3, 0.0), (1.0, 0.6, 0.1, 0.55),
                                                           (0.8, 0.05, 0.05, 0.9)])
TILE = 1.75  # inches
COLUMNS = 10


def draw_explanations(subject: Subject, found: Sequence[Sequence[Explanation]], names: Sequence[str], path: Path,
                      title: str = "") -> Path:
    """Write one sheet of many images (``found``: for each its explanations, one a method; ``names``: what it is).

    Each image is followed by its maps for the predicted class and, where it is another, for the true one. With one
    method several images stand in a row; with more each row is one class of one image.
    """
    rows: list[list[Tile]] = [[]]
    for explanations, name in zip(found, names, strict=True):
        image = Tile(explanations[0], None, name)
        if len(explanations) == 1:
            group = [image, *(Tile(explanations[0], index, f"for {_class(subject, explanations[0], index)}")
                              for index in explanations[0].classes)]
            if len(rows[-1]) + len(group) > COLUMNS:
                rows.append([])
            rows[-1] += group
        else:
            rows += [[image, *(Tile(one, index, f"{METHODS[one.method].title}\n{_class(subject, one, index)}")
                               for one in explanations)] for index in explanations[0].classes]
    rows = [row for row in rows if row]
    columns = max(map(len, rows))
    figure = Figure(figsize=(TILE * columns + 0.4, (TILE + 0.55) * len(rows) + 1.1), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        for axes in line:
            axes.set_axis_off()
        for axes, tile in zip(line, row, strict=False):
            _draw_tile(axes, subject, tile)
    _add_scales(figure, grid, [METHODS[one.method] for one in found[0]])
    return save_figure(figure, path, dpi=100)


@dataclass(frozen=True)
class Tile:
    """An explanation, the class whose map is drawn (None: the image itself), and what stands over it."""

    one: Explanation
    index: int | None
    text: str


def _class(subject: Subject, one: Explanation, index: int) -> str:
    return f"{subject.class_name(index)[:14]} {one.probabilities[index]:.0%}"


def _draw_tile(axes: Axes, subject: Subject, tile: Tile) -> None:
    one = tile.one
    if tile.index is None:
        right = None if one.label is None else one.label == one.predicted
        axes.imshow(one.image)
        axes.set_title(f"{tile.text[:22]}\n" + ("" if one.label is None else f"true: {subject.class_name(one.label)}"),
                       fontsize=9, color={None: UNKNOWN, True: RIGHT, False: WRONG}[right])
        return
    heat, signed = one.map_of(tile.index), METHODS[one.method].signed
    largest = _largest(heat)
    axes.imshow(one.image.astype(np.float64) @ (0.299, 0.587, 0.114), cmap="gray", vmin=0, vmax=255)
    axes.imshow(heat, cmap=SIGNED if signed else UNSIGNED, vmin=-largest if signed else 0, vmax=largest,
                interpolation="nearest")
    if "segments" in one.arrays:
        _outline(axes, one.arrays["segments"])
    separator = ": " if "\n" in tile.text else "\n"
    axes.set_title(f"{tile.text}{separator}{'±' if signed else ''}{largest:.2g}", fontsize=9)


def _outline(axes: Axes, segments: np.ndarray) -> None:
    """Draw the borders between superpixels as thin lines along the edges of pixels."""
    below = np.argwhere(segments[1:] != segments[:-1])
    beside = np.argwhere(segments[:, 1:] != segments[:, :-1])
    style = {"color": "black", "linewidth": 0.35, "alpha": 0.5}
    axes.hlines(below[:, 0] + 0.5, below[:, 1] - 0.5, below[:, 1] + 0.5, **style)
    axes.vlines(beside[:, 1] + 0.5, beside[:, 0] - 0.5, beside[:, 0] + 0.5, **style)


def _largest(heat: np.ndarray) -> float:
    """Return the magnitude that has the full colour: that of the 99.5th percentile; single pixels may lie beyond."""
    return float(np.percentile(np.abs(heat), 99.5)) or float(np.abs(heat).max()) or 1.0


def _add_scales(figure: Figure, grid: np.ndarray, methods: Sequence[Method]) -> None:
    signed = [method for method in methods if method.signed]
    unsigned = [method for method in methods if not method.signed]
    for chosen, colours, labels in ((signed, SIGNED, ("speaks against", "0", "speaks for")),
                                    (unsigned, UNSIGNED, ("0", "", "matters"))):
        if not chosen:
            continue
        bar = figure.colorbar(ScalarMappable(Normalize(0, 1), colours), ax=list(grid.flat), orientation="horizontal",
                              shrink=0.45, aspect=40, pad=0.02)
        bar.set_ticks([0, 0.5, 1], labels=labels, fontsize=8)
        units = "; ".join(f"{method.title}: {method.unit}" for method in chosen)
        bar.set_label(f"full colour: the number over each map ({units})", fontsize=8)
