"""Explanations as one picture: each image in colour, and each map over it in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from analysis.explain.image_model import ImageModel
from analysis.explain.methods import METHODS, Explanation, Method
from analysis.figures import save_figure
from analysis.grids import RIGHT, UNKNOWN, WRONG

# Transparent at 0
SIGNED = LinearSegmentedColormap.from_list("against_for", [(0.10, 0.25, 0.85, 0.9), (0.45, 0.6, 1.0, 0.5),
                                                           (1.0, 1.0, 1.0, 0.0), (1.0, 0.6, 0.4, 0.5),
                                                           (0.85, 0.1, 0.05, 0.9)])
UNSIGNED = LinearSegmentedColormap.from_list("none_much", [(1.0, 0.9, 0.3, 0.0), (1.0, 0.6, 0.1, 0.55),
                                                           (0.8, 0.05, 0.05, 0.9)])
TILE = 1.75  # inches
COLUMNS = 10
Tile = tuple[Explanation, int | None, str]  # which of the maps is drawn (None: the image), and the caption


def draw_explanations(model: ImageModel, found: Sequence[Sequence[Explanation]], names: Sequence[str], path: Path,
                      title: str = "") -> Path:
    """Write one sheet of many images; ``found`` has the explanations of each, one a method, ``names`` its title.

    Each image is followed by its maps for the predicted class and, where different, the true one. With one method
    several images share a row; with more each row is one class of one image.
    """
    rows: list[list[Tile]] = []
    for explanations, name in zip(found, names, strict=True):
        one = explanations[0]
        image = (one, None, f"{name[:22]}\n" + ("" if one.label is None else f"true: {model.class_name(one.label)}"))
        classes = [f"{model.class_name(index)[:14]} {one.probabilities[index]:.0%}" for index in one.classes]
        if len(explanations) == 1:
            group = [image, *((one, row, f"for {text}\n") for row, text in enumerate(classes))]
            if not rows or len(rows[-1]) + len(group) > COLUMNS:
                rows.append([])
            rows[-1] += group
        else:
            rows += [[image, *((each, row, f"{METHODS[each.method].title}\n{text}: ") for each in explanations)]
                     for row, text in enumerate(classes)]
    columns = max(map(len, rows))
    figure = Figure(figsize=(TILE * columns + 0.4, (TILE + 0.55) * len(rows) + 1.1), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, row in zip(grid, rows, strict=True):
        for axes, tile in zip(line, row, strict=False):
            _draw_tile(axes, *tile)
    _add_scales(figure, grid, [METHODS[one.method] for one in found[0]])
    return save_figure(figure, path, dpi=100)


def _draw_tile(axes: Axes, one: Explanation, row: int | None, text: str) -> None:
    if row is None:
        colour = UNKNOWN if one.label is None else RIGHT if one.label == one.classes[0] else WRONG
        axes.imshow(one.image)
        axes.set_title(text, fontsize=9, color=colour)
        return
    heat, signed = one.maps[row], METHODS[one.method].signed
    # Full colour: the 99.5th percentile of the magnitudes, so that a single pixel does not fade all others.
    largest = float(np.percentile(np.abs(heat), 99.5)) or float(np.abs(heat).max()) or 1.0
    axes.imshow(one.image @ (0.299, 0.587, 0.114), cmap="gray", vmin=0, vmax=255)
    axes.imshow(heat, cmap=SIGNED if signed else UNSIGNED, vmin=-largest if signed else 0, vmax=largest,
                interpolation="nearest")
    if "segments" in one.arrays:
        _outline(axes, one.arrays["segments"])
    axes.set_title(f"{text}{'±' if signed else ''}{largest:.2g}", fontsize=9)


def _outline(axes: Axes, segments: np.ndarray) -> None:
    """Draw the borders between superpixels as thin lines along the edges of pixels."""
    below = np.argwhere(segments[1:] != segments[:-1])
    beside = np.argwhere(segments[:, 1:] != segments[:, :-1])
    style = {"color": "black", "linewidth": 0.35, "alpha": 0.5}
    axes.hlines(below[:, 0] + 0.5, below[:, 1] - 0.5, below[:, 1] + 0.5, **style)
    axes.vlines(beside[:, 1] + 0.5, beside[:, 0] - 0.5, beside[:, 0] + 0.5, **style)


def _add_scales(figure: Figure, grid: np.ndarray, methods: Sequence[Method]) -> None:
    for signed, colours, labels in ((True, SIGNED, ("speaks against", "0", "speaks for")),
                                    (False, UNSIGNED, ("0", "", "matters"))):
        units = "; ".join(f"{method.title}: {method.unit}" for method in methods if method.signed == signed)
        if units:
            bar = figure.colorbar(ScalarMappable(Normalize(0, 1), colours), ax=list(grid.flat), shrink=0.45, aspect=40,
                                  orientation="horizontal", pad=0.02)
            bar.set_ticks([0, 0.5, 1], labels=labels, fontsize=8)
            bar.set_label(f"full colour: the number over each map ({units})", fontsize=8)
