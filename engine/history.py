"""What a run leaves to look at: CSV files and VisualDL curves, continued without gap or overlap.

``steps.csv`` and ``history.csv`` hold what the run computed, the same however often it was interrupted;
``timing.csv`` holds how long it took.
"""

from __future__ import annotations

import csv
import io
import math
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from errors import UserError
from utils.fileio import write_text

STEP_COLUMNS = ("iteration", "epoch", "lr", "train_loss", "train_accuracy")
EPOCH_COLUMNS = ("epoch", "iteration", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy",
                 "best_val_accuracy")
TIMING_COLUMNS = ("epoch", "iteration", "train_seconds", "train_images_per_second", "val_images_per_second")
_TABLES = {"steps.csv": STEP_COLUMNS, "history.csv": EPOCH_COLUMNS, "timing.csv": TIMING_COLUMNS}

Row = dict[str, Any]


class History:
    """The tables of one run, which continues after ``iteration`` and ``epoch`` (0: a new run)."""

    def __init__(self, folder: Path, iteration: int = 0, epoch: int = 0) -> None:
        self.folder = folder
        for name, columns in _TABLES.items():
            column, newest = ("iteration", iteration) if columns is STEP_COLUMNS else ("epoch", epoch)
            rows = [row for row in read_table(folder / name) if int(row[column]) <= newest]
            write_text(folder / name, _to_csv(columns, rows, header=True))
        self._curves = self._replay(folder / "vdl")

    def add_step(self, row: Row) -> None:
        """Add a row of STEP_COLUMNS."""
        self._append("steps.csv", row)
        self._draw("train/", row, ("lr", "train_loss", "train_accuracy"))

    def add_epoch(self, row: Row, timing: Row) -> None:
        """Add a row of EPOCH_COLUMNS and one of TIMING_COLUMNS."""
        self._append("timing.csv", timing)
        self._append("history.csv", row)
        self._draw("epoch/", row, EPOCH_COLUMNS[2:])

    def last_step(self) -> Row | None:
        """Return the newest row of ``steps.csv`` as text."""
        rows = read_table(self.folder / "steps.csv")
        return rows[-1] if rows else None

    def sync(self) -> None:
        """Bring the rows to the disk, so that no checkpoint outlives the rows before it in a power failure."""
        for name in _TABLES:
            with (self.folder / name).open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Finish the curves' files.

        VisualDL's writer waits for ever where its own thread has ended on a full disk: it is then left alone.
        """
        def finish() -> None:
            with suppress(OSError):
                self._curves.close()

        closing = threading.Thread(target=finish, daemon=True)
        closing.start()
        closing.join(10.0)

    def _append(self, name: str, row: Row) -> None:
        with (self.folder / name).open("a", encoding="utf-8", newline="") as file:
            file.write(_to_csv(_TABLES[name], [row]))

    def _draw(self, prefix: str, row: Row, columns: tuple[str, ...]) -> None:
        for column in columns:
            if row[column] not in ("", None):
                self._curves.add_scalar(prefix + column, float(row[column]), int(row["iteration"]))

    def _replay(self, folder: Path) -> Any:
        """Start the VisualDL log afresh from the tables: its own files cannot be cut at an iteration."""
        from visualdl import LogWriter

        shutil.rmtree(folder, ignore_errors=True)
        self._curves = LogWriter(logdir=str(folder))
        for row in read_table(self.folder / "steps.csv"):
            self._draw("train/", row, ("lr", "train_loss", "train_accuracy"))
        for row in read_table(self.folder / "history.csv"):
            self._draw("epoch/", row, EPOCH_COLUMNS[2:])
        return self._curves


def read_table(path: Path) -> list[Row]:
    """Return the rows of one of the run's tables as dictionaries of text; a torn last row is left out.

    None where there is no file. Raises UserError where it is no such table.
    """
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if None not in row.values()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    columns = _TABLES[path.name]
    if tuple(reader.fieldnames or columns) != columns or not all(map(_is_row, rows)):
        raise UserError(f"{path}: not the table of a run, expected the columns {', '.join(columns)}")
    return rows


def _is_row(row: Row) -> bool:
    try:
        int(row["epoch"]), int(row["iteration"])
        return all(math.isfinite(float(value)) for value in row.values() if value)
    except (TypeError, ValueError):
        return False


def _to_csv(columns: tuple[str, ...], rows: list[Row], header: bool = False) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows({column: _text(row[column]) for column in columns} for row in rows)
    return buffer.getvalue()


def _text(value: Any) -> Any:
    return repr(value) if isinstance(value, float) else value
