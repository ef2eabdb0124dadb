"""The benchmark's picture: the ratios of every network to every opponent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis.figures import save_figure


def draw(results: dict[str, Any], path: Path) -> Path:
    """Write a panel for each work and image size: a bar for each network and opponent, with the spread over rounds."""
    cells = results.get("speed", [])
    kinds = sorted({(cell["image_size"], cell["work"]) for cell in cells}, key=lambda kind: (kind[0], kind[1] < "t"))
    opponents = list(dict.fromkeys(name for cell in cells for name in cell["ratios"]))
    width = 0.8 / max(len(opponents), 1)
    rows = max(1, -(-len(kinds) // 2))
    figure = Figure(figsize=(11, 3.3 * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes, (size, work) in zip(panels, kinds, strict=False):
        shown = [cell for cell in cells if (cell["image_size"], cell["work"]) == (size, work)]
        for number, name in enumerate(opponents):
            found = [(index, cell["ratios"][name]) for index, cell in enumerate(shown) if name in cell["ratios"]]
            spread = [[ratio["median"] - ratio["low"] for _, ratio in found],
                      [ratio["high"] - ratio["median"] for _, ratio in found]]
            bars = axes.bar([index + (number - (len(opponents) - 1) / 2) * width for index, _ in found],
                            [ratio["median"] for _, ratio in found], width, yerr=spread, capsize=2, label=name,
                            color=f"C{number}", error_kw={"linewidth": 0.8})
            axes.bar_label(bars, [f"{ratio['median']:.1f}" for _, ratio in found], fontsize=8, padding=1)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_title(f"{work}, {size}×{size}: suite's images/s over those of", fontsize=10)
        axes.set_xticks(range(len(shown)), [cell["model"] for cell in shown], fontsize=8, rotation=20, ha="right",
                        rotation_mode="anchor")
        axes.margins(y=0.15)
        axes.legend(fontsize=8)
    for axes in panels[len(kinds):]:
        axes.set_axis_off()
    return save_figure(figure, path)
