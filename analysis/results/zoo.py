"""The zoo measured: what each network costs, beside what its authors print, as a table and as a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.complexity import Complexity, count
from errors import UserError
from models import ModelInfo, create_model, list_models, model_info

TOLERANCE = 0.01
"""Deviations from a printed figure beyond this share are explained in a note."""

_UNITS = {"K": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Row:
    """One network as measured; ``as_published`` where its classes and image size are those of the paper's figures."""

    info: ModelInfo
    num_classes: int
    image_size: tuple[int, int]
    complexity: Complexity

    @property
    def as_published(self) -> bool:
        size = self.info.variant.image_size
        return self.num_classes == 1000 and self.image_size == (size, size)

    @property
    def parameters_deviation(self) -> float | None:
        """Return ours over the paper's trainable parameters less 1; None where there is nothing to compare."""
        return deviation(self.complexity.parameters, self.info.variant.paper_parameters) if self.as_published else None

    @property
    def macs_deviation(self) -> float | None:
        """Return ours over the paper's multiply-accumulates less 1; None where there is nothing to compare."""
        return deviation(self.complexity.macs, self.info.variant.paper_macs) if self.as_published else None

    def record(self) -> dict[str, Any]:
        """Return the row for a JSON file; deviations are shares (0.01 is one percent)."""
        variant = self.info.variant
        return {
            "model": self.info.name, "family": self.info.family, "num_classes": self.num_classes,
            "image_size": list(self.image_size), "parameters": self.complexity.parameters,
            "macs": self.complexity.macs, "activations": self.complexity.activations,
            "paper_parameters": variant.paper_parameters or None, "parameters_deviation": self.parameters_deviation,
            "paper_macs": variant.paper_macs or None, "macs_deviation": self.macs_deviation,
            "top1": variant.top1, "top5": variant.top5, "note": variant.note or None,
        }


def select(patterns: Sequence[str]) -> list[str]:
    """Return the models that names or shell patterns stand for, each once; all of the registry for none.

    Raises UserError for an unknown name, naming the nearest, and for a pattern that fits nothing.
    """
    names: dict[str, None] = {}
    for pattern in patterns or ["*"]:
        if re.search(r"[*?\[]", pattern):
            found = list_models(pattern)
            if not found:
                raise UserError(f"no model fits the pattern {pattern!r}; tools/summary.py lists all")
        else:
            found = [model_info(pattern).name]
        names.update(dict.fromkeys(found))
    return list(names)


def measure(name: str, num_classes: int = 1000, image_size: tuple[int, int] | None = None) -> Row:
    """Build and count one network, by default at the image size of its variant."""
    info = model_info(name)
    size = image_size or (info.variant.image_size,) * 2
    model = create_model(name, num_classes=num_classes, image_size=size[0] if size[0] == size[1] else size)
    return Row(info, num_classes, size, count(model, size))


def printed_value(figure: str) -> tuple[float, float] | None:
    """Return the number that a paper prints (``4.8G``) and half the last digit's worth; None where it prints none."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?([KMG])", figure)
    if not match:
        return None
    unit = _UNITS[match[3]]
    return float(figure[:-1]) * unit, 0.5 * unit / 10 ** len(match[2] or "")


def deviation(value: int, figure: str) -> float | None:
    """Return ``value`` over a printed figure, less 1: 0 where it rounds to the figure; None without a figure."""
    printed = printed_value(figure)
    if printed is None:
        return None
    number, half = printed
    return 0.0 if abs(value - number) <= half else value / number - 1


def explained(info: ModelInfo, deviations: Iterable[float | None]) -> bool:
    """Tell whether every deviation is small or the variant's note says where it comes from."""
    return bool(info.variant.note) or all(abs(value or 0) <= TOLERANCE for value in deviations)


HEADINGS = ("image", "parameters", "paper", "", "MACs", "paper", "", "activations")
_WIDTHS = (9, 13, 9, 9, 10, 9, 9, 13)


def heading(names: Sequence[str]) -> str:
    """Return the first line of the text table for these models."""
    return _line("model", HEADINGS, names)


def line(row: Row, names: Sequence[str]) -> str:
    """Return a row of the text table."""
    variant, complexity = row.info.variant, row.complexity
    height, width = row.image_size
    published = row.as_published
    cells = (
        str(height) if height == width else f"{height}x{width}",
        f"{complexity.parameters:,}",
        variant.paper_parameters if published else "",
        percent(row.parameters_deviation),
        quantity(complexity.macs),
        variant.paper_macs if published else "",
        percent(row.macs_deviation),
        quantity(complexity.activations),
    )
    return _line(row.info.name, cells, names)


def notes(infos: Iterable[ModelInfo]) -> dict[str, list[str]]:
    """Return the notes of these variants, each with the names that it is about."""
    about: dict[str, list[str]] = {}
    for info in infos:
        if info.variant.note:
            about.setdefault(info.variant.note, []).append(info.name)
    return about


def quantity(value: int) -> str:
    """Return a count in four digits with its unit: ``4.826G``, ``92.0M``."""
    for unit, size in reversed(_UNITS.items()):
        if value >= size:
            return f"{value / size:.3f}{unit}" if unit == "G" else f"{value / size:.1f}{unit}"
    return str(value)


def percent(share: float | None) -> str:
    """Return a deviation in percent, nothing for None."""
    return "" if share is None else f"{100 * share:+.1f} %" if share else "="


def _line(name: str, cells: Sequence[str], names: Sequence[str]) -> str:
    width = max(map(len, names), default=0)
    return f"{name:{width}}" + "".join(f"{cell:>{size}}" for cell, size in zip(cells, _WIDTHS, strict=True))
