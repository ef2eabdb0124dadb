"""The benchmark's results as tables: for a terminal and for ``docs/PERFORMANCE.md``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.formatting import table
from errors import UserError
from utils.fileio import unreadable, write_text

Results = dict[str, Any]
Cell = dict[str, Any]
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
        made["ceilings"] = _ceilings(results["ceilings"])
    for work in ("training", "inference"):
        if cells := [cell for cell in results.get("speed", []) if cell["work"] == work]:
            made[work] = _speed(work, cells)
    if "pipelines" in results:
        made["pipelines"] = _pipelines(results["pipelines"])
    return made | {name: _sizes(results[name], name.removesuffix("s")) for name in ("batch_sizes", "image_sizes")
                   if name in results}


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


def _ceilings(ceilings: Cell) -> Table:
    names = {"kernels": "the suite's", "suite": "Paddle with the suite's settings", "stock": "stock Paddle"}
    rows = [[f"matrix product 2048³, {names.get(name, name)}", f"{product['gflops']:.0f} GFLOP/s"]
            for name, product in ceilings["products"].items()]
    return Table(f"Ceilings, {ceilings['threads']} threads", ("what", "measured"), rows)


def _speed(work: str, cells: list[Cell]) -> Table:
    names = list(dict.fromkeys(name for cell in cells for name in cell["arms"]))
    rows = [[cell["model"], str(cell["image_size"]), str(cell["batch_size"]),
             *(_rate(cell["arms"].get(name)) for name in names), _share(cell["arms"]["suite"]),
             " / ".join(_peak(cell["arms"].get(name)).removesuffix(" GB") for name in names) + " GB",
             *(_ratio(cell, name) for name in names[1:])] for cell in cells]
    return Table(f"{work.capitalize()}, images/s", (
        "network", "image", "batch", *names, "of the ceiling", "memory", *(f"to {name}" for name in names[1:])), rows,
        _failures(cells))


def _sizes(cells: list[Cell], axis: str) -> Table:
    fixed, heading = "image_size" if axis == "batch_size" else "batch_size", axis.replace("_", " ")
    by_size: dict[int, dict[str, Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell[axis]):
        by_size.setdefault(cell[axis], {})[cell["work"]] = cell["arms"]["suite"]
    rows = [[str(size), *(text for arm in map(works.get, ("training", "inference"))
                          for text in (_milliseconds(arm), _share(arm), _peak(arm)))]
            for size, works in by_size.items()]
    return Table(f"{heading.capitalize()}: {cells[0]['model']}, {fixed.replace('_', ' ')} {cells[0][fixed]}",
                 (heading, "training, ms an image", "of the ceiling", "memory", "inference, ms an image",
                  "of the ceiling", "memory"), rows, _failures(cells))


def _pipelines(cells: list[Cell]) -> Table:
    names = list(dict.fromkeys(name for cell in cells for name in cell["arms"]))
    rows = [[cell["recipe"], *(_rate(cell["arms"].get(name)) for name in names),
             *(_ratio(cell, name) for name in names[1:])] for cell in cells]
    return Table("Input pipelines, images/s", ("recipe", *names, *(f"to {name}" for name in names[1:])), rows,
                 _failures(cells))


def _rate(arm: Cell | None) -> str:
    """Return images/s in three digits: ``0.0123``, ``1.23``, ``123``, ``1,234``."""
    if not arm or "error" in arm:
        return _DASH
    value = arm["images_per_second"]
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _milliseconds(arm: Cell | None) -> str:
    return f"{1e3 / arm['images_per_second']:.3g}" if arm and "error" not in arm else _DASH


def _share(arm: Cell | None) -> str:
    return f"{arm['utilisation']:.0%}" if arm and "utilisation" in arm else _DASH


def _peak(arm: Cell | None) -> str:
    return f"{arm['peak_bytes'] / 1e9:.2f} GB" if arm and arm.get("peak_bytes") else _DASH


def _ratio(cell: Cell, name: str) -> str:
    found = cell["ratios"].get(name)
    return f"{found['median']:.2f}× ({found['low']:.2f}–{found['high']:.2f})" if found else _DASH


def _failures(cells: Iterable[Cell]) -> tuple[str, ...]:
    return tuple(f"{cell.get('model') or cell.get('recipe')}, {name}: {arm['error']}"
                 for cell in cells for name, arm in cell["arms"].items() if "error" in arm)
