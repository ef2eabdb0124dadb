"""Losses and weights that are no numbers: steps skipped and counted, checkpoints never written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainers import opened

from configs.load import load_config
from engine import state
from engine.checkpoint import list_checkpoints, load_checkpoint
from engine.history import read_table
from engine.interrupts import Interrupted
from engine.trainer import Trainer
from errors import UserError
from processes import TINY


def _poison(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, *iterations: int) -> None:
    """Let the images of these iterations (from 0) hold a pixel that is no number."""
    step = trainer.state.step

    def poisoned(images: np.ndarray, labels: np.ndarray, iteration: int, *rest: Any) -> Any:
        if iteration in iterations:
            images = images.copy()
            images[0, 0, 0, 0] = np.nan
        return step(images, labels, iteration, *rest)

    monkeypatch.setattr(trainer.state, "step", poisoned)


def test_skipped_steps_leave_no_trace_and_are_counted_through_a_resume(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = ("TRAIN.ON_NAN=skip", "TRAIN.LOG_EVERY=1", "TRAIN.EMA_DECAY=0.9", "TRAIN.EPOCHS=1", "MODEL.DROP_PATH=0.2")
    bad = (3, 4, 9)
    results = {}
    for name, stop in (("whole", None), ("resumed", 5)):
        with opened(tmp_path / name, *pairs) as trainer:
            _poison(trainer, monkeypatch, *bad)
            if stop:
                monkeypatch.setattr(trainer, "_taken", _request_at(trainer, stop, trainer._taken))
                with pytest.raises(Interrupted):
                    trainer.fit()
            else:
                results[name] = trainer.fit()
    with opened(tmp_path / "resumed", *pairs, resume=True) as trainer:
        assert trainer.position.skipped == 2 and trainer.position.skipped_in_a_row == 2
        _poison(trainer, monkeypatch, *bad)
        results["resumed"] = trainer.fit()
    assert results["whole"] == results["resumed"] and results["whole"]["skipped_steps"] == 3
    folders = [tmp_path / name / "quickstart" for name in results]
    assert [row["iteration"] for row in read_table(folders[0] / "steps.csv")] == [
        str(iteration) for iteration in range(1, 20) if iteration - 1 not in bad]
    states = [load_checkpoint(list_checkpoints(folder / "checkpoints")[0]) for folder in folders]
    for part, arrays in states[0].parts.items():
        assert all(np.array_equal(array, states[1].parts[part][key]) for key, array in arrays.items()), part
        assert all(np.isfinite(array).all() for array in arrays.values())
    assert "iteration 4 skipped: its loss is nan (1 skipped so far)" in (folders[0] / "train.log").read_text()


def _request_at(trainer: Trainer, iteration: int, taken: Callable[..., bool]) -> Callable[..., bool]:
    def asked(step: Any) -> bool:
        if trainer.position.iteration == iteration:
            trainer.stop.signum = 15
        return taken(step)

    return asked


def test_a_skipped_step_changes_nothing() -> None:
    config = load_config("configs/quickstart.yaml", [*TINY, "TRAIN.ON_NAN=skip", "TRAIN.EMA_DECAY=0.9"])
    own = state.TrainingState(config)
    images, labels = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype("float32"), np.arange(8)
    own.step(images, labels, 0, 0.01)

    def arrays() -> list[np.ndarray]:
        return [tensor.numpy().copy() for tensor in (*own.model.state_dict().values(), *own.average.state.values(), *(
            value for value in own.optimizer.state_dict().values() if hasattr(value, "numpy")))]

    before = arrays()
    images[0, 0, 0, 0] = np.inf
    assert not own.step(images, labels, 1, 0.01).taken
    assert all(np.array_equal(one, other) for one, other in zip(before, arrays(), strict=True))


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.trainer.MOST_SKIPPED_IN_A_ROW", 4)
    with opened(tmp_path, "TRAIN.ON_NAN=skip", "TRAIN.LOG_EVERY=1") as trainer:
        _poison(trainer, monkeypatch, 1, *range(3, 10))
        with pytest.raises(UserError, match=r"4 steps in a row were skipped up to iteration 7 .* iteration 3 was \d"):
            trainer.fit()


def test_weights_that_are_no_numbers_are_never_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss may still be finite when the step after it has ruined the weights: the save looks at them."""
    with opened(tmp_path, "TRAIN.MAX_STEPS=3", "TRAIN.EVAL_EVERY=5") as trainer:
        good = trainer._save()
        trainer.position.iteration = 1
        weight = next(iter(trainer.state.model.parameters()))
        weight.set_value(np.full(weight.shape, np.nan, "float32"))
        with pytest.raises(UserError, match="is no number: no checkpoint is written"):
            trainer._save()
        trainer.history.close()
        assert list_checkpoints(trainer.run.checkpoints) == [good]
