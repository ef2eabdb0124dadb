"""The benchmark's side of a worker process: its environment, questions and answers, its peak of memory."""

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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from utils.paths import ROOT

# What the suite sets, or a user may have set, and a plain Paddle has not.
SETTINGS = ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE", "GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")

LEAVING = 2.0  # seconds from the end of a worker's input to its own
LINGERING = 10.0  # seconds from the end of a worker's output to its own
OTHER = "against"  # the name of the arm that --against adds


@dataclass(frozen=True)
class Arm:
    """One side of a comparison, and how its process is started."""

    name: str
    command: tuple[str, ...]
    settings: dict[str, str] | None = None  # in the place of SETTINGS; None: the user's own


def suite_arm() -> Arm:
    """Return the suite as it runs for its user."""
    return Arm("suite", _command("suite"))


def stock_arm(name: str = "stock", **settings: str) -> Arm:
    """Return the same networks on Paddle's operators in Paddle's environment, but for ``settings``."""
    return Arm(name, _command("stock"), settings)


def other_arm(command: str) -> Arm:
    """Return another program that follows the protocol; raises UserError for a command that is none."""
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise UserError(f"--against {command!r}: {error}") from None
    if not words:
        raise UserError("--against is empty, expected a command")
    if not shutil.which(words[0]):
        raise UserError(f"--against {words[0]!r}: no such program")
    return Arm(OTHER, words)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let SIGINT wait until the end of the block, and with processes that are started in it for ever."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _command(mode: str) -> tuple[str, ...]:
    return sys.executable, str(ROOT / "tools" / "benchmark.py"), "--worker", mode


class WorkerFailed(Exception):
    """A worker that says it cannot, or that ended."""


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
        """Return the answer to a question.

        Raises WorkerFailed, and RuntimeError for a defect of our own worker.
        """
        process = self._process or self._start()
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the empty answer tells
        line = process.stdout.readline()
        if not line:
            code = self._exit_code()
            if code > 0 and self.arm.name != OTHER:
                raise RuntimeError(f"the worker {self.arm.name!r} ended:\n{self._said()}")
            raise WorkerFailed(f"ended with exit code {code}: "
                               f"{(self._said().splitlines() or ['it said nothing'])[-1][:200]}")
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
        """Return the most memory that the process has had (resident), None where the system does not tell."""
        try:
            lines = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii").splitlines()
        except (OSError, AttributeError):
            return None
        found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
        return 1024 * found[0] if found else None

    def _start(self) -> subprocess.Popen[str]:
        environment = dict(os.environ)
        if self.arm.settings is not None:
            environment = {key: value for key, value in environment.items() if key not in SETTINGS}
            environment |= self.arm.settings
        # Ctrl-C is for the benchmark, which then ends its workers. A session of their own would keep it away as well,
        # but also their priority from what `nice` gave the benchmark (Linux's autogroups).
        with _interrupts_held_back():
            self._process = subprocess.Popen(self.arm.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                             stderr=self._errors, text=True, encoding="utf-8", env=environment)
        return self._process

    def _exit_code(self) -> int:
        """Return the exit code of a worker that answers no more; one that lingers is ended."""
        try:
            return self._process.wait(LINGERING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip()
