"""Explanations as pictures: the image in its true colours, and each map over it in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from analysis.explain import METHODS, Method
from analysis.explanation import Explanation
from analysis.figures import save_figure
from analysis.grids import RIGHT, UNKNOWN, WRONG
from analysis.subject import Subject

# Transparent at 0: grey image where the map says nothing.
SIGNED = LinearSegmentedColormap.from_list("against_for", [(0.10, 0.25, 0.85, 0.9), (0.45, 0.6, 1.0, 0.5),
                                                           (1.0, 1.0, 1.0, 0.0), (1.0, 0.6, 0.4, 0.5),
                                                           (0.85, 0.1, 0.05, 0.9)])
UNSIGNED = LinearSegmentedColormap.from_list("none_much", [(1.0, 0.9, 0.3, 0.0), (1.0, 0.6, 0.1, 0.55),
                                                           (0.8, 0.05, 0.05, 0.9)])
TILE = 1.75  # inches


def draw_explanations(subject: Subject, found: Sequence[Sequence[Explanation]], names: Sequence[str], path: Path,
                      title: str = "") -> Path:
    """Write one sheet of many images (``found``: for each its explanations, one a method; ``names``: what it is).

    A group of tiles for each image: itself, then each method's map for the predicted class and, where it is another,
    for the true one. With one method several groups stand side by side.
    """
    single = len(found[0]) == 1
    groups = [_tiles(one, single) for one in found]
    if single:
        width = max(len(group) for group in groups)
        per_row = max(1, min(len(groups), 9 // width))
        rows = [[tile for group in groups[start : start + per_row] for tile in [*group, *[None] * (width - len(group))]]
                for start in range(0, len(groups), per_row)]
        heads = [names[start : start + per_row] for start in range(0, len(groups), per_row)]
    else:
        rows, heads, width = [], [], len(found[0]) + 1
        for group, name in zip(groups, names, strict=True):
            for start in range(0, len(group), width):
                rows.append(group[start : start + width])
                heads.append([name])
    columns = max(map(len, rows))
    figure = Figure(figsize=(TILE * columns + 0.4, (TILE + 0.62) * len(rows) + 0.9), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, row, head in zip(grid, rows, heads, strict=True):
        for place, (axes, tile) in enumerate(zip(line, row, strict=False)):
            if tile is not None:
                _draw_tile(axes, subject, tile, head[place // width] if single else head[0])
            elif row[place - 1] is not None and place // width < len(head):
                axes.text(0.5, 0.5, "predicted\nis true", ha="center", va="center", color="0.6", fontsize=8)
    _add_scales(figure, grid, [METHODS[one.method] for one in found[0]])
    return save_figure(figure, path, dpi=100)


Tile = tuple[Explanation, int | None, bool]
"""An explanation, the class whose map is drawn (None: the image itself), and whether its method is named."""


def _tiles(found: Sequence[Explanation], single: bool) -> list[Tile]:
    tiles: list[Tile] = []
    for index in found[0].classes:
        if index == found[0].predicted or not single:
            tiles.append((found[0], None, False))
        tiles += [(one, index, not single) for one in found]
    return tiles


def _draw_tile(axes: Axes, subject: Subject, tile: Tile, name: str) -> None:
    one, index, named = tile
    if index is None:
        right = None if one.label is None else one.label == one.predicted
        axes.imshow(one.image)
        axes.set_title(f"{name[:22]}\n" + ("" if one.label is None else f"true: {subject.class_name(one.label)}"),
                       fontsize=9, color={None: UNKNOWN, True: RIGHT, False: WRONG}[right])
        return
    heat, signed = one.map_of(index), METHODS[one.method].signed
    largest = _largest(heat)
    axes.imshow(one.image.astype(np.float64) @ (0.299, 0.587, 0.114), cmap="gray", vmin=0, vmax=255)
    axes.imshow(heat, cmap=SIGNED if signed else UNSIGNED, vmin=-largest if signed else 0, vmax=largest,
                interpolation="nearest")
    segments = one.arrays.get("segments")
    if segments is not None:
        _outline(axes, segments)
    what = f"{subject.class_name(index)[:14]} {one.probabilities[index]:.0%}"
    scale = f"{'±' if signed else ''}{largest:.2g}"
    axes.set_title(f"{METHODS[one.method].title}\n{what}: {scale}" if named else f"for {what}\n{scale}", fontsize=9)


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
