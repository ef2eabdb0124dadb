"""SIGINT, SIGTERM and SIGHUP as a request to stop at the next safe point, in all processes at the same."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from engine import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAUNCHERS_PATIENCE = 2.0  # seconds: Paddle's launchers send SIGTERM up to three times within one


class Interrupted(Exception):
    """The run was asked to stop and has saved; ``signum`` says by which signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """Inside a ``with`` block the first signal is remembered; the second ends the process at once.

    SIGHUP stays ignored where it was, as under nohup. Under a launcher what comes within LAUNCHERS_PATIENCE of the
    first is no second signal, and the launcher's own death counts as SIGHUP.
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
        if self._launcher and self.signum is not None:
            return  # the launcher sends more while this process ends
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def check(self) -> None:
        """Raise Interrupted if a signal has come to any process of the run: in all, at the same place."""
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
        elif not self._launcher or time.monotonic() - self._came > LAUNCHERS_PATIENCE:
            os._exit(128 + signum)
