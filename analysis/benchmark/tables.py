"""The benchmark's results as tables and as a picture, for a terminal and for ``docs/PERFORMANCE.md``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure

from analysis.benchmark.measure import WORKS, Cell, Results
from analysis.figures import save_figure
from analysis.formatting import table
from errors import UserError
from utils.fileio import reading, write_text

_DASH = "–"
_RATIOS = {"best": "to the best", "float32": "float32 to the best float32", "stock": "to stock"}
_PLACE = re.compile(r"<!-- measured: (\w+) -->.*?<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Table:
    title: str
    headings: tuple[str, ...]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        return "\n\n".join([table(self.headings, self.rows), *self.notes])


def tables(results: Results) -> dict[str, Table]:
    """Return the tables of what was measured, by the names of their places in the page."""
    made = {"machine": _machine(results["machine"])} if "machine" in results else {}
    if "ceilings" in results:
        rows = [[name, f"{gflops:.0f}"] for name, gflops in results["ceilings"].items()]
        made["ceilings"] = Table("Matrix products of 2048×2048", ("by", "GFLOP/s"), rows)
    for work in ("training", "inference", "latency"):
        if cells := [cell for cell in results.get("speed", []) if cell["work"] == work]:
            made[work] = _speed(work, cells)
    return made


def check_page(path: Path) -> str:
    """Return the page's text; raises UserError where no ``<!-- measured: NAME -->`` to ``<!-- end -->`` is in it."""
    with reading(path, UnicodeDecodeError):
        text = path.read_text(encoding="utf-8")
    if not _PLACE.search(text):
        raise UserError(f"{path}: has no place for a table, expected <!-- measured: training --> and <!-- end -->")
    return text


def write_page(path: Path, results: Results) -> None:
    """Put the tables into their places in a page; raises UserError as ``check_page``."""
    made = tables(results)

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- measured: {name} -->\n\n{made[name].markdown()}\n\n<!-- end -->" if name in made else found[0]

    write_text(path, _PLACE.sub(fill, check_page(path)))


def draw(results: Results, path: Path) -> Path:
    """Write a panel for each image size and work: bars of each network's ratios, with the spread over rounds."""
    cells = results.get("speed", [])
    sizes = list(dict.fromkeys(cell["image_size"] for cell in cells))
    measured = [kind for kind in _RATIOS if any(kind in cell["ratios"] for cell in cells)]
    ratios = [kind for kind in measured if kind != "stock"] or measured  # stock Paddle needs a scale of its own
    width, rows = 0.8 / max(len(ratios), 1), max(len(sizes), 1)
    figure = Figure(figsize=(14, 3.2 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, len(WORKS), squeeze=False)
    for axes, (size, work) in zip(grid.flat, product(sizes, WORKS), strict=False):
        shown = [cell for cell in cells if (cell["image_size"], cell["work"]) == (size, work)]
        for number, kind in enumerate(ratios):
            found = [(index, cell["ratios"][kind]) for index, cell in enumerate(shown) if kind in cell["ratios"]]
            medians = [ratio["median"] for _, ratio in found]
            spread = [[ratio["median"] - ratio["low"] for _, ratio in found],
                      [ratio["high"] - ratio["median"] for _, ratio in found]]
            bars = axes.bar([index + (number - (len(ratios) - 1) / 2) * width for index, _ in found], medians, width,
                            yerr=spread, capsize=2, label=_RATIOS[kind], error_kw={"linewidth": 0.8})
            axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_title(f"{work}, {size}×{size}: speed of the suite over the best opponent's", fontsize=9)
        axes.set_xticks(range(len(shown)), [cell["model"] for cell in shown], fontsize=8, rotation=20, ha="right",
                        rotation_mode="anchor")
        axes.margins(y=0.15)
        axes.legend(fontsize=8)
    return save_figure(figure, path)


def _machine(machine: Cell) -> Table:
    kernels = machine["kernels"] or {}
    rows = [["processor", machine["processor"]], ["cores, threads", f"{machine['cores']}, {machine['threads']}"],
            ["system, Python", f"{machine['system']}, {machine['python']}"], ["Paddle", machine["paddle"]],
            ["set by the suite", ", ".join(machine["set_by_the_suite"]) or "nothing"],
            ["compiled operators", kernels.get("compiler") or str(kernels.get("reason"))],
            ["commit", str(machine["commit"])]]
    return Table("Machine", ("what", "found"), rows)


def _speed(work: str, cells: list[Cell]) -> Table:
    names = list(dict.fromkeys(name for cell in cells for name in cell["arms"]))
    kinds = [kind for kind in _RATIOS if any(kind in cell["ratios"] for cell in cells)]
    rows = [[cell["model"], str(cell["image_size"]), str(cell["batch_size"]),
             *(_ratio(cell["ratios"].get(kind), cell["arms"]) for kind in kinds),
             *(_shown(cell["arms"].get(name), work) for name in names),
             " / ".join(_share(cell["arms"].get(name)) for name in names if name.startswith("suite")),
             _peak(cell)] for cell in cells]
    failures = (f"{cell['model']}, {cell['image_size']}×{cell['image_size']}, {name}: {arm['error']}"
                for cell in cells for name, arm in cell["arms"].items() if "error" in arm)
    unit = "milliseconds" if work == "latency" else "images/s"
    return Table(f"{work.capitalize()}, {unit}", (
        "network", "image", "batch", *(_RATIOS[kind] for kind in kinds), *names, "of the ceiling", "memory, GB"), rows,
        tuple(failures))


def _shown(arm: Cell | None, work: str) -> str:
    """Return images/s, of latency milliseconds, in three digits: ``0.0123``, ``1.23``, ``123``, ``1,234``."""
    if not arm or "error" in arm:
        return _DASH
    value = 1e3 / arm["images_per_second"] if work == "latency" else arm["images_per_second"]
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _share(arm: Cell | None) -> str:
    return f"{arm['utilisation']:.0%}" if arm and "utilisation" in arm else _DASH


def _peak(cell: Cell) -> str:
    """Return the gigabytes of the fastest suite and of the fastest opponent."""
    best = cell["ratios"].get("best") or cell["ratios"].get("stock") or {}
    peaks = [cell["arms"][best[side]].get("peak_bytes") for side in ("suite", "opponent") if best]
    return " / ".join(f"{peak / 1e9:.2f}" if peak else _DASH for peak in peaks) or _DASH


def _ratio(found: Cell | None, arms: dict[str, Cell]) -> str:
    if not found:
        return _DASH
    names = f", {found['opponent']}" if len(arms) > 3 and found["opponent"] != "stock" else ""
    return f"{found['median']:.2f}× ({found['low']:.2f}–{found['high']:.2f}{names})"
