"""The loop in one process: where it may stop, what it then keeps, and which weights its results are of."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainers import opened, trained

from analysis.confusion import draw_confusion
from analysis.grids import draw_grid
from configs.load import load_config
from engine import state
from engine.checkpoint import list_checkpoints, load_checkpoint
from engine.history import read_table
from engine.interrupts import Interrupted, StopRequest
from engine.trainer import Trainer
from engine.weights.load import read_weights
from errors import UserError
from processes import TINY
from utils.progress import Progress


def _stop_during(trainer: Trainer, title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a signal come at the first batch of the evaluation of this title."""
    start = trainer.progress.start

    def started(name: str, steps: int, step: int) -> None:
        start(name, steps, step)
        if name == title:
            trainer.stop.signum = 2

    monkeypatch.setattr(trainer.progress, "start", started)


def test_stopping_in_the_last_evaluation_keeps_the_final_weights(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The selected weights are evaluated last; a checkpoint written then must hold the run's own state."""
    pairs = ("TRAIN.EPOCHS=2", "TRAIN.EMA_DECAY=0.9")
    with opened(tmp_path, *pairs) as trainer:
        select = trainer._select

        def select_first_only(epoch: int) -> Any:
            evaluation = select(epoch)
            trainer.position.best_accuracy = 2.0  # no later epoch is better
            return evaluation

        monkeypatch.setattr(trainer, "_select", select_first_only)
        _stop_during(trainer, "selected weights, test", monkeypatch)
        with pytest.raises(Interrupted):
            trainer.fit()
    run = tmp_path / "quickstart"
    saved = load_checkpoint(list_checkpoints(run / "checkpoints")[0])
    final = read_weights(run / "final_model.pdparams").arrays
    assert all(np.array_equal(saved.parts["average"][name], final[name]) for name in final)
    results = trained(tmp_path, *pairs, resume=True)
    assert results["selected"]["epoch"] == 1 and results["final"]["epoch"] == 2
    assert results["selected"]["test"] != results["final"]["test"]


def test_resuming_a_run_that_has_ended_repeats_its_results(tmp_path: Path) -> None:
    results = trained(tmp_path, "TRAIN.MAX_STEPS=19")  # an epoch exactly
    table = (tmp_path / "quickstart" / "history.csv").read_bytes()
    assert trained(tmp_path, "TRAIN.MAX_STEPS=19", resume=True) == results
    assert (tmp_path / "quickstart" / "history.csv").read_bytes() == table


def test_ending_earlier_than_planned_is_labelled_by_where_the_weights_stand(tmp_path: Path) -> None:
    trained(tmp_path, "TRAIN.MAX_STEPS=45", "TRAIN.EVAL_EVERY=20", "TRAIN.EPOCHS=4")
    results = trained(tmp_path, "TRAIN.EVAL_EVERY=20", "TRAIN.EPOCHS=1", resume=True)
    assert results["final"]["epoch"] == results["selected"]["epoch"] == 3
    assert [row["iteration"] for row in read_table(tmp_path / "quickstart" / "history.csv")] == ["19", "38", "45"]


def test_ending_before_the_first_evaluation_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = ("TRAIN.EVAL_EVERY=20", "TRAIN.LOG_EVERY=1")
    with opened(tmp_path, *pairs) as trainer:
        record = trainer._record_step
        monkeypatch.setattr(trainer, "_record_step", _signal_at(trainer, 21, record))
        with pytest.raises(Interrupted):
            trainer.fit()
    results = trained(tmp_path, *pairs, "TRAIN.EPOCHS=1", resume=True)
    assert results["selected"] == results["final"] and results["final"]["epoch"] == 2
    assert (tmp_path / "quickstart" / "best_model.pdparams").exists()


def _signal_at(trainer: Trainer, iteration: int, record: Callable[..., None]) -> Callable[..., None]:
    def recorded(*arguments: Any) -> None:
        record(*arguments)
        if trainer.position.iteration == iteration:
            trainer.stop.signum = 15

    return recorded


def test_selected_weights_of_a_cut_epoch_are_not_taken_for_the_final_ones(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial ends inside epoch 1 and is resumed to end later in it: best and final share the epoch only."""
    trained(tmp_path, "TRAIN.MAX_STEPS=5")
    with opened(tmp_path, "TRAIN.MAX_STEPS=9", resume=True) as trainer:
        trainer.position.best_accuracy = 2.0  # what is saved as best stays best
        results = trainer.fit()
    assert results["selected"]["epoch"] == results["final"]["epoch"] == 1
    assert results["selected"]["test"]["loss"] != results["final"]["test"]["loss"]
    assert json.loads((tmp_path / "quickstart" / "results.json").read_text()) == results


def test_weights_that_evaluate_to_no_number_are_never_the_best(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the holdout loss is nan"):
        trained(tmp_path, "OPTIMIZER.WEIGHT_DECAY=1e300", "TRAIN.MAX_STEPS=1")
    assert not (tmp_path / "quickstart" / "best_model.pdparams").exists()


def test_output_that_nobody_reads_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        results = trained(tmp_path, "TRAIN.MAX_STEPS=1")
    assert results["final"]["test"]["images"] == 360
    assert "final weights" in (tmp_path / "quickstart" / "train.log").read_text(encoding="utf-8")


def test_checkpoint_of_another_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path, "TRAIN.MAX_STEPS=1")
    other = state.build_model(load_config("configs/quickstart.yaml", [*TINY, "MODEL.ARGS.embed_dims=[8, 16, 16, 64]"]))
    monkeypatch.setattr(state, "build_model", lambda config: other)
    with pytest.raises(UserError, match="its model is not that of iformer_small"):
        trained(tmp_path, "TRAIN.MAX_STEPS=1", resume=True)


def test_mistake_before_the_first_step_does_not_bar_the_next_try(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cifar-10"):
        trained(tmp_path, "DATA.NAME=cifar10", "DATA.DOWNLOAD=false", f"DATA.ROOT={tmp_path}")
    assert trained(tmp_path, "TRAIN.MAX_STEPS=1")["final"]["epoch"] == 1
    with pytest.raises(UserError, match="holds a run already"):
        trained(tmp_path, "TRAIN.MAX_STEPS=1")


def test_bar_shows_rate_and_time_left_in_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(total=100 * 390 * 128, done=0)
    progress.start("epoch 100/100", 390, 188)
    progress.train_batch(128, lambda: (2.1256, 0.2865), 1e-3)
    shown = sys.stderr.getvalue().split("\r")[-1][:80]
    progress.finish()
    assert "189/390" in shown and "images/s" in shown and " left, loss 2.12" in shown


def test_names_in_pictures_are_no_formulas(tmp_path: Path) -> None:
    name = r"$\frac$ 100%"
    draw_grid([np.zeros((4, 4, 3), np.uint8)], [name], ["black"], tmp_path / "grid.png", title=name)
    draw_confusion([[1, 0], [0, 1]], [name, "b"], tmp_path / "confusion.png", name)
    assert all((tmp_path / f"{kind}.png").stat().st_size > 1000 for kind in ("grid", "confusion"))


def test_weights_selected_on_test_are_not_evaluated_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = []
    evaluate = Trainer._evaluate
    monkeypatch.setattr(Trainer, "_evaluate", lambda self, loader, title, *rest: titles.append(title)
                        or evaluate(self, loader, title, *rest))
    with opened(tmp_path, "DATA.HOLDOUT=0", "TRAIN.EPOCHS=1") as trainer:
        results = trainer.fit()
    assert titles == ["epoch 1/1 test"]
    assert results["final"] == results["selected"] and results["selected_on"] == "test"


def test_closed_terminal_stops_but_not_under_nohup() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(Interrupted, match="SIGHUP"):
            stop.check()
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_launchers_repeated_signal_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "1")
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    previous = signal.getsignal(signal.SIGTERM)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signum == signal.SIGTERM and not ended
            stop._came -= 3.0
            os.kill(os.getpid(), signal.SIGTERM)
            assert ended == [143]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_time_left_includes_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("utils.progress.time.perf_counter", lambda: now[0])
    shown = []
    monkeypatch.setattr("utils.progress.log.info", lambda text, *values: shown.append(text % values))
    progress = Progress(total=1000, done=0, evaluations=5, images=300)
    progress.start("epoch 1/1", 10, 0)
    now[0] = 10.0
    progress.train_batch(100, lambda: (1.0, 0.5), 0.1)  # 10 images a second; an evaluation at 30 takes 10 s
    with progress.pause():
        now[0] += 20.0
    progress.start("epoch 1/1", 10, 1)
    now[0] += 10.0
    progress.train_batch(100, lambda: (1.0, 0.5), 0.1)
    assert "0:02:20 left" in shown[0] and "0:02:40 left" in shown[1]


def test_the_time_of_an_epoch_is_that_of_all_its_sittings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``timing.csv`` counts the seconds before an interruption; what the next epoch took stands in its own row."""
    with opened(tmp_path, "TRAIN.LOG_EVERY=1") as trainer:
        monkeypatch.setattr(trainer, "_record_step", _signal_at(trainer, 7, trainer._record_step))
        with pytest.raises(Interrupted):
            trainer.fit()
        assert trainer.position.seconds > 0
    newest = list_checkpoints(tmp_path / "quickstart" / "checkpoints")[0]
    position = load_checkpoint(newest).position
    assert position["step"] == 7 and position["seconds"] == trainer.position.seconds
    with opened(tmp_path, "TRAIN.LOG_EVERY=1", "TRAIN.EPOCHS=2", resume=True) as trainer:
        trainer.position.seconds += 1000  # as if the first sitting had been slow
        trainer.fit()
        assert trainer.position.seconds == 0
    first, second = read_table(tmp_path / "quickstart" / "timing.csv")
    assert float(first["train_seconds"]) > 1000 > float(second["train_seconds"])
    assert float(first["train_images_per_second"]) == pytest.approx(
        19 * trainer.config.DATA.BATCH_SIZE / float(first["train_seconds"]), abs=0.01)
