"""What an evaluation tells on its way: every so many batches their time, rate, loss and accuracies, with running means.

The form is that of PoolFormer's and timm's validation, in which the report on iFormer prints its 391 batches.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from utils.fileio import write_text


@dataclass(frozen=True)
class Row:
    """One batch, counted from 0, and the means so far, this batch included.

    Means of loss and accuracies (in percent) are over images, that of the rate is images by seconds; ``acc5`` is None
    with fewer than five classes.
    """

    batch: int
    images: int
    seconds: float
    mean_seconds: float
    images_per_second: float
    mean_images_per_second: float
    loss: float
    mean_loss: float
    acc1: float
    mean_acc1: float
    acc5: float | None
    mean_acc5: float | None

    def line(self, batches: int) -> str:
        """Return the row as one line of text."""
        parts = [f"Test: [{self.batch:>{len(str(batches))}}/{batches}]",
                 f"Time: {self.seconds:.3f}s ({self.mean_seconds:.3f}s)",
                 f"Rate: {self.images_per_second:.2f}/s ({self.mean_images_per_second:.2f}/s)",
                 f"Loss: {self.loss:.4f} ({self.mean_loss:.4f})",
                 f"Acc@1: {self.acc1:.3f} ({self.mean_acc1:.3f})"]
        if self.acc5 is not None:
            parts.append(f"Acc@5: {self.acc5:.3f} ({self.mean_acc5:.3f})")
        return "  ".join(parts)


class EvaluationReport:
    """Rows for every ``every``-th of ``batches`` batches, the first and the last among them.

    Each is given as a line to ``show``. The clock of the first batch starts when the report is made.
    """

    def __init__(self, batches: int, every: int = 10, show: Callable[[str], None] = print) -> None:
        self.rows: list[Row] = []
        self._batches, self._every, self._show = batches, every, show
        self._seen = 0
        self._sums = np.zeros(4)  # images, losses, correct, correct within five
        self._five = True
        self._started = self._last = time.perf_counter()

    def add(self, losses: np.ndarray, correct: np.ndarray, within_five: np.ndarray | None) -> None:
        """Add a batch by what it found of each image ``[B]``: its loss, and whether it was classified correctly."""
        now = time.perf_counter()
        images, seconds = len(losses), now - self._last
        self._last = now
        self._five = within_five is not None
        sums = np.array([images, losses.sum(), correct.sum(), within_five.sum() if self._five else 0.0])
        self._sums += sums
        batch, self._seen = self._seen, self._seen + 1
        if batch % self._every and self._seen < self._batches:
            return
        total = now - self._started
        _, loss, acc1, acc5 = sums / images * (1, 1, 100, 100)
        _, mean_loss, mean_acc1, mean_acc5 = self._sums / self._sums[0] * (1, 1, 100, 100)
        row = Row(batch, images, seconds, total / self._seen, images / seconds, self._sums[0] / total, loss, mean_loss,
                  acc1, mean_acc1, *((acc5, mean_acc5) if self._five else (None, None)))
        self.rows.append(row)
        self._show(row.line(self._batches))

    def summary(self) -> str:
        """Return the last line: accuracies and, in brackets, errors, in percent."""
        row = self.rows[-1]
        parts = [f"* Acc@1 {row.mean_acc1:.3f} ({100 - row.mean_acc1:.3f})"]
        if row.mean_acc5 is not None:
            parts.append(f"Acc@5 {row.mean_acc5:.3f} ({100 - row.mean_acc5:.3f})")
        return " ".join(parts)

    def write(self, path: Path) -> None:
        """Write the rows as CSV, with the columns of Row."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: "" if value is None else float(value) if isinstance(value, np.floating) else value
                          for name, value in asdict(row).items()} for row in self.rows)
        write_text(path, buffer.getvalue())
