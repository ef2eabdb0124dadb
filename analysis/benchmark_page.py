"""What the benchmark found, as tables: for a terminal and for ``docs/PERFORMANCE.md``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.markdown import table
from engine.files import write_text
from errors import UserError

Results = dict[str, Any]
Cell = dict[str, Any]
_DASH = "–"
_PLACE = re.compile(r"<!-- measured: (\w+) -->.*?<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Table:
    """A title, headings, and rows of as many texts; ``notes`` stand below."""

    title: str
    headings: tuple[str, ...]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """Return the table as the page has it."""
        return "\n\n".join([table(self.headings, self.rows), *self.notes])


def tables(results: Results) -> dict[str, Table]:
    """Return the tables of what was measured, by the names of their places in the page."""
    makers: dict[str, Callable[[Results], Table]] = {
        "machine": _machine, "ceilings": _ceilings, "training": _speed("training"), "inference": _speed("inference"),
        "pipelines": _pipelines, "batch_sizes": _sizes("batch_sizes", "Batch size"),
        "image_sizes": _sizes("image_sizes", "Image size")}
    needed = {"training": "speed", "inference": "speed"}
    return {name: make(results) for name, make in makers.items() if results.get(needed.get(name, name))}


def check_page(path: Path) -> str:
    """Return the page's text; raises UserError for one without a place ``<!-- measured: NAME -->`` to ``<!-- end -->``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
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


def rate(value: float) -> str:
    """Return a number in three digits: ``0.0123``, ``1.23``, ``123``, ``1,234``."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _machine(results: Results) -> Table:
    machine = results["machine"]
    kernels = machine["kernels"] or {}
    rows = [["processor", machine["processor"]], ["cores, threads", f"{machine['cores']}, {machine['threads']}"],
            ["system, Python", f"{machine['system']}, {machine['python']}"], ["Paddle", machine["paddle"]],
            ["set by the suite", ", ".join(machine["set_by_the_suite"]) or "nothing"],
            ["compiled operators", kernels.get("compiler") or str(kernels.get("reason"))],
            ["commit", str(machine["commit"])]]
    return Table("Machine", ("what", "found"), rows)


def _ceilings(results: Results) -> Table:
    ceilings = results["ceilings"]
    names = {"kernels": "the suite's", "suite": "Paddle with the settings", "stock": "stock Paddle",
             "against": _shown("against", results)}
    rows = [[f"matrix product 2048³, {names[name]}", f"{product['gflops']:.0f} GFLOP/s"]
            for name, product in ceilings["products"].items()]
    rows += [[f"memory, {name}", f"{value:.1f} GB/s"] for name, value in ceilings["bandwidth"].items()]
    return Table(f"Ceilings, {ceilings['threads']} threads", ("what", "measured"), rows)


def _speed(work: str) -> Callable[[Results], Table]:
    def make(results: Results) -> Table:
        cells = [cell for cell in results["speed"] if cell["work"] == work]
        others = _others(cells)
        shown = [_shown(name, results) for name in others]
        headings = ["network", "image", "batch", "suite", *shown, "of the ceiling", "memory",
                    *(f"to {name}" for name in shown)]
        rows = []
        for cell in cells:
            suite = cell["arms"]["suite"]
            rows.append([cell["model"], str(cell["image_size"]), str(cell["batch_size"]),
                         *(_rate(cell["arms"].get(name)) for name in ("suite", *others)), _share(suite),
                         _memory(cell["arms"], ("suite", *others)), *(_ratio(cell, name) for name in others)])
        return Table(f"{work.capitalize()}, images/s", tuple(headings), rows, _failures(cells))

    return make


def _sizes(section: str, heading: str) -> Callable[[Results], Table]:
    axis = section.removesuffix("s")
    other = "image_size" if axis == "batch_size" else "batch_size"

    def make(results: Results) -> Table:
        cells = sorted(results[section], key=lambda cell: cell[axis])
        by_size: dict[int, dict[str, Cell]] = {}
        for cell in cells:
            by_size.setdefault(cell[axis], {})[cell["work"]] = cell["arms"]["suite"]
        rows = [[str(size), *(text for work in ("training", "inference")
                              for text in (_milliseconds(works.get(work)), _share(works.get(work, {})),
                                           _peak(works.get(work))))] for size, works in by_size.items()]
        fixed = f"{cells[0]['model']}, {other.replace('_', ' ')} {cells[0][other]}"
        return Table(f"{heading}: {fixed}",
                     (heading.lower(), "training, ms an image", "of the ceiling", "memory", "inference, ms an image",
                      "of the ceiling", "memory"), rows, _failures(cells))

    return make


def _pipelines(results: Results) -> Table:
    cells = results["pipelines"]
    names = list(dict.fromkeys(name for cell in cells for name in cell["arms"]))
    others = names[1:]
    rows = [[cell["recipe"], *(_rate(cell["arms"].get(name)) for name in names),
             *(_ratio(cell, name) for name in others)] for cell in cells]
    return Table("Input pipelines, images/s", ("recipe", *names, *(f"to {name}" for name in others)), rows,
                 _failures(cells))


def _others(cells: Iterable[Cell]) -> list[str]:
    return [name for name in dict.fromkeys(name for cell in cells for name in cell["arms"]) if name != "suite"]


def _shown(name: str, results: Results) -> str:
    return results.get("against", "against") if name == "against" else name


def _rate(arm: Cell | None) -> str:
    return rate(arm["images_per_second"]) if arm and "error" not in arm else _DASH


def _milliseconds(arm: Cell | None) -> str:
    return f"{1e3 / arm['images_per_second']:.3g}" if arm and "error" not in arm else _DASH


def _share(arm: Cell) -> str:
    return f"{arm['utilisation']:.0%}" if "utilisation" in arm else _DASH


def _peak(arm: Cell | None) -> str:
    return f"{arm['peak_bytes'] / 1e9:.2f} GB" if arm and arm.get("peak_bytes") else _DASH


def _memory(arms: dict[str, Cell], names: Iterable[str]) -> str:
    return " / ".join(_peak(arms.get(name)).removesuffix(" GB") for name in names) + " GB"


def _ratio(cell: Cell, name: str) -> str:
    found = cell["ratios"].get(name)
    return f"{found['median']:.2f}× ({found['low']:.2f}–{found['high']:.2f})" if found else _DASH


def _failures(cells: Iterable[Cell]) -> tuple[str, ...]:
    return tuple(f"{cell.get('model') or cell.get('recipe')}, {name}: {arm['error']}"
                 for cell in cells for name, arm in cell["arms"].items() if "error" in arm)
