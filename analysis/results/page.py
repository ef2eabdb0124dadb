"""``RESULTS.md``: what was trained, what it reached, what it cost, and what was tried; all from files, none by hand."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from analysis.markdown import table
from analysis.results.run_record import commands_of
from engine.weights.released import RESULTS, check_released, released_names
from errors import UserError
from utils.fileio import read_json

PLOT = "docs/results.png"
IMAGES_OF_AN_EPOCH = 50_000  # of CIFAR-10, where a published figure tells epochs alone
BACKWARD = 3  # forward and backward pass, in forward passes
INTRODUCTION = """\
# Results

Written by `python tools/results.py --write RESULTS.md`; do not edit by hand.

**Selected** are the weights of the epoch that was best on held-out training images, of a run that held none out those
of the last epoch; they, or a mean with them where that is told, are released, and their figures, top-5 and ECE too, are
those of the file in `checkpoints/` as it is there. **Final** are the weights of the last epoch, with the figure of the
run itself. **ECE** is the expected calibration error (15 bins). "CIFAR-10 (JPEG re-encoding)" is a copy of CIFAR-10
whose pixels went through JPEG; order, labels and split are the official ones. Behind figures on fewer than 10,000
images stands one standard error, and in brackets the figure on the re-encoded pixels of the same pictures. Shares are
in %. Times and images/s are those of training alone, without evaluations; MACs are multiply-accumulates of one image,
of a training 3 × MACs × images seen, and those of one forward pass where it has teachers.
"""
EVALUATING = """\
## Evaluating

```
python tools/eval.py -w {name}
python tools/eval.py -w {name} -o DATA.ROOT=FOLDER
```

The weights are checked against their SHA-256, the data set is looked for in `data/` or the FOLDER (and downloaded where
it is missing), and the figures are printed beside those above.
"""
_DASH = "–"
_GONE = " (no longer in `checkpoints/`; made by the commands before its own)"
_TEXT = "checkpoint", "family", "network", "machine", "command", "changed", "note", "data", "published by"


@dataclass(frozen=True)
class Trained:
    """A released checkpoint: its name, its ``results.json`` and its ``seeds.csv`` (text)."""

    name: str
    results: dict[str, Any]
    seeds: list[dict[str, str]]

    @property
    def main(self) -> dict[str, Any]:
        """Return the figures on the data set that it was trained for."""
        return self.results["test"][0]

    @property
    def before(self) -> dict[str, Any]:
        """Return what the checkpoint whose weights it started from had cost; empty where it started from none."""
        return self.results["training"].get("before", {})

    @property
    def teachers(self) -> list[str]:
        """Return the names of the checkpoints whose predictions it learned from beside the labels."""
        return list(self.results["training"].get("teachers", {}))

    @property
    def epochs(self) -> str:
        """Return its epochs, behind those of the checkpoint that it started from: ``30 + 11``."""
        own = str(self.results["training"]["epochs"])
        return f"{self.before['epochs']} + {own}" if self.before else own

    def spent(self, key: str) -> float:
        """Return the ``seconds`` or ``macs`` of its training and of what it started from."""
        return self.results["training"][key] + self.before.get(key, 0)


def read_released(folder: Path, names: Iterable[str] | None = None) -> list[Trained]:
    """Return the checkpoints of a folder by name; UserError where one is not as it was released."""
    found = []
    for name in released_names(folder) if names is None else names:
        check_released(folder / name)
        results = read_json(folder / name / RESULTS)
        try:
            results["training"]["seconds"], results["test"][0]["top1"], results["parameters"], results["macs"]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{folder / name / RESULTS}: not the results of a released checkpoint, as tools/release.py "
                            "writes them") from None
        found.append(Trained(name, results, read_rows(folder / name / "seeds.csv")))
    return found


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a heading; none where there is no file; UserError where it is no table."""
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), restkey="", restval=None))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for number, row in enumerate(rows, 2):
        if "" in row or None in row.values():
            raise UserError(f"{path}: row {number} has not as many cells as the heading")
    return rows


