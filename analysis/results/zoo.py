"""The model zoo: what each network costs beside its paper's figures, as a table, and as the page ``MODEL_ZOO.md``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from analysis.complexity import Complexity, count
from analysis.formatting import UNITS, quantity, table
from analysis.parity import Parity, model_for
from errors import UserError
from models import ModelInfo, create_model, list_models, model_info

INTRODUCTION = """\
# Model zoo

Written by `python tools/summary.py --write MODEL_ZOO.md`; do not edit by hand.

**Acc@1** and **Acc@5** are what the authors publish on ImageNet-1k (validation, one crop). **#Params** (trainable) and
**FLOPs** (multiply-accumulates of one image) are counted by us with 1,000 classes at the image size given. In brackets:
how far ours are from the paper's (`=`: ours round to the paper's). Counted are convolutions, fully connected layers and
matrix products, not norms, activation functions, pooling, element-wise products and FFTs. **Link**: the authors'
weights, which `tools/convert.py` reads.

The **parity** tables compare our networks with the reference implementation on the same weights and images
(`python tools/parity.py`, on a CPU): the largest error of the logits in float32 and float64 over their standard
deviation, and for one training step in float64 the relative errors of logits, loss, gradients, and running statistics.
The references' numbers are stored in float32, so gradients and statistics end near 1e-7. A dash: not measured.
"""
MODEL_HEADINGS = ("Model", "Acc@1", "Acc@5", "#Params", "#Params (paper)", "FLOPs", "FLOPs (paper)", "Image Size",
                  "Crop_pct", "Interpolation", "Link")
PARITY_HEADINGS = ("Parity with the reference", "#Params", "Logits, float32", "Logits, float64", "Training logits",
                   "Loss", "Gradients", "Statistics")
TEXT_HEADINGS = ("model", "image", "parameters", "paper", "", "MACs", "paper", "", "activations")
_DASH = "–"


@dataclass(frozen=True)
class Row:
    info: ModelInfo
    num_classes: int
    image_size: tuple[int, int]
    complexity: Complexity

    @property
    def as_published(self) -> bool:
        """Return True where classes and image size are those of the paper's figures."""
        return self.num_classes == 1000 and self.image_size == (self.info.variant.image_size,) * 2

    @property
    def deviations(self) -> tuple[float | None, float | None]:
        """Return ours over the paper's parameters and multiply-accumulates, less 1; None for nothing to compare."""
        variant = self.info.variant
        pairs = (self.complexity.parameters, variant.paper_parameters), (self.complexity.macs, variant.paper_macs)
        return tuple(deviation(*pair) if self.as_published else None for pair in pairs)

    def record(self) -> dict[str, Any]:
        """Return the row for a JSON file; deviations are shares (0.01 is one percent)."""
        variant = self.info.variant
        return {
            "model": self.info.name, "family": self.info.family, "num_classes": self.num_classes,
            "image_size": list(self.image_size), **asdict(self.complexity),
            "paper_parameters": variant.paper_parameters or None, "parameters_deviation": self.deviations[0],
            "paper_macs": variant.paper_macs or None, "macs_deviation": self.deviations[1],
            "top1": variant.top1, "top5": variant.top5, "note": variant.note or None,
        }


def select(patterns: Sequence[str]) -> list[str]:
    """Return the models that names or shell patterns stand for, each once; all for none; UserError for no match."""
    names: dict[str, None] = {}
    for pattern in patterns or ["*"]:
        found = list_models(pattern) if re.search(r"[*?\[]", pattern) else [model_info(pattern).name]
        if not found:
            raise UserError(f"no model fits the pattern {pattern!r}; tools/summary.py lists all")
        names.update(dict.fromkeys(found))
    return list(names)


def measure(name: str, num_classes: int = 1000, image_size: tuple[int, int] | None = None) -> Row:
    """Build and count one network, by default at the image size of its variant."""
    info = model_info(name)
    size = image_size or (info.variant.image_size,) * 2
    return Row(info, num_classes, size, count(create_model(name, num_classes, size), size))


