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
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import UserError
from utils.paths import ROOT

# What the suite sets, or a user may have set, and a plain Paddle has not.
SETTINGS = ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE", "GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
LEAVING = 2.0  # seconds from the end of a worker's input to its own
LINGERING = 10.0  # seconds from the end of a worker's output to its own


@dataclass(frozen=True)
class Arm:
    """One side of a comparison, and how its process is started."""

    name: str
    command: tuple[str, ...]
    settings: dict[str, str] = field(default_factory=dict)  # beside the user's own
    plain: bool = False  # without the user's SETTINGS
    ours: bool = True


def own_arm(name: str) -> Arm:
    """Return the suite as it runs for its user, or as ``stock`` on Paddle's operators, as Paddle starts alone."""
    return Arm(name, (sys.executable, str(ROOT / "tools" / "benchmark.py"), "--worker", name), plain=name == "stock")


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
    with WorkerProcess(Arm("", words, ours=False)) as worker:
        try:
            name = str(worker.ask({"work": "describe", "seconds": 0})["name"])
        except (WorkerFailed, KeyError):
            name = Path(words[-1]).name
    return Arm(name[:40], words, settings, ours=False)


class WorkerFailed(Exception):
    """A worker that answered with an error, or that ended."""


class WorkerProcess:
    """A worker, started with the first question and ended with the ``with`` block."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        """End the worker, and the processes that it has started, where it leads their group."""
        if self._process:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(LEAVING)
            with suppress(ProcessLookupError):
                if self._process.poll() is None and os.getpgid(self._process.pid) == self._process.pid:
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
        self._errors.close()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a question; raises WorkerFailed, and RuntimeError for a defect of our own worker."""
        process = self._process or self._start()
        with suppress(BrokenPipeError):  # it has ended: there is no answer
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise self._ended()
        shown = line.strip()[:80]
        try:
            answer = json.loads(line)
            times = [float(value) for value in answer.get("seconds", [])]
        except (ValueError, TypeError, AttributeError) as error:
            raise WorkerFailed(f"answered {shown!r}, expected a line of JSON with \"seconds\"") from error
        if "error" in answer:
            raise WorkerFailed(str(answer["error"]))
        if question["work"] != "describe" and not (times and min(times) > 0 and max(times) < math.inf):
            raise WorkerFailed(f"answered {shown!r}, expected \"seconds\", a list of times above 0")
        return answer

    def peak_bytes(self) -> int | None:
        """Return the largest resident size of the process, None where the system has no such figure."""
        try:
            lines = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii").splitlines()
        except (OSError, AttributeError):
            return None
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)

    def _start(self) -> subprocess.Popen[str]:
        environment = {key: value for key, value in os.environ.items() if not (self.arm.plain and key in SETTINGS)}
        environment |= self.arm.settings
        # Ctrl-C is for the benchmark, which then ends its workers: they inherit a mask that holds SIGINT back. A
        # session of their own would do so too, but lose the priority of `nice` (Linux's autogroups).
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(self.arm.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                             stderr=self._errors, text=True, encoding="utf-8", env=environment)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self._process

    def _ended(self) -> Exception:
        """Return the error of a worker that no longer answers; one that lingers is ended."""
        try:
            code = self._process.wait(LINGERING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()
        if code > 0 and self.arm.ours:
            return RuntimeError(f"the worker {self.arm.name!r} ended:\n{said}")
        return WorkerFailed(f"ended with exit code {code}: {(said.splitlines() or ['it printed nothing'])[-1][:200]}")
