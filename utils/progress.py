"""Progress bars in a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from tqdm import tqdm

log = logging.getLogger("suite")
PLAIN_LINE_SECONDS = 15.0
BAR_SECONDS = 0.2
BAR = "{desc}: |{bar:6}| {n_fmt}/{total_fmt}{postfix}"  # fits 80 columns with the run's own rate and time left


def batches(title: str, total: int, unit: str = "batch", **options: Any) -> tqdm:
    """Return a progress bar over ``total`` batches (or other units); it is hidden outside a terminal."""
    return tqdm(total=total, desc=title, unit=unit, leave=False, disable=not sys.stderr.isatty(), **options)


class TrainingBar:
    """Progress of a whole training in images: ``total``, of which ``done`` before this process.

    The time left includes ``evaluations`` of ``images`` each. One is assumed to take the mean time of those made so
    far; before the first, images are assumed to be three times as fast as in training.
    """

    def __init__(self, total: float, done: int, evaluations: int = 0, images: int = 0, shown: bool = True) -> None:
        self.total, self.done, self.shown = total, done, shown
        self._evaluations, self._images, self._evaluation_seconds = evaluations, images, []
        self._bar: tqdm | None = None
        self._started = time.perf_counter()
        self._shown_at = -math.inf
        self._seen = 0

    def start(self, title: str, steps: int, step: int = 0) -> None:
        """Begin a stretch of ``steps`` batches, such as an epoch, at batch ``step``."""
        self.finish()
        self._title, self._steps, self._step = title, steps, step
        if self.shown and sys.stderr.isatty():
            self._bar = batches(title, steps, initial=step, dynamic_ncols=True, bar_format=BAR)

    def train_batch(self, images: int, means: Callable[[], tuple[float, float]], lr: float) -> None:
        """Count a training batch; ``means`` returns (loss, accuracy) and is called only when they are shown."""
        self._seen += images
        self.done += images
        if not self._due():
            return
        rate = self._seen / (time.perf_counter() - self._started)
        made = self._evaluation_seconds
        one = sum(made) / len(made) if made else self._images / (3 * rate)
        seconds = (self.total - self.done) / rate + max(self._evaluations - len(made), 0) * one
        left = timedelta(seconds=round(seconds))
        loss, accuracy = means()
        self._show(f"{rate:.1f} images/s, {left} left, loss {loss:.4f}, accuracy {accuracy:.2%}, lr {lr:.3g}")

    @contextmanager
    def evaluation(self, title: str, steps: int) -> Iterator[Callable[[], None]]:
        """Show an evaluation of ``steps`` batches, apart from the training rate; yields what to call after each."""
        paused = time.perf_counter()
        self.start(title, steps)
        try:
            yield lambda: self._show("") if self._due() else None
        finally:
            self.finish()
            self._evaluation_seconds.append(time.perf_counter() - paused)
            self._started += self._evaluation_seconds[-1]

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _due(self) -> bool:
        """Count a batch and return whether it is time to show something."""
        self._step += 1
        now = time.perf_counter()
        early = now - self._shown_at < (PLAIN_LINE_SECONDS if self._bar is None else BAR_SECONDS)
        if not self.shown or (early and self._step < self._steps):
            return False
        self._shown_at = now
        return True

    def _show(self, text: str) -> None:
        if self._bar is not None:
            self._bar.n = self._step
            self._bar.set_postfix_str(text)
        elif self._step < self._steps:
            log.info("%s: batch %d/%d%s", self._title, self._step, self._steps, f", {text}" if text else "")
