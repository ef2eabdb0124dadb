"""The folder of a run: its files, its lock and log, its tables and curves, and whether a config may continue it.

``steps.csv`` and ``history.csv`` hold what the run computed, identical however often it was interrupted;
``timing.csv`` holds how long it took.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import shutil
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from yacs.config import CfgNode

from configs.load import dump_config, flatten, load_config, to_plain
from errors import UserError
from utils.fileio import csv_text, read_csv, read_json, remove_temporaries, write_json, write_text

log = logging.getLogger("suite")

# Keys that may differ between a run and its continuation; all others would change the result.
_FREE_KEYS = {
    "OUTPUT", "DATA.ROOT", "DATA.DOWNLOAD", "DATA.EVAL_BATCH_SIZE", "DATA.WORKERS", "TRAIN.EPOCHS", "TRAIN.MAX_STEPS",
    "TRAIN.ON_NAN", "TRAIN.LOG_EVERY", "TRAIN.EVAL_EVERY", "TRAIN.CHECKPOINT_MINUTES", "TRAIN.KEEP_CHECKPOINTS",
    "RUNTIME.DEVICE", "RUNTIME.THREADS", "RUNTIME.DETERMINISTIC", "RUNTIME.KERNELS",
}

# Fields of environment.json that decide how sums are rounded.
_ROUNDING = ("paddle", "processor", "device", "threads", "processes", "kernels_in_use", "precision")

STEP_COLUMNS = ("iteration", "epoch", "lr", "train_loss", "train_accuracy")
EPOCH_COLUMNS = ("epoch", "iteration", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy",
                 "best_val_accuracy")
TIMING_COLUMNS = ("epoch", "iteration", "train_seconds", "train_images_per_second", "val_images_per_second")
_TABLES = {"steps.csv": STEP_COLUMNS, "history.csv": EPOCH_COLUMNS, "timing.csv": TIMING_COLUMNS}

Row = dict[str, Any]


class RunFolder:
    """The folder ``OUTPUT/NAME`` while one process writes into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.results = path / "results.json"
        self.checkpoints = path / "checkpoints"
        self.lock = path / "lock"
        self._held: TextIO | None = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def started(self) -> bool:
        """Return whether the run got as far as its first table; before that there is nothing to continue or to lose."""
        return (self.path / "steps.csv").exists() or self._has_checkpoints()

    def _has_checkpoints(self) -> bool:
        return any(self.checkpoints.glob("*.safetensors"))

    def open(self, config: CfgNode, *, resume: bool, overwrite: bool) -> None:
        """Lock the folder, write the config, and start ``train.log``.

        With ``resume``, a run without its first table starts from the beginning. Raises UserError where another
        process writes into the folder, where it holds a run and neither ``resume`` nor ``overwrite`` is given, where
        the config does not continue the run's, and where its config.yaml is not a run's. The lock is then released.
        """
        holds_run = self.config.exists() and self.started
        if holds_run and not (resume or overwrite):
            raise UserError(f"{self.path} holds a run already: continue it with --resume, replace it with --overwrite, "
                            "or choose another name with -o NAME=...")
        if self._has_checkpoints() and not self.config.exists():
            raise UserError(f"{self.checkpoints} holds checkpoints, but {self.path} no {self.config.name}: move them "
                            "away, or choose another name with -o NAME=...")
        if resume and not holds_run and self._awaits_weights():
            raise UserError(f"{self.path} ended before it had loaded its --weights: start it again as before, without "
                            "--resume")
        resume = resume and holds_run
        if self.config.exists() and not resume and not self.lock.is_file():
            raise UserError(f"{self.path} holds a {self.config.name}, but no {self.lock.name} as a run has: it may be "
                            "something else. Choose another name with -o NAME=..., or delete it yourself")
        self._acquire()
        try:
            differences = _check_continuation(load_config(self.config), config, self.config) if resume else []
            if holds_run and not resume:
                self._clear()
            for folder in (self.path, self.checkpoints):
                remove_temporaries(folder)
            write_text(self.config, dump_config(config))
            self._start_log()
        except OSError as error:
            self.close()
            raise UserError(f"{error.filename}: cannot be replaced: {error.strerror}") from None
        except UserError:
            self.close()
            raise
        for difference in differences:
            log.warning("resuming with %s", difference)

    def _awaits_weights(self) -> bool:
        return self.environment.is_file() and b'"--weights' in self.environment.read_bytes()

    def precision(self) -> str:
        """Return the precision that ``environment.json`` records, empty where it records none."""
        return str(_read_environment(self.environment).get("precision", ""))

    def record_environment(self, now: dict[str, Any], *, resume: bool) -> None:
        """Write ``environment.json``; with ``resume``, earlier environments stay under ``earlier``.

        Logs a warning for each difference that changes how the continuation rounds.
        """
        before = _read_environment(self.environment) if resume else {}
        earlier = before.pop("earlier", [])
        if before and before != now:
            earlier = [*earlier, before]
        for key in _ROUNDING:
            if key in before and before[key] != now.get(key):
                log.warning("resuming with %s %s, until now it was %s: the result is rounded differently from here on",
                            key, now.get(key), before[key])
        write_json(self.environment, {**now, "earlier": earlier} if earlier else now)

    def close(self) -> None:
        """End the log and release the lock."""
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
        if self._held:
            self._held.close()
            self._held = None

    def _acquire(self) -> None:
        """Lock the folder. The system releases the lock of a process that dies, so none is ever stale."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self.lock.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise UserError(f"{self.path}: process {holder} is writing into this run; wait for it or stop it") from None
        except OSError as error:  # some network file systems have no locks
            warnings.warn(f"{self.lock}: cannot be locked ({error.strerror}), a second process could write into this "
                          "run too", stacklevel=2)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._held = lock

    def _clear(self) -> None:
        shutil.rmtree(self.checkpoints, ignore_errors=True)  # first, so that none is mistaken for the new run's
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != self.lock:
                entry.unlink()

    def _start_log(self) -> None:
        file = logging.FileHandler(self / "train.log", encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        console = _Console()
        console.setFormatter(logging.Formatter("%(message)s"))
        log.setLevel(logging.INFO)
        log.propagate = False
        log.addHandler(file)
        log.addHandler(console)


class _Console(logging.Handler):
    """Prints beside a progress bar without tearing it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # nobody reads our output, as after `| head`: train.log has it all
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _read_environment(path: Path) -> dict[str, Any]:
    """Read ``environment.json``; empty where it is missing or damaged."""
    try:
        found = read_json(path)
    except UserError:
        return {}
    return found if isinstance(found.get("earlier", []), list) else {}


def _check_continuation(old: CfgNode, new: CfgNode, path: Path) -> list[str]:
    """Return the harmless differences as text; UserError where one would change the result."""
    before, now = dict(flatten(old)), dict(flatten(new))
    changed = [key for key in now if now[key] != before[key]]
    breaking = [_difference(key, before[key], now[key]) for key in changed if key not in _FREE_KEYS]
    if breaking:
        raise UserError(f"{path}: --resume continues a run as it was, but these keys differ: {'; '.join(breaking)}")
    return [_difference(key, before[key], now[key]) for key in changed]


def _difference(key: str, before: Any, now: Any) -> str:
    return f"{key} was {to_plain(before)!r}, now {to_plain(now)!r}"


# Tables and curves ----------------------------------------------------------------------------------------------------


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
