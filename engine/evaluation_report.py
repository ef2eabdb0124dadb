"""A line for every so many batches of an evaluation: time, rate, loss, accuracies, and their running means.

The form is that of PoolFormer's and timm's validation, in which the report on iFormer prints its 391 batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine.evaluate import Evaluation
from utils.fileio import csv_text, write_text

COLUMNS = ("batch", "images", "seconds", "mean_seconds", "images_per_second", "mean_images_per_second", "loss",
           "mean_loss", "acc1", "mean_acc1", "acc5", "mean_acc5")


class EvaluationReport:
    """Rows of COLUMNS for every ``every``-th of ``batches`` batches, and for the first and the last.

    Each is passed to ``show``, if any, as a line. Accuracies are in percent, means are over images so far. ``acc5`` is
    empty with fewer than five classes. The clock of the first batch starts with the constructor.
    """

    def __init__(self, batches: int, every: int = 10, show: Callable[[str], None] | None = print) -> None:
        self.rows: list[dict[str, float | None]] = []
        self._batches, self._every, self._show = batches, every, show
        self._seen = 0
        self._sums = np.zeros(4)  # images, losses, correct, correct within five
        self._started = self._last = time.perf_counter()

    def add(self, batch: Evaluation) -> None:
        """Add the evaluation of the next batch."""
        now = time.perf_counter()
        seconds, total, self._last = now - self._last, now - self._started, now
        five = batch.within_five
        sums = np.array([batch.images, batch.losses.sum(), (batch.predicted == batch.labels).sum(),
                         0 if five is None else five.sum()])
        self._sums += sums
        index, self._seen = self._seen, self._seen + 1
        if index % self._every and self._seen < self._batches:
            return
        (_, loss, acc1, acc5), (_, mean_loss, mean_acc1, mean_acc5) = (
            (part / part[0] * (1, 1, 100, 100)).tolist() for part in (sums, self._sums))
        if five is None:
            acc5 = mean_acc5 = None
        row = dict(zip(COLUMNS, (index, batch.images, seconds, total / self._seen, batch.images / seconds,
                                 float(self._sums[0] / total), loss, mean_loss, acc1, mean_acc1, acc5, mean_acc5),
                       strict=True))
        self.rows.append(row)
        if self._show:
            self._show(self._line(row))

    def _line(self, row: dict[str, float | None]) -> str:
        text = ("Test: [{batch:>{width}}/{batches}]  Time: {seconds:.3f}s ({mean_seconds:.3f}s)  "
                "Rate: {images_per_second:.2f}/s ({mean_images_per_second:.2f}/s)  Loss: {loss:.4f} ({mean_loss:.4f})  "
                "Acc@1: {acc1:.3f} ({mean_acc1:.3f})")
        if row["acc5"] is not None:
            text += "  Acc@5: {acc5:.3f} ({mean_acc5:.3f})"
        return text.format(width=len(str(self._batches)), batches=self._batches, **row)

    def summary(self) -> str:
        """Return the last line: accuracies and, in brackets, errors, in percent."""
        means = [(name, self.rows[-1][f"mean_acc{k}"]) for name, k in (("Acc@1", 1), ("Acc@5", 5))]
        return "* " + " ".join(f"{name} {mean:.3f} ({100 - mean:.3f})" for name, mean in means if mean is not None)

    def write(self, path: Path) -> None:
        """Write the rows as CSV."""
        write_text(path, csv_text(COLUMNS, self.rows))
