"""Learning curves of a run: loss and accuracy, training and selection on one axis of iterations."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures import save_figure
from engine.run import Row, read_table

TRAIN, SELECTION = "tab:blue", "tab:orange"


def draw_curves(run: Path, folder: Path | None = None) -> list[Path]:
    """Write ``loss.png`` and ``accuracy.png`` from a run's tables into ``folder``, by default its own.

    Returns their paths.
    """
    steps, epochs = read_table(run / "steps.csv"), read_table(run / "history.csv")
    written = []
    for name, label, factor in (("loss", "cross entropy, label-smoothed", 1.0), ("accuracy", "accuracy in %", 100.0)):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, steps, f"train_{name}", factor, color=TRAIN, alpha=0.3, linewidth=0.8, label="training, one batch")
        _draw(axes, epochs, f"train_{name}", factor, color=TRAIN, marker="o", label="training, mean of the epoch")
        _draw(axes, epochs, f"val_{name}", factor, color=SELECTION, marker="o", label="selection, without augmentation")
        axes.set(xlabel="iteration", ylabel=label, title=f"{run.name}: {name}")
        axes.grid(alpha=0.3)
        axes.legend()
        _add_epochs(axes, epochs)
        written.append(save_figure(figure, (folder or run) / f"{name}.png"))
    return written


def _draw(axes: Axes, rows: list[Row], column: str, factor: float, **style: object) -> None:
    points = [(int(row["iteration"]), factor * float(row[column])) for row in rows if row[column]]
    if points:
        axes.plot(*zip(*points, strict=True), markersize=3.5 if len(points) <= 60 else 0, **style)


def _add_epochs(axes: Axes, epochs: list[Row]) -> None:
    """Show epochs along the top, as long as the first one."""
    if not epochs:
        return
    steps = int(epochs[0]["iteration"]) / int(epochs[0]["epoch"])
    top = axes.secondary_xaxis("top", functions=(lambda x: x / steps, lambda x: x * steps))
    top.set_xlabel("epoch")
    top.xaxis.set_major_locator(MaxNLocator(integer=True))
