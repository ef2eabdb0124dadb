"""A worker process as the benchmark sees it: its environment, questions and answers, its peak of memory."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from utils import ROOT

# What the suite sets, or a user may have set, and a plain Paddle has not.
SETTINGS = ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE", "GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
LEAVING = 5.0  # seconds from the end of a worker's input or output to its own


@dataclass(frozen=True)
class Arm:
    """One side of a comparison, and how its process is started."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] | None = None  # the benchmark's own where None
    ours: bool = True


def own_arm(name: str) -> Arm:
    """Return the suite as it runs for its user, or as ``stock`` on Paddle's operators, as Paddle starts alone."""
    environment = {key: value for key, value in os.environ.items() if name != "stock" or key not in SETTINGS}
    return Arm(name, (sys.executable, str(ROOT / "tools" / "benchmark.py"), "--worker", name), environment)


def other_arm(command: str, settings: dict[str, str]) -> Arm:
    """Return another program that follows the protocol, named as it calls itself (or as its file).

    Raises UserError for a command that cannot be started.
    """
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise UserError(f"--against {command!r}: {error}") from None
    if not words:
        raise UserError("--against is empty, expected a command")
    if not shutil.which(words[0]):
        raise UserError(f"--against {words[0]!r}: no such program")
    name = Path(words[-1]).name
    with suppress(WorkerFailed), WorkerProcess(Arm("", words, ours=False)) as worker:
        name = str(worker.ask({"work": "describe", "seconds": 0}).get("name", name))
    return Arm(name[:40], words, os.environ | settings, ours=False)


class WorkerFailed(UserError):
    """A worker that answered with an error, or that ended."""


class WorkerProcess(AbstractContextManager):
    """A worker, started with the first question and ended with the ``with`` block."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115

    def __exit__(self, *_: object) -> None:
        if self._process:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._end()
            self._process.stdout.close()
        self._errors.close()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a question; raises WorkerFailed, and RuntimeError for a defect of our own worker."""
        if not self._process:
            # In a process group of its own: Ctrl-C is for the benchmark, which then ends its workers. In a session of
            # its own it would lose the priority of `nice` (Linux's autogroups).
            self._process = subprocess.Popen(self.arm.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                             stderr=self._errors, text=True, encoding="utf-8",
                                             env=self.arm.environment, preexec_fn=os.setpgrp)
        process = self._process
        with suppress(BrokenPipeError):  # it has ended: there is no answer
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise self._ended()
        try:
            answer = json.loads(line)
            if "error" in answer:
                raise WorkerFailed(str(answer["error"]))
            times = [float(value) for value in answer.get("seconds", [])]
            if question["work"] != "describe" and not (times and min(times) > 0 and max(times) < math.inf):
                raise ValueError(times)
        except (ValueError, TypeError, AttributeError) as error:
            shown = line.strip()[:80]
            raise WorkerFailed(f"answered {shown!r}, expected JSON with \"seconds\", times above 0") from error
        return answer

    def peak_bytes(self) -> int | None:
        """Return the largest resident size of the process, None where the system has no such figure."""
        status = Path(f"/proc/{self._process.pid}/status")
        lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)

    def _end(self) -> int:
        """Return the exit code; a worker that does not end is killed, with the processes that it has started."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(LEAVING)
        os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def _ended(self) -> Exception:
        """Return the error of a worker that no longer answers."""
        code = self._end()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()
        if code > 0 and self.arm.ours:
            return RuntimeError(f"the worker {self.arm.name!r} ended:\n{said}")
        return WorkerFailed(f"ended with exit code {code}: {(said.splitlines() or ['it printed nothing'])[-1][:200]}")
