"""The benchmark's results as tables: for a terminal and for ``docs/PERFORMANCE.md``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from analysis.benchmark.measure import Cell, Results
from analysis.formatting import table
from errors import UserError
from utils.fileio import unreadable, write_text

_DASH = "–"
_PLACE = re.compile(r"<!-- measured: (\w+) -->.*?<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Table:
    """A title, headings, rows of as many texts, and notes below."""

    title: str
    headings: tuple[str, ...]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """Return the table as the page has it."""
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
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from None
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
    kinds = [kind for kind in ("best", "float32", "stock") if any(kind in cell["ratios"] for cell in cells)]
    headings = {"best": "to the best", "float32": "float32 to the best float32", "stock": "to stock"}
    rows = [[cell["model"], str(cell["image_size"]), str(cell["batch_size"]),
             *(_ratio(cell["ratios"].get(kind), cell["arms"]) for kind in kinds),
             *(_shown(cell["arms"].get(name), work) for name in names),
             " / ".join(_share(cell["arms"].get(name)) for name in names if name.startswith("suite")),
             _peak(cell)] for cell in cells]
    failures = (f"{cell['model']}, {cell['image_size']}×{cell['image_size']}, {name}: {arm['error']}"
                for cell in cells for name, arm in cell["arms"].items() if "error" in arm)
    unit = "milliseconds" if work == "latency" else "images/s"
    return Table(f"{work.capitalize()}, {unit}", (
        "network", "image", "batch", *(headings[kind] for kind in kinds), *names, "of the ceiling", "memory, GB"), rows,
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
