"""SIGINT, SIGTERM and SIGHUP request a stop at the next safe point, the same in all processes."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from engine import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAUNCHER_SECONDS = 2.0  # Paddle's launchers send SIGTERM up to three times within one second


class Interrupted(Exception):
    """Signal ``signum`` stopped the run after it had saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """Record the first signal inside a ``with`` block; a second one ends the process at once.

    SIGHUP stays ignored under nohup. Under a launcher, signals within LAUNCHER_SECONDS count as one, its death
    counts as SIGHUP, and the handlers stay after the block, since it sends more while the process ends.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._came = 0.0
        self._launcher = os.getppid() if "PADDLE_TRAINERS_NUM" in os.environ else None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for signum in SIGNALS:
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in () if self._launcher else self._previous.items():
            signal.signal(signum, handler)

    def check(self) -> None:
        """Raise Interrupted in all processes if any of them has received a signal."""
        if self._launcher not in (None, os.getppid()):
            self._remember(signal.SIGHUP)
        for signum in distributed.all_gather_object(self.signum):
            if signum is not None:
                self._remember(signum)
                raise Interrupted(signum)

    def _remember(self, signum: int) -> None:
        if self.signum is None:
            self.signum, self._came = signum, time.monotonic()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self._remember(signum)
        elif not self._launcher or time.monotonic() - self._came > LAUNCHER_SECONDS:
            os._exit(128 + signum)
