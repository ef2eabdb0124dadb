"""The benchmark's picture: ratios of every network, and the cost of one against batch and image size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator

from analysis.figures import save_figure

COLOURS = {"stock": "tab:blue", "against": "tab:orange"}


def draw(results: dict[str, Any], path: Path) -> Path:
    """Write the picture of what was measured; returns ``path``."""
    cells = results.get("speed", [])
    labels = {"stock": "stock Paddle", "against": results.get("against", "the other program")}
    sizes = sorted({cell["image_size"] for cell in cells})
    kinds = [(work, size) for work in ("training", "inference") for size in sizes]
    curves = [section for section in ("batch_sizes", "image_sizes") if results.get(section)]
    rows = -(-len(kinds) // 2) + bool(curves)
    figure = Figure(figsize=(11, 3.3 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False).flat
    for axes, (work, size) in zip(grid, sorted(kinds, key=lambda kind: kind[1]), strict=False):
        _ratios(axes, [cell for cell in cells if cell["work"] == work and cell["image_size"] == size],
                labels)
        axes.set_title(f"{work}, {size}×{size}: suite's images/s over those of", fontsize=10)
    used = len(kinds)
    for axes, section in zip(list(figure.axes)[used:], curves, strict=False):
        _curve(axes, results[section], section.removesuffix("s"))
        used += 1
    for axes in figure.axes[used:]:
        axes.set_axis_off()
    return save_figure(figure, path)


def _ratios(axes: Axes, cells: list[dict[str, Any]], labels: dict[str, str]) -> None:
    """Draw one bar for each network and program compared with, with the spread over rounds."""
    others = [name for name in COLOURS if any(name in cell["ratios"] for cell in cells)]
    width = 0.8 / max(len(others), 1)
    for place, other in enumerate(others):
        points = [(index, cell["ratios"][other]) for index, cell in enumerate(cells) if other in cell["ratios"]]
        middles = [found["median"] for _, found in points]
        spread = [[found["median"] - found["low"] for _, found in points],
                  [found["high"] - found["median"] for _, found in points]]
        bars = axes.bar([index + (place - (len(others) - 1) / 2) * width for index, _ in points], middles, width,
                        yerr=spread, capsize=2, color=COLOURS[other], label=labels[other], error_kw={"linewidth": 0.8})
        axes.bar_label(bars, [f"{value:.1f}" for value in middles], fontsize=8, padding=1)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cells)), [cell["model"] for cell in cells], fontsize=8, rotation=20, ha="right",
                    rotation_mode="anchor")
    axes.margins(y=0.15)
    if others:
        axes.legend(fontsize=8)


def _curve(axes: Axes, cells: list[dict[str, Any]], axis: str) -> None:
    fixed = "image_size" if axis == "batch_size" else "batch_size"
    for work in ("training", "inference"):
        points = sorted((cell[axis], 1e3 / cell["arms"]["suite"]["images_per_second"]) for cell in cells
                        if cell["work"] == work and "error" not in cell["arms"]["suite"])
        axes.plot(*zip(*points, strict=True), marker="o", label=work)
    values = sorted({cell[axis] for cell in cells})
    axes.set(xscale="log", yscale="log", xlabel=axis.replace("_", " "), ylabel="milliseconds an image")
    axes.set_title(f"{cells[0]['model']}, {fixed.replace('_', ' ')} {cells[0][fixed]}", fontsize=10)
    axes.set_xticks(values, list(map(str, values)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
