"""The benchmark's picture: the ratios of every network to the best opponents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis.figures import save_figure

LABELS = {"best": "best against best", "float32": "float32 against float32", "stock": "best against stock Paddle"}


def draw(results: dict[str, Any], path: Path) -> Path:
    """Write a panel for each image size and work: bars of each network's ratios, with the spread over rounds."""
    cells = results.get("speed", [])
    panels = list(dict.fromkeys((cell["image_size"], cell["work"]) for cell in cells))
    measured = [kind for kind in LABELS if any(kind in cell["ratios"] for cell in cells)]
    ratios = [kind for kind in measured if kind != "stock"] or measured  # stock Paddle needs a scale of its own
    width, columns = 0.8 / max(len(ratios), 1), 3
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(14, 3.2 * rows + 0.3), layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (size, work) in zip(places, panels, strict=False):
        shown = [cell for cell in cells if (cell["image_size"], cell["work"]) == (size, work)]
        for number, kind in enumerate(ratios):
            found = [(index, cell["ratios"][kind]) for index, cell in enumerate(shown) if kind in cell["ratios"]]
            spread = [[ratio["median"] - ratio["low"] for _, ratio in found],
                      [ratio["high"] - ratio["median"] for _, ratio in found]]
            bars = axes.bar([index + (number - (len(ratios) - 1) / 2) * width for index, _ in found],
                            [ratio["median"] for _, ratio in found], width, yerr=spread, capsize=2, label=LABELS[kind],
                            color=f"C{number}", error_kw={"linewidth": 0.8})
            axes.bar_label(bars, [f"{ratio['median']:.2f}" for _, ratio in found], fontsize=7, padding=1)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_title(f"{work}, {size}×{size}: speed of the suite over the best opponent's", fontsize=9)
        axes.set_xticks(range(len(shown)), [cell["model"] for cell in shown], fontsize=8, rotation=20, ha="right",
                        rotation_mode="anchor")
        axes.margins(y=0.15)
        axes.legend(fontsize=8)
    for axes in places[len(panels):]:
        axes.set_axis_off()
    return save_figure(figure, path)
