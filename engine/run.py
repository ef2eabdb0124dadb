"""A run's folder: its files, who may write into it, and whether a config may continue it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from yacs.config import CfgNode

from configs.load import dump_config, flatten, load_config, to_plain
from errors import UserError
from utils.fileio import remove_temporaries, write_json, write_text

log = logging.getLogger("suite")

# Keys that may differ between a run and its continuation; all others would change what is computed.
_FREE_KEYS = {
    "OUTPUT", "DATA.ROOT", "DATA.DOWNLOAD", "DATA.EVAL_BATCH_SIZE", "DATA.WORKERS", "TRAIN.EPOCHS", "TRAIN.MAX_STEPS",
    "TRAIN.ON_NAN", "TRAIN.LOG_EVERY", "TRAIN.EVAL_EVERY", "TRAIN.CHECKPOINT_MINUTES", "TRAIN.KEEP_CHECKPOINTS",
    "RUNTIME.DEVICE", "RUNTIME.THREADS", "RUNTIME.DETERMINISTIC", "RUNTIME.KERNELS",
}

# What of a machine decides how sums are rounded.
_ROUNDING = ("paddle", "processor", "device", "threads", "processes", "kernels_in_use")


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
        """Tell whether the run came as far as its first table; one that did not has nothing to continue or to lose."""
        return (self.path / "steps.csv").exists() or self._has_checkpoints()

    def _has_checkpoints(self) -> bool:
        return any(self.checkpoints.glob("*.safetensors"))

    def open(self, config: CfgNode, *, resume: bool, overwrite: bool) -> None:
        """Make the folder this process's own, write the config, and start ``train.log``.

        With ``resume``, a run that was ended before its first table starts from the beginning. Raises UserError where
        another process writes into it, where it holds a run and neither ``resume`` nor ``overwrite`` is given, where
        ``resume`` is given with a config that is not the run's, and where config.yaml is there but of no run. The
        folder is then let go of again.
        """
        holds_run = self.config.exists() and self.started
        if holds_run and not (resume or overwrite):
            raise UserError(f"{self.path} holds a run already: continue it with --resume, replace it with --overwrite, "
                            "or name another with -o NAME=...")
        if self._has_checkpoints() and not self.config.exists():
            raise UserError(f"{self.checkpoints} holds checkpoints, but {self.path} no {self.config.name}: move them "
                            "away, or name another run with -o NAME=...")
        if resume and not holds_run and self._awaits_weights():
            raise UserError(f"{self.path} was ended before it had taken in its --weights: start it again as before, "
                            "without --resume")
        resume = resume and holds_run
        if self.config.exists() and not resume and not self.lock.is_file():
            raise UserError(f"{self.path} holds a {self.config.name}, but no {self.lock.name} as a run has: it may be "
                            "something else, so name another with -o NAME=..., or delete it yourself")
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

    def record_environment(self, now: dict[str, Any], *, resume: bool) -> None:
        """Write ``environment.json``; where a run is resumed, what it was made with until now stays under ``earlier``.

        What makes the continuation round otherwise than the run would have without a break is told.
        """
        before = _read_environment(self.environment) if resume else {}
        earlier = before.pop("earlier", [])
        if before and before != now:
            earlier = [*earlier, before]
        for key in _ROUNDING:
            if key in before and before[key] != now.get(key):
                log.warning("resuming with %s %s, until now it was %s: what is computed from here on rounds otherwise",
                            key, now.get(key), before[key])
        write_json(self.environment, {**now, "earlier": earlier} if earlier else now)

    def close(self) -> None:
        """Let go of the folder."""
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
        if self._held:
            self._held.close()
            self._held = None

    def _acquire(self) -> None:
        """Lock the folder; the system lets go of the lock of a process that dies, so none is ever stale."""
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
            warnings.warn(f"{self.lock}: cannot be locked ({error.strerror}), so nothing keeps a second process from "
                          "writing into this run", stacklevel=2)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._held = lock

    def _clear(self) -> None:
        shutil.rmtree(self.checkpoints, ignore_errors=True)  # first: none is ever taken for the new run's
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != self.lock:
                entry.unlink()

    def _start_log(self) -> None:
        file = logging.FileHandler(self / "train.log", encoding="utf-8")
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
        except BrokenPipeError:  # the reader of our output has gone, as `| head` does: train.log tells the rest
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _read_environment(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("earlier", []), list) else {}


def run_folder(config: CfgNode) -> RunFolder:
    """Return the folder of a config's run; nothing is made."""
    return RunFolder(Path(config.OUTPUT).expanduser() / config.NAME)


def _check_continuation(old: CfgNode, new: CfgNode, path: Path) -> list[str]:
    """Return the harmless differences, told; raises UserError where one would change what the run computes."""
    before, now = dict(flatten(old)), dict(flatten(new))
    changed = [key for key in now if now[key] != before[key]]
    breaking = [_difference(key, before[key], now[key]) for key in changed if key not in _FREE_KEYS]
    if breaking:
        raise UserError(f"{path}: --resume continues a run as it was, but these keys differ: {'; '.join(breaking)}")
    return [_difference(key, before[key], now[key]) for key in changed]


def _difference(key: str, before: Any, now: Any) -> str:
    return f"{key} was {to_plain(before)!r}, now {to_plain(now)!r}"
