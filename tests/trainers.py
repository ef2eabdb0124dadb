"""Small trainings inside the test's own process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from yacs.config import CfgNode

from configs.load import load_config
from engine.evaluate import Evaluation
from engine.state import Step, TrainingState
from engine.train import train
from processes import TINY


def tiny(output: Path, *pairs: str) -> CfgNode:
    """Return the config of a tiny network on 490 digits (19 steps of 25), with its run in ``output``."""
    return load_config("configs/quickstart.yaml", [
        *TINY, f"OUTPUT={output}", "DATA.WORKERS=0", "DATA.MAX_IMAGES=490", "DATA.BATCH_SIZE=25", *pairs])


def trained(output: Path, *pairs: str, **options: Any) -> dict[str, Any]:
    """Train such a run to its end; returns its results."""
    return train(tiny(output, *pairs), **options)


def signal_at(patch: pytest.MonkeyPatch, step: int, signum: int = signal.SIGTERM) -> None:
    """Let a signal come after the step of this number (from 1)."""
    def stopped(original: Callable[..., Step], self: TrainingState, *arguments: Any) -> Step:
        taken = original(self, *arguments)
        if self.progress.global_step + 1 == step:
            os.kill(os.getpid(), signum)
        return taken

    _wrap(patch, "step", stopped)


def poison(patch: pytest.MonkeyPatch, *steps: int) -> None:
    """Put a NaN pixel into the images of these global steps (from 0)."""
    def poisoned(original: Callable[..., Step], self: TrainingState, images: np.ndarray, labels: np.ndarray, step: int,
                 *rest: Any) -> Step:
        if step in steps:
            images = images.copy()
            images[0, 0, 0, 0] = np.nan
        return original(self, images, labels, step, *rest)

    _wrap(patch, "step", poisoned)


def never_right(patch: pytest.MonkeyPatch, after: int) -> None:
    """Make evaluations during training wrong for every image after global step ``after``: no later epoch is best."""
    def wrong(original: Callable[..., Evaluation], self: TrainingState, *arguments: Any) -> Evaluation:
        found = original(self, *arguments)
        return replace(found, logits=-np.eye(10)[found.labels]) if self.progress.global_step > after else found

    _wrap(patch, "evaluate", wrong)


def _wrap(patch: pytest.MonkeyPatch, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(TrainingState, name)
    patch.setattr(TrainingState, name, lambda self, *arguments: wrapper(original, self, *arguments))