def page(trained: Sequence[Trained], published: Sequence[Mapping[str, str]],
         recipes: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """Return the page; ``recipes`` are the tables of what was tried, by family."""
    parts = [INTRODUCTION]
    if trained:
        parts += [*_accuracies(trained), _costs(trained), _beside(trained, published), _seeds(trained),
                  EVALUATING.format(name=trained[0].name)]
    else:
        parts += ["## Released checkpoints\n\nNone yet.\n", _beside(trained, published)]
    if recipes:
        parts += ["## What was tried\n", *(_tried(name, rows) for name, rows in recipes.items())]
    return "\n".join(part for part in parts if part)


def terminal_table(trained: Sequence[Trained]) -> list[str]:
    """Return a line for each checkpoint."""
    width = max([len(each.name) for each in trained] + [10])
    lines = [f"{'checkpoint':<{width}} {'top-1':>8} {'params':>10} {'MACs':>7} {'epochs':>7} {'training':>9}  data"]
    for each in trained:
        results = each.results
        lines.append(f"{each.name:<{width}} {each.main['top1']:8.2%} {results['parameters']:10,} "
                     f"{quantity(results['macs']):>7} {each.epochs:>7} {duration(each.spent('seconds')):>9}  "
                     f"{each.main['data']}")
    return lines


def quantity(number: float) -> str:
    """Return a count in M or G, with three digits."""
    for limit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.3g}{letter}" if number < 999.5 * limit else f"{number / limit:,.0f}{letter}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """Return a time in the unit that fits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return table(headings, rows, _TEXT) + "\n"


def share(value: float | None, images: int = 0) -> str:
    """Return a share in %, with the standard error that so many images leave."""
    if value is None:
        return _DASH
    error = f" ± {100 * math.sqrt(value * (1 - value) / images):.2f}" if images else ""
    return f"{100 * value:.2f}{error}"


def _accuracies(trained: Sequence[Trained]) -> list[str]:
    """Return a table for each data set, in % of the test images."""
    parts = ["## Released checkpoints\n"]
    for data, group in groupby(sorted(trained, key=lambda each: each.main["data"]), key=lambda each: each.main["data"]):
        rows = sorted(group, key=lambda each: -each.main["top1"])
        others = list(dict.fromkeys(row["data"] for each in rows for row in each.results["test"][1:]))
        headings = ["Checkpoint", "Family", "#Params", "MACs", "Top-1 selected", "Top-1 final", "Top-5", "ECE",
                    *(f"Top-1 on {other}" for other in others), "Weights"]
        parts += [f"### {data}\n", _table(headings, (_accuracy_cells(each, others) for each in rows))]
        told = [f"`{each.name}` held no images out: its final weights are released, none were selected" for each in rows
                if each.results["weights"]["kind"] == "final"]
        told += [f"`{each.name}` is the mean of the run's selected weights and those of "
                 f"`{each.before['checkpoint']}` that it started from: {_held_out(each.results['weights'])}"
                 for each in rows if each.results["weights"]["kind"] == "averaged"]
        told += [f"`{each.name}` was selected on the test set" for each in rows
                 if each.results["weights"]["kind"] == "selected" and each.results.get("selected_on") == "test"]
        told += [f"`{each.name}` stands after {each.results['training']['epochs']} of "
                 f"{each.results['training']['epochs_planned']} epochs" for each in rows if "final" not in each.results]
        parts += ["".join(f"- {line}.\n" for line in told)]
    return [*parts, f"![Accuracy against training cost]({PLOT})\n"]


def _held_out(weights: Mapping[str, Any]) -> str:
    return (f"{share(weights['holdout_top1'])} % of the held-out images, the selected ones alone "
            f"{share(weights['selected_holdout_top1'])} %")


def _accuracy_cells(each: Trained, others: Sequence[str]) -> list[str]:
    results, main = each.results, each.main
    elsewhere = {row["data"]: share(row["top1"], row["images"]) + _same_pictures(row) for row in results["test"][1:]}
    final = results["final"]["test"]["top1"] if "final" in results else None
    weights = results["weights"]
    return [f"`{each.name}`", results["family"], f"{results['parameters']:,}", quantity(results["macs"]),
            share(main["top1"], 0 if main["images"] >= 10_000 else main["images"]), share(final), share(main["top5"]),
            share(main.get("ece")), *(elsewhere.get(other, _DASH) for other in others),
            f"{weights['precision'].split()[0]}, {weights['bytes'] / 1e6:.1f} MB"]


def _same_pictures(row: Mapping[str, Any]) -> str:
    return f" ({share(row['same_pictures_top1'])})" if "same_pictures_top1" in row else ""


def _costs(trained: Sequence[Trained]) -> str:
    rows, commands, told, names = [], [], [], {each.name for each in trained}
    for each in sorted(trained, key=lambda each: each.spent("macs")):
        training = each.results["training"]
        precision = "" if training["precision"] == "float32" else f", {training['precision']}"
        rate = _DASH if training["images_per_second"] is None else f"{training['images_per_second']:,.0f}"
        rows.append([f"`{each.name}`", each.epochs, duration(each.spent("seconds")), rate,
                     quantity(each.spent("macs")), "; then ".join(training["machines"]) + precision])
        start = each.before.get("checkpoint")
        gone = start is not None and start not in names
        commands += [f"# {each.name}", *(each.before.get("commands", []) if gone else []), *commands_of(each.results)]
        if start:
            told.append(f"- `{each.name}` starts from the weights of `{start}`{_GONE if gone else ''}: its time and "
                        "MACs are those of all its trainings, images/s and machine of the last.\n")
        if each.teachers:
            told.append(f"- `{each.name}` learns from {' and '.join(f'`{name}`' for name in each.teachers)} too: a "
                        "forward pass of each for every image is in its MACs, their own trainings are not.\n")
    headings = ("Checkpoint", "Epochs", "Training time", "Images/s", "MACs of the training", "Machine")
    notes = ["".join(told)] if told else []
    return "\n".join(["## What they cost\n", _table(headings, rows), *notes,
                      "The commands, from the suite's folder:\n", "```", *commands, "```\n"])


def _beside(trained: Sequence[Trained], published: Sequence[Mapping[str, str]]) -> str:
    """Return ours and the published ones, the most accurate first."""
    rows: list[tuple[float, list[str]]] = []
    for each in trained:
        if each.main["data"].startswith("CIFAR-10"):
            results, how = each.results, ", with teachers" if each.teachers else ""
            rows.append((100 * each.main["top1"], [
                f"**`{each.name}`** ({results['family']}{how})", f"**{share(each.main['top1'])}**", each.epochs,
                quantity(results["parameters"]), quantity(results["macs"]), each.main["data"], "here"]))
    for row in published:
        publisher = f"[{row['publisher']}]({row['url']})" if row["url"] else row["publisher"]
        before, behind = ("more than ", "") if row["note"] == "more than" else ("", row["note"])
        rows.append((float(row["top1"]), [
            row["network"], before + row["top1"], row["epochs"], quantity(float(row["parameters"])),
            quantity(float(row["macs"])), "CIFAR-10" + (f", {behind}" if behind else ""), publisher]))
    headings = ("Network", "Top-1", "Epochs", "#Params", "MACs", "Data", "Published by")
    text = _table(headings, (row for _, row in sorted(rows, key=lambda row: -row[0])))
    return ("## Beside published figures\n\nTrained from scratch on CIFAR-10, in % of the test images.\n"
            f"[Where two cores end](docs/recipes/README.md#where-two-cores-end) tells why ours are lower.\n\n{text}")


def _seeds(trained: Sequence[Trained]) -> str:
    rows = []
    for each in trained:
        if len(each.seeds) > 1:
            selected, final = ([float(row[column]) for row in each.seeds] for column in ("selected_top1", "final_top1"))
            rows.append([f"`{each.name}`", ", ".join(row["seed"] for row in each.seeds), _spread(selected),
                         _spread(final), ", ".join(share(value) for value in selected)])
    if not rows:
        return ""
    headings = ("Checkpoint", "Seeds", "Top-1 selected", "Top-1 final", "Each, selected")
    return ("## Several seeds\n\nMean and standard deviation (of the sample) over runs that differ in their seed "
            f"alone, each with the weights as trained.\n\n{_table(headings, rows)}")


def _spread(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):.2f} ± {100 * statistics.stdev(values):.2f}"


def _tried(name: str, rows: Sequence[Mapping[str, str]]) -> str:
    headings = [heading.replace("_", " ") for heading in rows[0]] if rows else []
    shown = ([f"{int(cell):,}" if cell.isdecimal() and len(cell) > 4 else cell or _DASH for cell in row.values()]
             for row in rows)
    return f"### {name}\n\n{_table(headings, shown) if rows else 'Nothing yet.'}"
