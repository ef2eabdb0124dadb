"""The CSV tables and VisualDL curves of a run, continued without gap or overlap.

``steps.csv`` and ``history.csv`` hold what the run computed, identical however often it was interrupted;
``timing.csv`` holds how long it took.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from errors import UserError
from utils.fileio import csv_text, read_csv, write_text

STEP_COLUMNS = ("iteration", "epoch", "lr", "train_loss", "train_accuracy")
EPOCH_COLUMNS = ("epoch", "iteration", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy",
                 "best_val_accuracy")
TIMING_COLUMNS = ("epoch", "iteration", "train_seconds", "train_images_per_second", "val_images_per_second")
_TABLES = {"steps.csv": STEP_COLUMNS, "history.csv": EPOCH_COLUMNS, "timing.csv": TIMING_COLUMNS}

Row = dict[str, Any]


class History:
    """The tables of a run that continues after ``global_step`` and ``epoch`` (0: a new run)."""

    def __init__(self, folder: Path, global_step: int = 0, epoch: int = 0) -> None:
        from visualdl import LogWriter

        self.folder = folder
        for name, columns in _TABLES.items():
            column, newest = ("iteration", global_step) if name == "steps.csv" else ("epoch", epoch)
            rows = [row for row in read_table(folder / name) if int(row[column]) <= newest]
            write_text(folder / name, csv_text(columns, rows))
        shutil.rmtree(folder / "vdl", ignore_errors=True)  # cannot be cut at a step: drawn again from the tables
        self._curves = LogWriter(logdir=str(folder / "vdl"))
        for row in read_table(folder / "steps.csv"):
            self._draw("train/", row, STEP_COLUMNS[2:])
        for row in read_table(folder / "history.csv"):
            self._draw("epoch/", row, EPOCH_COLUMNS[2:])

    def add_step(self, row: Row) -> None:
        """Add a row of STEP_COLUMNS."""
        self._append("steps.csv", row)
        self._draw("train/", row, STEP_COLUMNS[2:])

    def add_epoch(self, row: Row, timing: Row) -> None:
        """Add a row of EPOCH_COLUMNS and one of TIMING_COLUMNS."""
        self._append("timing.csv", timing)
        self._append("history.csv", row)
        self._draw("epoch/", row, EPOCH_COLUMNS[2:])

    def sync(self) -> None:
        """Sync the tables to disk, so that no checkpoint outlives the rows before it in a power failure."""
        for name in _TABLES:
            with (self.folder / name).open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Finish the curves; gives up after ten seconds, since VisualDL's writer hangs on a full disk."""
        def finish() -> None:
            with suppress(OSError):
                self._curves.close()

        closing = threading.Thread(target=finish, daemon=True)
        closing.start()
        closing.join(10.0)

    def _append(self, name: str, row: Row) -> None:
        with (self.folder / name).open("a", encoding="utf-8", newline="") as file:
            file.write(csv_text(_TABLES[name], [row], header=False))

    def _draw(self, prefix: str, row: Row, columns: tuple[str, ...]) -> None:
        for column in columns:
            if row[column] not in ("", None):
                self._curves.add_scalar(prefix + column, float(row[column]), int(row["iteration"]))


def read_table(path: Path) -> list[Row]:
    """Read one of a run's tables as text; none where there is no file. UserError for any other table."""
    columns, rows = _TABLES[path.name], read_csv(path, torn=True)
    if not all(tuple(row) == columns and _is_row(row) for row in rows):
        raise UserError(f"{path}: not the table of a run, expected the columns {', '.join(columns)}")
    return rows


def _is_row(row: Row) -> bool:
    try:
        int(row["epoch"]), int(row["iteration"])
        return all(math.isfinite(float(value)) for value in row.values() if value)
    except ValueError:
        return False
