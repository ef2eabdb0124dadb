"""Accuracy against the cost of the training: one picture of ours and of published networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from analysis.figures import save_figure
from analysis.formatting import quantity
from analysis.results.page import Trained

OURS, THEIRS = "tab:blue", "0.45"
BACKWARD = 3  # forward and backward pass, in forward passes
IMAGES_OF_AN_EPOCH = 50_000  # of CIFAR-10
# Of a label beside its point: right or left, and font points above it; the nearest first.
_OFFSETS = [(side, height) for height in (0, 9, -9, 18, -18, 27, -27, 36, -36, 45, -45) for side in (1, -1)]


@dataclass(frozen=True)
class Point:
    """A training: multiply-accumulates, accuracy in %, label, and whether it is ours."""

    macs: float
    accuracy: float
    label: str
    ours: bool


def points(trained: Sequence[Trained], published: Sequence[Mapping[str, str]]) -> list[Point]:
    """Return our checkpoints for CIFAR-10 and the published ones."""
    found = [Point(each.training["macs"], 100 * each.test["top1"], f"{each.name}, {each.training['epochs']} epochs",
                   True) for each in trained if each.test["data"].startswith("CIFAR-10")]
    for row in published:
        cost = BACKWARD * float(row["macs"]) * IMAGES_OF_AN_EPOCH * int(row["epochs"])
        more = f", more than {row['top1']} %" if row["note"] == "more than" else ""
        found.append(Point(cost, float(row["top1"]), f"{row['network']}, {row['epochs']} epochs{more}", False))
    return found


def draw_results(shown: Sequence[Point], path: Path) -> Path:
    """Write the picture, with a label beside every point."""
    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = figure.add_subplot()
    for ours, colour, marker, label in ((True, OURS, "o", "trained here"), (False, THEIRS, "D", "published")):
        chosen = [point for point in shown if point.ours == ours]
        axes.scatter([point.macs for point in chosen], [point.accuracy for point in chosen], s=34, zorder=3,
                     color=colour if ours else "white", edgecolors=colour, marker=marker, label=label)
    axes.set(xscale="log", xlabel="cost of the training: 3 × multiply-accumulates × images",
             ylabel="CIFAR-10 test accuracy in %")
    axes.xaxis.set_major_formatter(lambda macs, position: quantity(macs))
    axes.margins(x=0.3, y=0.1)  # room for a label on either side
    axes.grid(alpha=0.3, which="both")
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", fontsize=8)
    _label(figure, axes, shown)
    return save_figure(figure, path)


def _label(figure: Figure, axes: Axes, shown: Sequence[Point]) -> None:
    """Write each label at the nearest offset where it covers no point, label or legend; ours first."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_layout_engine("none")  # positions measured now stay
    renderer, frame, radius = canvas.get_renderer(), axes.get_window_extent(), 6 * figure.dpi / 72
    centers = axes.transData.transform([(point.macs, point.accuracy) for point in shown])
    taken = [axes.get_legend().get_window_extent(renderer), *(Bbox([xy - radius, xy + radius]) for xy in centers)]
    for point in sorted(shown, key=lambda point: (not point.ours, -point.macs)):
        for side, height in _OFFSETS:
            text = _write(axes, point, side, height)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # of the words, without the line to the point
            if frame.x0 <= box.x0 and box.x1 <= frame.x1 and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()
        else:
            _write(axes, point, *_OFFSETS[0])


def _write(axes: Axes, point: Point, side: int, height: int) -> Annotation:
    """Write a label to the right (``side`` 1) or left (-1) of its point, so many font points above it."""
    line = {"arrowstyle": "-", "lw": 0.5, "color": "0.6", "relpos": (0.0 if side > 0 else 1.0, 0.5)}
    return axes.annotate(point.label, (point.macs, point.accuracy), (side * (12 if height else 8), height),
                         textcoords="offset points", ha="left" if side > 0 else "right", va="center", fontsize=8,
                         color=OURS if point.ours else THEIRS, arrowprops=line if height else None)
