"""The training loop: an image goes from the loader through the network into the curves, top to bottom.

What is computed is a function of the config alone: the learning rate is one of the iteration, order and
augmentation are functions of (seed, epoch), dropout and drop path of (seed, iteration). A run that is interrupted
and resumed therefore ends with the weights and curves of the run that was not. Where several processes train one run,
each goes through all of this with its share of every batch; process 0 alone writes.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from datasets.loader import EvalLoader
from engine import distributed
from engine.data import build_eval_loader, build_train_loader, record_data
from engine.evaluate import Evaluation, evaluate
from engine.history import History
from engine.interrupts import Interrupted, StopRequest
from engine.metrics import RunningMean
from engine.model import build_model, find_weights, load_model
from engine.optim import learning_rate
from engine.run import RunFolder
from engine.state import Position, Step, TrainingState
from engine.teachers import Teachers
from engine.weights.load import load_weights
from errors import UserError
from utils.fileio import write_json
from utils.progress import Progress

log = logging.getLogger("suite")

MOST_SKIPPED_IN_A_ROW = 50  # steps that TRAIN.ON_NAN skips before the run is given up


class Trainer:
    """One run: its data, its state, and where it stands."""

    def __init__(self, config: CfgNode, run: RunFolder, *, resume: bool = False, weights: str = "") -> None:
        self.config, self.run, self.main = config, run, distributed.is_main()
        self.loader = distributed.main_process_first(lambda: build_train_loader(config))
        self.selection_split = "holdout" if config.DATA.HOLDOUT else "test"
        self.selection = distributed.main_process_first(lambda: build_eval_loader(config, self.selection_split))
        distributed.on_main_process(lambda: record_data(run.path, self.loader.dataset, resume))
        teachers = None
        if config.LOSS.TEACHERS:
            teachers = distributed.on_all_processes(lambda: Teachers(config, self.loader.dataset))
        self.state = distributed.on_all_processes(lambda: TrainingState(config, teachers))
        if weights:
            distributed.on_main_process(lambda: self._load(weights))
        self.position = self.state.restore(run) if resume else Position()
        self.state.share()
        if weights and self.main:  # a run that is ended before its next checkpoint starts from them again
            self.state.save(run, self.position)
        self.history = History(run.path, self.position.iteration, self.position.epoch) if self.main else None
        self.means = RunningMean(self.position.sums)
        self.steps, self.epochs = len(self.loader), config.TRAIN.EPOCHS
        self.last = min(config.TRAIN.MAX_STEPS or math.inf, self.epochs * self.steps)
        batch = config.DATA.BATCH_SIZE
        self.progress = Progress(self.last * batch, self.position.iteration * batch, self._evaluations_left(),
                                 len(self.selection.dataset), shown=self.main)
        self.saved_at = time.monotonic()
        self.evaluated: tuple[int, Evaluation] | None = None  # the newest selection, and the iteration it was made at
        self.stop = StopRequest()

    def _load(self, weights: str) -> None:
        report = load_weights(self.state.model, find_weights(weights), num_classes_mismatch="fresh_head")
        log.info("%s", "\n".join(report.lines()))

    def _evaluations_left(self) -> int:
        """Return how often there will be an evaluation from here on, those of the results included."""
        last = -(-self.last // self.steps)
        return last // self.config.TRAIN.EVAL_EVERY - self.position.epoch // self.config.TRAIN.EVAL_EVERY + 2

    def fit(self, after_epoch: Callable[[Path], None] = lambda folder: None) -> dict[str, Any]:
        """Train to the end; returns what ``results.json`` holds.

        ``after_epoch`` is called with the run's folder after each epoch. Raises Interrupted, after saving, when a
        signal has come, and UserError for a loss that is no number.
        """
        log.info("%s: %d images for training, %d from %s for selection; %d epochs of %d iterations", self.config.NAME,
                 len(self.loader.dataset), len(self.selection.dataset), self.selection_split, self.epochs, self.steps)
        try:
            with self.stop:
                for epoch in range(self.position.epoch, max(-(-self.last // self.steps), self._epoch_reached())):
                    timing = self._train_epoch(epoch)
                    evaluation = self._select(epoch)
                    self._record_epoch(epoch, timing, evaluation)
                    if self.main:
                        self._save()
                        after_epoch(self.run.path)
                if not self.position.best_epoch:  # resumed to end at once, and never evaluated before
                    self._select(self._epoch_reached() - 1)
                if self.main:
                    self.state.save_weights(self.run, "final")
                return self._report()
        except Interrupted as interrupted:
            log.info("%s: saved %s; continue with --resume", interrupted, distributed.on_main_process(self._save))
            raise
        finally:
            self.progress.finish()
            if self.history:
                self.history.close()

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        """Train what is left of an epoch; returns its row of ``timing.csv`` without the evaluation's rate.

        The row is that of the whole epoch, over as many sittings as it took.
        """
        config, position = self.config, self.position
        first, started = position.step, time.perf_counter() - position.seconds
        self.state.model.train()
        self.progress.start(f"epoch {epoch + 1}/{self.epochs}", self.steps, first)
        for images, labels in self.loader.epoch(epoch, first):
            if position.iteration >= self.last:
                break
            lr = self._learning_rate(position.iteration)
            step = self.state.step(images, labels, position.iteration, lr, self.stop.check)
            position.step += 1
            position.iteration += 1
            position.seconds = time.perf_counter() - started
            if self._taken(step):
                self.means.add(step.loss, step.correct, step.images)
                if position.iteration % config.TRAIN.LOG_EVERY == 0:
                    self._record_step(epoch, lr, step)
            self.progress.train_batch(step.images, self.means.means, lr)
            self.stop.check()
            if self.main and time.monotonic() - self.saved_at > 60 * config.TRAIN.CHECKPOINT_MINUTES:
                self._save()
        seconds = time.perf_counter() - started
        images_seen = position.step * config.DATA.BATCH_SIZE
        return {"epoch": epoch + 1, "iteration": position.iteration, "train_seconds": round(seconds, 3),
                "train_images_per_second": round(images_seen / seconds, 2)}

    def _select(self, epoch: int) -> Evaluation | None:
        """Evaluate on the selection split and keep the weights if they are the best so far."""
        position = self.position
        if (epoch + 1) % self.config.TRAIN.EVAL_EVERY and position.iteration < self.last:
            return None
        evaluation = self._evaluate(self.selection, f"epoch {epoch + 1}/{self.epochs} {self.selection_split}")
        self._refuse_non_finite(evaluation.loss, self.selection_split)
        self.evaluated = (position.iteration, evaluation)
        if (evaluation.top1, -evaluation.loss) > (position.best_accuracy, -position.best_loss):
            position.best_accuracy, position.best_loss = evaluation.top1, evaluation.loss
            position.best_epoch, position.best_iteration = epoch + 1, position.iteration
            if self.main:
                self.state.save_weights(self.run, "best")
        return evaluation

    def _evaluate(self, loader: EvalLoader, title: str, weights: Path | None = None) -> Evaluation:
        """Evaluate the state's weights, or those of a file in a network of their own."""
        def advance(images: int) -> None:
            self.progress.eval_batch()
            self.stop.check()

        with self.progress.pause():
            self.progress.start(title, len(loader), 0)
            if weights is None:
                return self.state.evaluate(loader, advance)
            loaded = distributed.on_main_process(lambda: load_model(self.config, weights)[0])
            model = loaded if self.main else build_model(self.config)
            distributed.broadcast(model.state_dict().values())
            return evaluate(model, loader, self.state.loss, advance)

    def _taken(self, step: Step) -> bool:
        """Count a step that was skipped; raises UserError for too many in a row."""
        position = self.position
        if step.taken:
            position.skipped_in_a_row = 0
            return True
        position.skipped += 1
        position.skipped_in_a_row += 1
        log.warning("iteration %d skipped: its loss is %s%s (%d skipped so far)", position.iteration,
                    loss := float(step.loss), ", its gradient no number" if math.isfinite(loss) else "",
                    position.skipped)
        if position.skipped_in_a_row == MOST_SKIPPED_IN_A_ROW:
            raise UserError(f"{MOST_SKIPPED_IN_A_ROW} steps in a row were skipped up to iteration {position.iteration} "
                            f"(TRAIN.ON_NAN), the last with loss {loss}; {self._advice()}")
        return False

    def _record_step(self, epoch: int, lr: float, step: Step) -> None:
        loss = float(step.loss)
        self._refuse_non_finite(loss)
        if self.history:
            self.history.add_step({"iteration": self.position.iteration, "epoch": epoch + 1, "lr": lr,
                                   "train_loss": loss, "train_accuracy": float(step.correct) / step.images})

    def _record_epoch(self, epoch: int, timing: dict[str, Any], evaluation: Evaluation | None) -> None:
        """Write the epoch's rows and move to the next; an epoch that MAX_STEPS cut short stays the present one."""
        position = self.position
        train_loss, train_accuracy = self.means.means()
        self._refuse_non_finite(train_loss)
        row = {"epoch": epoch + 1, "iteration": position.iteration,
               "lr": self._learning_rate(max(position.iteration - 1, 0)), "train_loss": train_loss,
               "train_accuracy": train_accuracy, "val_loss": "", "val_accuracy": "",
               "best_val_accuracy": position.best_accuracy if position.best_epoch else ""}
        text = f"train loss {train_loss:.4f}, accuracy {train_accuracy:.2%}"
        if evaluation:
            row |= {"val_loss": evaluation.loss, "val_accuracy": evaluation.top1}
            text += (f"; {self.selection_split} loss {evaluation.loss:.4f}, accuracy {evaluation.top1:.2%} "
                     f"(best {position.best_accuracy:.2%} in epoch {position.best_epoch})")
        log.info("epoch %d/%d: %s; %s images/s", epoch + 1, self.epochs, text, timing["train_images_per_second"])
        rate = round(evaluation.images_per_second, 2) if evaluation else ""
        if self.history:
            self.history.add_epoch(row, {**timing, "val_images_per_second": rate})
        if position.step == self.steps:
            position.epoch, position.step, position.seconds = epoch + 1, 0, 0.0
            self.means = RunningMean()

    def _report(self) -> dict[str, Any]:
        """Evaluate the final and the selected weights on the test set, once, and write ``results.json``."""
        position, run = self.position, self.run
        on_test = self.selection_split == "test"
        loader = self.selection if on_test else build_eval_loader(self.config, "test")
        if on_test and self.evaluated and self.evaluated[0] == position.iteration:
            final = self.evaluated[1].figures()
        else:
            final = self._evaluate(loader, "final weights, test").figures()
        selected = final
        if position.best_iteration != position.iteration:
            selected = self._evaluate(loader, "selected weights, test", run / "best_model.pdparams").figures()
        results = {"selected_on": self.selection_split,
                   "selected": {"epoch": position.best_epoch, "test": selected},
                   "final": {"epoch": self._epoch_reached(), "test": final},
                   "skipped_steps": position.skipped}
        if self.main:
            write_json(run.results, results)
        for name in ("selected", "final"):
            figures = results[name]["test"]
            log.info("%s weights (epoch %d): test top-1 %.2f %%, loss %.4f", name, results[name]["epoch"],
                     100 * figures["top1"], figures["loss"])
        return results

    def _epoch_reached(self) -> int:
        """Return the number, from 1, of the epoch that the present weights are of."""
        return self.position.epoch + (self.position.step > 0)

    def _learning_rate(self, iteration: int) -> float:
        return learning_rate(iteration, self.steps, self.epochs, self.config.OPTIMIZER.LR, self.config.SCHEDULE)

    def _save(self) -> Path:
        self.position.sums = self.means.sums()
        self._refuse_non_finite(self.position.sums[0])
        self.saved_at = time.monotonic()
        if self.history:
            self.history.sync()
        return self.state.save(self.run, self.position)

    def _refuse_non_finite(self, loss: float, of: str = "training") -> None:
        if math.isfinite(loss):
            return
        raise UserError(f"the {of} loss is {loss} at iteration {self.position.iteration}; {self._advice()}, or "
                        "TRAIN.ON_NAN skip")

    def _advice(self) -> str:
        """Return what is known of the run before its loss was no number, and what to try."""
        finite = self.history.last_step() if self.history else None
        before = f"that of training at iteration {finite['iteration']} was {finite['train_loss']}" if finite else \
            "no iteration before it was recorded"
        return (f"{before}; the newest checkpoint is from before: try a lower OPTIMIZER.LR, a longer "
                "SCHEDULE.WARMUP_EPOCHS, TRAIN.GRAD_CLIP 1.0, TRAIN.PRECISION float32")
