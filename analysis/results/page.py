"""``RESULTS.md``: accuracy and cost of every released network, beside published ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from analysis.formatting import quantity, table, text_table
from engine.released import RESULTS, check_released, released_names
from errors import UserError
from utils.fileio import read_csv, read_json

PLOT = "docs/results.png"
INTRODUCTION = """\
# Results

Written by `python tools/results.py --write RESULTS.md`; do not edit by hand.

**Selected**: the weights of the epoch with the best held-out accuracy (the last epoch if `DATA.HOLDOUT` is 0). These
are released; top-1, top-5 and ECE are those of the file in `checkpoints/`. **Final**: the weights of the last epoch.
**ECE** is the expected calibration error (15 bins). Shares are in %; ± is one standard error where there are fewer than
10,000 images. Times and images/s are of training alone, by the clock. MACs are multiply-accumulates of one image; of a
training, 3 × MACs × images.
"""
EVALUATING = """\
## Evaluating

```
python tools/eval.py -w {name}
python tools/eval.py -w {name} -o DATA.ROOT=FOLDER
```

Checks the weights against their SHA-256, finds the data set in `data/` or the FOLDER (or downloads it), and prints the
metrics beside those above.
"""
_DASH = "–"
_TEXT = "checkpoint", "family", "network", "machine", "changed", "note", "data", "published by"


@dataclass(frozen=True)
class Trained:
    """A released checkpoint: its name, its ``results.json`` and its ``seeds.csv`` (text)."""

    name: str
    results: dict[str, Any]
    seeds: list[dict[str, str]]

    @property
    def test(self) -> dict[str, Any]:
        return self.results["test"][0]

    @property
    def training(self) -> dict[str, Any]:
        return self.results["training"]

    @property
    def final(self) -> float | None:
        """Return the top-1 of the last epoch on the test images, None where it is not known."""
        return self.results.get("final", {}).get("test", {}).get("top1")


def read_released(folder: Path) -> list[Trained]:
    """Return the checkpoints of a folder by name; UserError where one is not as it was released."""
    found = []
    for name in released_names(folder):
        check_released(folder / name)
        results = read_json(folder / name / RESULTS)
        try:
            results["training"]["seconds"], results["test"][0]["top1"], results["parameters"], results["macs"]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{folder / name / RESULTS}: not the results of a released checkpoint, as tools/release.py "
                            "writes them") from None
        found.append(Trained(name, results, read_csv(folder / name / "seeds.csv")))
    return found


def page(trained: Sequence[Trained], published: Sequence[Mapping[str, str]]) -> str:
    if not trained:
        return "\n".join([INTRODUCTION, "## Released checkpoints\n\nNone yet.\n", _beside(trained, published)])
    parts = [INTRODUCTION, *_accuracies(trained), _costs(trained), _beside(trained, published), _seeds(trained),
             EVALUATING.format(name=trained[0].name)]
    return "\n".join(filter(None, parts))


def terminal_table(trained: Sequence[Trained]) -> str:
    return text_table(("checkpoint", "top-1", "params", "MACs", "epochs", "training", "data"), [
        (each.name, f"{each.test['top1']:.2%}", quantity(each.results["parameters"]), quantity(each.results["macs"]),
         str(each.training["epochs"]), duration(each.training["seconds"]), each.test["data"]) for each in trained])


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def share(value: float | None, images: int = 10_000) -> str:
    """Return a share in %, with its standard error for fewer than 10,000 images."""
    if value is None:
        return _DASH
    return f"{100 * value:.2f}" + (f" ± {100 * math.sqrt(value * (1 - value) / images):.2f}" if images < 10_000 else "")


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return table(headings, rows, _TEXT) + "\n"


def _accuracies(trained: Sequence[Trained]) -> list[str]:
    """Return a table for each data set, in % of the test images, and notes."""
    parts = ["## Released checkpoints\n"]
    headings = ("Checkpoint", "Family", "#Params", "MACs", "Top-1 selected", "Top-1 final", "Top-5", "ECE", "Weights")
    ordered = sorted(trained, key=lambda each: (each.test["data"], -each.test["top1"]))
    for data, group in groupby(ordered, key=lambda each: each.test["data"]):
        rows, checkpoints = [], list(group)
        for each in checkpoints:
            results, test, weights = each.results, each.test, each.results["weights"]
            rows.append([f"`{each.name}`", results["family"], f"{results['parameters']:,}", quantity(results["macs"]),
                         share(test["top1"], test["images"]), share(each.final), share(test["top5"]),
                         share(test.get("ece")),
                         f"{weights['precision'].split()[0]}, {weights['bytes'] / 1e6:.1f} MB"])
        parts += [f"### {data}\n", _table(headings, rows), _notes(checkpoints)]
    return [*parts, f"![Accuracy against training cost]({PLOT})\n"]


def _notes(rows: Sequence[Trained]) -> str:
    """Return what is unusual about some checkpoints, a line for each."""
    notes: dict[str, list[str]] = {}
    for each in rows:
        training, kind = each.training, each.results["weights"]["kind"]
        found = ["no held-out images, so the final weights are released" if kind == "final" else "",
                 "selected on the test set" if (each.results.get("selected_on"), kind) == ("test", "selected") else "",
                 "" if "final" in each.results else
                 f"released after {training['epochs']} of {training['epochs_planned']} epochs"]
        for note in filter(None, found):
            notes.setdefault(note, []).append(f"`{each.name}`")
    return "".join(f"- {', '.join(names)}: {note}.\n" for note, names in notes.items())


def _costs(trained: Sequence[Trained]) -> str:
    rows, commands = [], []
    for each in sorted(trained, key=lambda each: each.training["macs"]):
        training = each.training
        precision = "" if training["precision"] == "float32" else f", {training['precision']}"
        rate = _DASH if training["images_per_second"] is None else f"{training['images_per_second']:,.0f}"
        rows.append([f"`{each.name}`", str(training["epochs"]), duration(training["seconds"]), rate,
                     quantity(training["macs"]), "; then ".join(training["machines"]) + precision])
        commands += [f"# {each.name}", training["command"]]
    headings = ("Checkpoint", "Epochs", "Training time", "Images/s", "MACs of the training", "Machine")
    return "\n".join(["## What they cost\n", _table(headings, rows), "The commands, from the suite's folder:\n", "```",
                      *commands, "```\n"])


def _beside(trained: Sequence[Trained], published: Sequence[Mapping[str, str]]) -> str:
    """Return ours and the published ones, the most accurate first."""
    rows = [(100 * each.test["top1"], [
        f"**`{each.name}`** ({each.results['family']})", f"**{share(each.test['top1'])}**",
        str(each.training["epochs"]), quantity(each.results["parameters"]), quantity(each.results["macs"]),
        each.test["data"], "here"]) for each in trained if each.test["data"].startswith("CIFAR-10")]
    for row in published:
        publisher = f"[{row['publisher']}]({row['url']})" if row["url"] else row["publisher"]
        before, behind = ("more than ", "") if row["note"] == "more than" else ("", row["note"])
        rows.append((float(row["top1"]), [
            row["network"], before + row["top1"], row["epochs"], quantity(float(row["parameters"])),
            quantity(float(row["macs"])), "CIFAR-10" + (f", {behind}" if behind else ""), publisher]))
    headings = ("Network", "Top-1", "Epochs", "#Params", "MACs", "Data", "Published by")
    return ("## Beside published figures\n\nTrained from scratch on CIFAR-10, in % of the test images.\n\n"
            + _table(headings, (row for _, row in sorted(rows, key=lambda row: -row[0]))))


def _seeds(trained: Sequence[Trained]) -> str:
    rows = []
    for each in trained:
        if len(each.seeds) > 1:
            both = [[100 * float(row[f"{kind}_top1"]) for row in each.seeds] for kind in ("selected", "final")]
            rows.append([f"`{each.name}`", ", ".join(row["seed"] for row in each.seeds),
                         *(f"{statistics.fmean(found):.2f} ± {statistics.stdev(found):.2f}" for found in both),
                         ", ".join(f"{value:.2f}" for value in both[0]), each.training["data"]])
    if not rows:
        return ""
    headings = ("Checkpoint", "Seeds", "Top-1 selected", "Top-1 final", "Each, selected", "Data")
    return ("## Several seeds\n\nMean and standard deviation (of the sample) over runs that differ in their seed "
            f"alone, each with the weights as trained, on the test images of its own data.\n\n{_table(headings, rows)}")