def deviation(value: int, figure: str) -> float | None:
    """Return ``value`` over a printed figure such as ``4.8G``, less 1: 0 if it rounds to it; None without a figure."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?([KMG])", figure)
    if not match:
        return None
    unit = UNITS[match[3]]
    number, half = float(figure[:-1]) * unit, 0.5 * unit / 10 ** len(match[2] or "")
    return 0.0 if abs(value - number) <= half else value / number - 1


def notes(infos: Iterable[ModelInfo]) -> dict[str, list[str]]:
    """Return the notes of these variants, each with the names that it is about."""
    about: dict[str, list[str]] = {}
    for info in infos:
        if info.variant.note:
            about.setdefault(info.variant.note, []).append(info.name)
    return about


def text_cells(row: Row) -> list[str]:
    variant, complexity = row.info.variant, row.complexity
    papers = (variant.paper_parameters, variant.paper_macs) if row.as_published else ("", "")
    return [row.info.name, "x".join(map(str, dict.fromkeys(row.image_size))),
            f"{complexity.parameters:,}", papers[0], _percent(row.deviations[0]), quantity(complexity.macs), papers[1],
            _percent(row.deviations[1]), quantity(complexity.activations)]


def page(rows: Mapping[str, Row], parities: Mapping[str, Parity], fixtures: Iterable[str]) -> str:
    """Return the page for all models; ``rows`` (by model) and ``parities`` (by fixture) are what was measured."""
    by_model: dict[str, list[str]] = {}
    for fixture in fixtures:
        by_model.setdefault(model_for(fixture)[0], []).append(fixture)
    families = groupby(map(model_info, list_models()), key=lambda info: (info.family, info.reference))
    return "\n".join([INTRODUCTION, *(_section(list(family), rows, parities, by_model) for _, family in families)])


def models_table(rows: Iterable[Row]) -> str:
    """Return the page's table for some measured models, as Markdown."""
    return table(MODEL_HEADINGS, (_model_cells(row.info, row) for row in rows))


def _section(family: list[ModelInfo], rows: Mapping[str, Row], parities: Mapping[str, Parity],
             fixtures: Mapping[str, list[str]]) -> str:
    first = family[0]
    repository, _, commit = first.reference.partition("@")
    source = f"https://github.com/{repository}" + (f"/tree/{commit}" if commit else "")
    lines = [f"## {first.family}: `{first.name}`" + (f" to `{family[-1].name}`" if family[1:] else ""), "",
             f"[{first.paper}]({first.paper_url}). Reference: [{first.reference}]({source}).", "",
             table(MODEL_HEADINGS, (_model_cells(info, rows.get(info.name)) for info in family))]
    noted = notes(family)
    if noted:
        lines += ["", *(f"- {'all' if len(names) == len(family) else ', '.join(f'`{name}`' for name in names)}: {note}."
                        for note, names in noted.items())]
    named = [fixture for info in family for fixture in fixtures.get(info.name, ())]
    if named:
        lines += ["", table(PARITY_HEADINGS, (_parity_cells(name, parities.get(name)) for name in named))]
    return "\n".join(lines) + "\n"


def _model_cells(info: ModelInfo, row: Row | None) -> list[str]:
    variant, parameters, macs = info.variant, _DASH, _DASH
    if row:
        shares = ["" if share is None else f" ({_percent(share)})" for share in row.deviations]
        parameters, macs = f"{row.complexity.parameters:,}{shares[0]}", f"{quantity(row.complexity.macs)}{shares[1]}"
    return [f"`{info.name}`", *(_DASH if value is None else str(value) for value in (variant.top1, variant.top5)),
            parameters, variant.paper_parameters or _DASH, macs, variant.paper_macs or _DASH, str(variant.image_size),
            str(variant.crop_pct or _DASH), variant.interpolation or _DASH,
            f"[file]({variant.weights_url})" if variant.weights_url else _DASH]


def _parity_cells(name: str, parity: Parity | None) -> list[str]:
    if parity is None:
        return [f"`{name}`"] + [_DASH] * (len(PARITY_HEADINGS) - 1)
    parameters = "equal" if parity.parameters == parity.reference_parameters else "**not equal**"
    return [f"`{name}`", parameters, *(_DASH if error is None else f"{error:.0e}" for error in parity.errors.values())]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.1f} %" if share else "="
