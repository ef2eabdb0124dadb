"""Accuracy against the cost of the training: one picture of ours and of published figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import Bbox

from analysis.figures import save_figure
from analysis.results_page import BACKWARD, IMAGES_OF_AN_EPOCH, Trained

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
OURS, THEIRS = "tab:blue", "0.45"


@dataclass(frozen=True)
class Point:
    """A training: multiply-accumulates in all, accuracy in %, what is written beside it, and whether it is ours."""

    macs: float
    accuracy: float
    label: str
    ours: bool


def points(trained: Sequence[Trained], published: Sequence[Mapping[str, str]]) -> list[Point]:
    """Return what is drawn: our checkpoints for CIFAR-10, and the published ones."""
    found = [Point(each.results["training"]["macs"], 100 * each.main["top1"],
                   f"{each.name}, {each.results['training']['epochs']} epochs", True)
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
    axes.set(xlabel="cost of the training: multiply-accumulates (3 × network × images seen)",
             ylabel="test accuracy in %")
    axes.margins(x=0.12, y=0.1)
    axes.grid(alpha=0.3, which="both")
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", fontsize=8)
    _label(figure, axes, shown)
    return save_figure(figure, path)


def _label(figure: Figure, axes: Axes, shown: Sequence[Point]) -> None:
    """Write each label where it covers neither a point nor a label before it, as near its point as that goes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_layout_engine("none")  # what is measured now stays where it is
    renderer, frame = canvas.get_renderer(), axes.get_window_extent()
    scale = figure.dpi / 72
    places = [axes.transData.transform((point.macs, point.accuracy)) for point in shown]
    taken = [Bbox.from_extents(x - 6 * scale, y - 6 * scale, x + 6 * scale, y + 6 * scale) for x, y in places]
    legend = axes.get_legend()
    taken += [legend.get_window_extent(renderer)] if legend else []
    offsets = [(side, height) for height in (0, 9, -9, 18, -18, 27, -27, 36, -36, 45, -45) for side in (1, -1)]
    for point in sorted(shown, key=lambda point: not point.ours):
        best = None
        for side, height in offsets:
            text = axes.annotate(point.label, (point.macs, point.accuracy), (side * (8 if not height else 12), height),
                                 textcoords="offset points", ha="left" if side > 0 else "right", va="center",
                                 fontsize=8, color=OURS if point.ours else THEIRS,
                                 arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "0.6",
                                             "relpos": (0.0 if side > 0 else 1.0, 0.5)} if height else None)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # of the words, without the line to the point
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                best = text
                break
            text.remove()
        if best is None:
            axes.annotate(point.label, (point.macs, point.accuracy), (8, 0), textcoords="offset points", va="center",
                          fontsize=8, color=OURS if point.ours else THEIRS)
