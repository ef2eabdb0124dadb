"""Accuracy against the cost of the training: one picture of ours and of published figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.path import Path as Line
from matplotlib.text import Annotation, Text
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import Bbox

from analysis.figures import save_figure
from analysis.results.page import BACKWARD, IMAGES_OF_AN_EPOCH, Trained

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
OURS, THEIRS = "tab:blue", "0.45"
# Of a label beside its point: right or left, and font points above it; the nearest first.
_PLACES = [(side, height) for height in (0, 9, -9, 18, -18, 27, -27, 36, -36, 45, -45) for side in (1, -1)]


@dataclass(frozen=True)
class Point:
    """A training: multiply-accumulates in all, accuracy in %, what is written beside it, and whether it is ours."""

    macs: float
    accuracy: float
    label: str
    ours: bool


def points(trained: Sequence[Trained], published: Sequence[Mapping[str, str]]) -> list[Point]:
    """Return what is drawn: our checkpoints for CIFAR-10, and the published ones."""
    found = [Point(each.spent("macs"), 100 * each.main["top1"], f"{each.name}, {each.epochs} epochs", True)
             for each in trained if each.main["data"].startswith("CIFAR-10")]
    for row in published:
        cost = BACKWARD * float(row["macs"]) * IMAGES_OF_AN_EPOCH * int(row["epochs"])
        more = f", more than {row['top1']} %" if row["note"] == "more than" else ""
        found.append(Point(cost, float(row["top1"]), f"{row['network']}, {row['epochs']} epochs{more}", False))
    return found


def draw_results(shown: Sequence[Point], path: Path) -> Path:
    """Write the picture; every point is labelled beside itself."""
    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = figure.add_subplot()
    for ours, colour, marker, label in ((True, OURS, "o", "trained here, CIFAR-10 (JPEG re-encoding)"),
                                        (False, THEIRS, "D", "published, CIFAR-10")):
        chosen = [point for point in shown if point.ours == ours]
        axes.scatter([point.macs for point in chosen], [point.accuracy for point in chosen], s=34, zorder=3,
                     color=colour if ours else "white", edgecolors=colour, marker=marker, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda macs, place: f"10{str(round(math.log10(macs))).translate(_RAISED)}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="cost of the training: multiply-accumulates, (3 × network + teachers) × images seen",
             ylabel="test accuracy in %")
    axes.margins(x=0.3, y=0.1)  # room for a label on either side
    axes.grid(alpha=0.3, which="both")
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", fontsize=8)
    _label(figure, axes, shown)
    return save_figure(figure, path)


def _label(figure: Figure, axes: Axes, shown: Sequence[Point]) -> None:
    """Write each label where it covers neither a point nor a label before it: ours first, the costliest before others.

    Of such places each takes that whose line to the point crosses the fewest of them, and of these the nearest.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_layout_engine("none")  # what is measured now stays where it is
    renderer, frame = canvas.get_renderer(), axes.get_window_extent()
    scale = figure.dpi / 72
    marks = [axes.transData.transform((point.macs, point.accuracy)) for point in shown]
    taken = [Bbox.from_extents(x - 6 * scale, y - 6 * scale, x + 6 * scale, y + 6 * scale) for x, y in marks]
    dots = list(zip(shown, marks, taken, strict=True))
    legend = axes.get_legend()
    taken += [legend.get_window_extent(renderer)] if legend else []
    for point, mark, dot in sorted(dots, key=lambda each: (not each[0].ours, -each[0].macs)):
        others = [box for box in taken if box is not dot]
        fitting: list[tuple[int, int, int, Bbox]] = []  # boxes crossed, the place's two numbers, the box
        for side, height in _PLACES:
            text = _write(axes, point, side, height)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # of the words, without the line to the point
            text.remove()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(map(box.overlaps, others)):
                line = Line([mark, (box.x0 if side > 0 else box.x1, (box.y0 + box.y1) / 2)])
                fitting.append((sum(line.intersects_bbox(other, filled=False) for other in others), side, height, box))
        if fitting:
            _, side, height, box = min(fitting, key=lambda place: place[0])
            _write(axes, point, side, height)
            taken.append(box)
        else:
            _write(axes, point, *_PLACES[0])


def _write(axes: Axes, point: Point, side: int, height: int) -> Annotation:
    """Write a label to the right (``side`` 1) or left (-1) of its point, so many font points above it."""
    line = {"arrowstyle": "-", "lw": 0.5, "color": "0.6", "relpos": (0.0 if side > 0 else 1.0, 0.5)}
    return axes.annotate(point.label, (point.macs, point.accuracy), (side * (12 if height else 8), height),
                         textcoords="offset points", ha="left" if side > 0 else "right", va="center", fontsize=8,
                         color=OURS if point.ours else THEIRS, arrowprops=line if height else None)
