"""Progress of a run: a bar in a terminal, plain lines elsewhere; both with rate and time left."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from tqdm import tqdm

log = logging.getLogger("suite")
PLAIN_LINE_SECONDS = 15.0
BAR_SECONDS = 0.2
BAR = "{desc}: |{bar:6}| {n_fmt}/{total_fmt}{postfix}"  # rate and time left are the run's, and fit 80 columns


class Progress:
    """Counts images of training over the whole run (``total``, of which ``done`` before this process).

    The time left includes ``evaluations`` of ``images`` each: as long as those made so far, before the first as if
    they went three times as fast as training.
    """

    def __init__(self, total: int, done: int, evaluations: int = 0, images: int = 0, shown: bool = True) -> None:
        self.total, self.done = total, done
        self.interactive = shown and sys.stderr.isatty()
        self._shows = shown
        self._evaluations, self._images, self._evaluation_seconds = evaluations, images, []
        self._bar: tqdm | None = None
        self._started = time.perf_counter()
        self._shown = -math.inf
        self._seen = 0
        self._title = ""

    def start(self, title: str, steps: int, step: int) -> None:
        """Begin a stretch of ``steps`` batches, such as an epoch, at batch ``step``."""
        self.finish()
        self._title = title
        if self.interactive:
            self._bar = tqdm(total=steps, initial=step, desc=title, leave=False, dynamic_ncols=True, bar_format=BAR)
        self._steps, self._step = steps, step

    def train_batch(self, images: int, means: Callable[[], tuple[float, float]], lr: float) -> None:
        """Count a batch of training; ``means`` gives loss and accuracy, and is asked only when they are shown."""
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

    def eval_batch(self) -> None:
        """Count a batch of evaluation."""
        if self._due():
            self._show("")

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock of the training rate for the length of a ``with`` block: an evaluation."""
        paused = time.perf_counter()
        try:
            yield
        finally:
            self.finish()
            self._evaluation_seconds.append(time.perf_counter() - paused)
            self._started += self._evaluation_seconds[-1]

    def finish(self) -> None:
        """End the stretch."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _due(self) -> bool:
        """Count a batch; is it time to show something?"""
        self._step += 1
        now = time.perf_counter()
        early = now - self._shown < (BAR_SECONDS if self.interactive else PLAIN_LINE_SECONDS)
        if not self._shows or (early and self._step < self._steps):
            return False
        self._shown = now
        return True

    def _show(self, text: str) -> None:
        if self._bar is not None:
            self._bar.n = self._step
            self._bar.set_postfix_str(text)
        elif self._step < self._steps:
            log.info("%s: batch %d/%d%s", self._title, self._step, self._steps, f", {text}" if text else "")
