"""``MODEL_ZOO.md``: every network with its published figures, our counts, and the parity errors achieved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby

from analysis.markdown import table
from analysis.parity import Parity, model_for
from analysis.results.zoo import Row, notes, percent, quantity
from models import ModelInfo, list_models, model_info

INTRODUCTION = """\
# Model zoo

Written by `python tools/summary.py --write MODEL_ZOO.md`; do not edit by hand.

**Acc@1** and **Acc@5** are what the authors publish on ImageNet-1k (validation, one crop). **#Params** (trainable) and
**FLOPs** (multiply-accumulates of one image, as papers use the word) are counted by us with 1,000 classes at the image
size given; behind them stand the paper's figures and how far ours are from them (`=`: ours round to the paper's).
Counted are convolutions, fully connected layers and matrix products, not norms, activation functions, pooling,
element-wise products and FFTs. **Link** leads to the authors' weights; `tools/convert.py` reads them.

The **parity** tables hold our networks against the reference implementation on the same weights and images
(`python tools/parity.py`, on a CPU): largest error of the logits in single and double precision over their standard
deviation; and of one training step in double precision the relative error of logits, loss, gradients, and running
statistics of the batch norms. The references' numbers are kept in single precision, so gradients and statistics end
near 1e-7. A dash: not measured by that fixture.
"""
MODEL_HEADINGS = ("Model", "Acc@1", "Acc@5", "#Params", "#Params (paper)", "FLOPs", "FLOPs (paper)", "Image Size",
                  "Crop_pct", "Interpolation", "Link")
PARITY_HEADINGS = ("Parity with the reference", "#Params", "Logits, float32", "Logits, float64", "Training logits",
                   "Loss", "Gradients", "Statistics")
_DASH = "–"


def page(rows: Mapping[str, Row], parities: Mapping[str, Parity], fixtures: Iterable[str]) -> str:
    """Return the page for all registered models and these fixtures.

    ``rows`` (by model) and ``parities`` (by fixture) are what was measured; a dash stands for what was not.
    """
    by_model: dict[str, list[str]] = {}
    for fixture in fixtures:
        by_model.setdefault(model_for(fixture)[0], []).append(fixture)
    parts = [INTRODUCTION]
    for _, family in groupby(map(model_info, list_models()), key=_source):
        parts.append(_section(list(family), rows, parities, by_model))
    return "\n".join(parts)


def models_table(rows: Iterable[Row]) -> str:
    """Return the page's table for some measured models, as Markdown."""
    return table(MODEL_HEADINGS, (_model_cells(row.info, row) for row in rows))


def _source(info: ModelInfo) -> tuple[str, str]:
    return info.family, info.reference


def _section(family: list[ModelInfo], rows: Mapping[str, Row], parities: Mapping[str, Parity],
             fixtures: Mapping[str, list[str]]) -> str:
    first = family[0]
    repository, _, commit = first.reference.partition("@")
    source = f"https://github.com/{repository}" + (f"/tree/{commit}" if commit else "")
    lines = [f"## {first.family}: `{first.name}`" + (f" to `{family[-1].name}`" if family[1:] else ""), "",
             f"[{first.paper}]({first.paper_url}). Reference: [{first.reference}]({source}).", ""]
    lines += [table(MODEL_HEADINGS, (_model_cells(info, rows.get(info.name)) for info in family))]
    noted = notes(family)
    if noted:
        lines += ["", *(f"- {'all' if len(names) == len(family) else ', '.join(f'`{name}`' for name in names)}: {note}."
                        for note, names in noted.items())]
    named = [fixture for info in family for fixture in fixtures.get(info.name, ())]
    if named:
        lines += ["", table(PARITY_HEADINGS, (_parity_cells(name, parities.get(name)) for name in named))]
    return "\n".join(lines) + "\n"


def _model_cells(info: ModelInfo, row: Row | None) -> list[str]:
    variant = info.variant
    parameters = macs = _DASH
    if row:
        parameters = f"{row.complexity.parameters:,}" + _beside(row.parameters_deviation)
        macs = quantity(row.complexity.macs) + _beside(row.macs_deviation)
    return [f"`{info.name}`", _accuracy(variant.top1), _accuracy(variant.top5), parameters,
            variant.paper_parameters or _DASH, macs, variant.paper_macs or _DASH, str(variant.image_size),
            str(variant.crop_pct or _DASH), variant.interpolation or _DASH,
            f"[file]({variant.weights_url})" if variant.weights_url else _DASH]


def _parity_cells(name: str, parity: Parity | None) -> list[str]:
    if parity is None:
        return [f"`{name}`"] + [_DASH] * (len(PARITY_HEADINGS) - 1)
    errors = (parity.logits_float32, parity.logits_float64, parity.train_logits, parity.loss, parity.gradients,
              parity.running_stats)
    parameters = "equal" if parity.parameters == parity.reference_parameters else "**not equal**"
    return [f"`{name}`", parameters, *(_DASH if error is None else f"{error:.0e}" for error in errors)]


def _accuracy(value: float | None) -> str:
    return _DASH if value is None else str(value)


def _beside(deviation: float | None) -> str:
    return "" if deviation is None else f" ({percent(deviation)})"
