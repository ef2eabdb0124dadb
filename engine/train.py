"""Train one run: the loop that takes an image from the loader through the network into the curves.

The result depends on the config alone: the learning rate is a function of the global step, order and augmentation of
(seed, epoch), dropout and drop path of (seed, step). A resumed run is therefore bit-identical to an uninterrupted one.
With several processes each runs this code on its shard of every batch; only process 0 writes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paddle import nn
from yacs.config import CfgNode

from datasets.files import damage_check
from datasets.loader import EvalLoader
from engine import distributed, runtime
from engine.checkpoint import check_space
from engine.data import build_eval_loader, build_train_loader, record_data
from engine.evaluate import Evaluation, evaluate
from engine.interrupts import Interrupted, StopRequest
from engine.model import build_model, find_weights, load_model
from engine.optim import learning_rate
from engine.run import History, RunFolder, log, read_table
from engine.state import RunningMean, TrainingProgress, TrainingState
from engine.weights import load_weights
from errors import UserError
from utils.fileio import write_json
from utils.progress import TrainingBar

FolderHook = Callable[[Path], Any]

MAX_SKIPPED_IN_A_ROW = 50  # steps that TRAIN.ON_NAN skips before the run stops


def train(config: CfgNode, *, resume: bool = False, overwrite: bool = False, weights: str = "",
          folder: Path | None = None, settings: Sequence[str] = (), after_epoch: FolderHook = lambda folder: None,
          at_end: FolderHook = lambda folder: None) -> dict[str, Any]:
    """Train the run of a config in ``folder`` (``OUTPUT/NAME``); returns the contents of its ``results.json``.

    ``resume`` continues the run that is in the folder, ``overwrite`` replaces it. ``weights`` is a file, run or
    released checkpoint to start from, ``settings`` what ``runtime.prepare`` returned. ``after_epoch`` and, when the
    results are written, ``at_end`` are called on the main process with the run's folder.

    Raises Interrupted when a signal (in a notebook the stop button) ended the run after saving, and UserError.
    """
    run = RunFolder(folder or Path(config.OUTPUT) / config.NAME)
    results: dict[str, Any] = {}
    interrupted: Interrupted | None = None
    with distributed.process_group(config):
        device, precision = distributed.on_all_processes(lambda: _start(config, run.precision() if resume else ""))
        if "float32" in distributed.all_gather_object(precision):  # auto, and one machine lacks bfloat16
            precision = "float32"
        distributed.on_main_process(lambda: run.open(config, resume=resume, overwrite=overwrite))
        try:
            if distributed.is_main():
                run.record_environment({**runtime.environment(device, list(settings)), "precision": precision,
                                        "processes": distributed.world_size()}, resume=resume)
            log.info("device %s, %s; set in the environment: %s; processes: %d", device, precision,
                     ", ".join(settings) or "nothing", distributed.world_size())
            results = _fit(config, run, precision, resume, weights, after_epoch)
            if distributed.is_main():
                at_end(run.path)
            log.info("wrote %s", run.path)
        except Interrupted as error:  # raised below: for the process group it is not a failure
            interrupted = error
        finally:
            run.close()
    if interrupted:
        raise interrupted
    return results


def _start(config: CfgNode, recorded_precision: str) -> tuple[str, str]:
    """Set up this process; returns device and precision."""
    device = runtime.start(config)
    precision = runtime.choose_precision(config.TRAIN.PRECISION, recorded_precision)
    runtime.check_precision(precision, config.TRAIN.AMP_LEVEL)
    return device, precision


def _fit(config: CfgNode, run: RunFolder, precision: str, resume: bool, weights: str,
         after_epoch: FolderHook) -> dict[str, Any]:
    main = distributed.is_main()

    # Data ----------------------------------------------------------------------------------------
    train_loader = distributed.main_process_first(lambda: build_train_loader(config))  # the first one may download
    split = "holdout" if config.DATA.HOLDOUT else "test"
    val_loader = distributed.main_process_first(lambda: build_eval_loader(config, split))
    # Built now, used at the end: a missing test set is reported before the first step.
    test_loader = val_loader if split == "test" else distributed.main_process_first(
        lambda: build_eval_loader(config, "test"))
    loaders = (test_loader, val_loader, train_loader)
    distributed.on_main_process(lambda: record_data(run.path, train_loader.dataset, resume))

    # Network, optimizer, progress ----------------------------------------------------------------
    state = distributed.on_all_processes(lambda: TrainingState(config, precision))
    distributed.on_main_process(lambda: check_space(run.path, state.model, state.ema is not None))
    if weights:
        distributed.on_main_process(lambda: _load_weights(state.model, weights))
    if resume:
        state.restore(run)
    state.broadcast()
    if weights and main:  # so that a run killed before its first checkpoint starts from them again
        state.save(run)
    progress = state.progress

    # Schedule, tables, progress bar, signals -----------------------------------------------------
    steps, epochs, batch_size = len(train_loader), config.TRAIN.EPOCHS, config.DATA.BATCH_SIZE
    last_step = min(config.TRAIN.MAX_STEPS or math.inf, epochs * steps)
    last_epoch = max(-(-last_step // steps), progress.epochs_started)
    evaluations = last_epoch // config.TRAIN.EVAL_EVERY - progress.epoch // config.TRAIN.EVAL_EVERY + 2
    history = History(run.path, progress.global_step, progress.epoch) if main else None
    bar = TrainingBar(last_step * batch_size, progress.global_step * batch_size, evaluations, len(val_loader.dataset),
                      shown=main)
    stop = StopRequest()
    saved_at = time.monotonic()

    def rate(step: int) -> float:
        return learning_rate(step, steps, epochs, config.OPTIMIZER.LR, config.SCHEDULE)

    def save() -> Path:
        nonlocal saved_at
        _check_finite(state.means.sums()[0], "training", run, progress)
        saved_at = time.monotonic()
        history.sync()
        return state.save(run)

    def evaluate_on(loader: EvalLoader, title: str, model: nn.Layer | None = None) -> Evaluation:
        def advance(images: int) -> None:
            show()
            stop.check()

        with bar.evaluation(title, len(loader)) as show:
            if model is None:
                return state.evaluate(loader, advance)
            return evaluate(model, loader, state.loss, advance)

    def validate(epoch: int) -> Evaluation:
        """Evaluate on the selection split, and save the weights if they are the best so far."""
        found = evaluate_on(val_loader, f"epoch {epoch}/{epochs} {split}")
        _check_finite(found.loss, split, run, progress)
        if (found.top1, -found.loss) > (progress.best_accuracy, -progress.best_loss):
            progress.best_accuracy, progress.best_loss = found.top1, found.loss
            progress.best_epoch, progress.best_step = epoch, progress.global_step
            if main:
                state.save_weights(run, "best")
        return found

    log.info("%s: %d images for training, %d from %s for selection; %d epochs of %d iterations", config.NAME,
             len(train_loader.dataset), len(val_loader.dataset), split, epochs, steps)
    if epochs == config.SCHEDULE.WARMUP_EPOCHS:
        log.warning("SCHEDULE.WARMUP_EPOCHS is as long as the training: only its end reaches OPTIMIZER.LR")
    validation: Evaluation | None = None
    try:
        with stop, damage_check(*(loader.dataset.images for loader in loaders if main)):
            for epoch in range(progress.epoch + 1, last_epoch + 1):
                # Train an epoch, or the rest of it --------------------------------------------------
                state.model.train()
                bar.start(f"epoch {epoch}/{epochs}", steps, progress.step)
                started = time.perf_counter() - progress.seconds
                for images, labels in train_loader.epoch(epoch - 1, progress.step):
                    if progress.global_step >= last_step:
                        break
                    lr = rate(progress.global_step)
                    step = state.step(images, labels, progress.global_step, lr, stop.check)
                    progress.step += 1
                    progress.global_step += 1
                    progress.seconds = time.perf_counter() - started
                    _count_skipped(step.taken, step.loss, run, progress)
                    if step.taken:
                        state.means.add(step.loss, step.correct, step.images)
                    if step.taken and progress.global_step % config.TRAIN.LOG_EVERY == 0:
                        loss = float(step.loss)
                        _check_finite(loss, "training", run, progress)
                        if main:
                            history.add_step({"iteration": progress.global_step, "epoch": epoch, "lr": lr,
                                              "train_loss": loss, "train_accuracy": float(step.correct) / step.images})
                    bar.train_batch(step.images, state.means.means, lr)
                    stop.check()
                    if main and time.monotonic() - saved_at > 60 * config.TRAIN.CHECKPOINT_MINUTES:
                        save()
                train_seconds = time.perf_counter() - started
                train_rate = round(progress.step * batch_size / train_seconds, 2)

                # Evaluate, record, save -------------------------------------------------------------
                due = epoch % config.TRAIN.EVAL_EVERY == 0 or progress.global_step >= last_step
                validation = validate(epoch) if due else None
                train_loss, train_accuracy = state.means.means()
                _check_finite(train_loss, "training", run, progress)
                text = f"train loss {train_loss:.4f}, accuracy {train_accuracy:.2%}"
                row = {"epoch": epoch, "iteration": progress.global_step, "lr": rate(max(progress.global_step - 1, 0)),
                       "train_loss": train_loss, "train_accuracy": train_accuracy,
                       "val_loss": validation and validation.loss, "val_accuracy": validation and validation.top1,
                       "best_val_accuracy": progress.best_accuracy if progress.best_epoch else None}
                timing = {"epoch": epoch, "iteration": progress.global_step, "train_seconds": round(train_seconds, 3),
                          "train_images_per_second": train_rate,
                          "val_images_per_second": validation and round(validation.images_per_second, 2)}
                if validation:
                    text += (f"; {split} loss {validation.loss:.4f}, accuracy {validation.top1:.2%} "
                             f"(best {progress.best_accuracy:.2%} in epoch {progress.best_epoch})")
                log.info("epoch %d/%d: %s; %s images/s", epoch, epochs, text, train_rate)
                if main:
                    history.add_epoch(row, timing)
                if progress.step == steps:  # else TRAIN.MAX_STEPS cut the epoch short, and it stays the current one
                    progress.epoch, progress.step, progress.seconds = epoch, 0, 0.0
                    state.means = RunningMean()
                if main:
                    save()
                    after_epoch(run.path)

            # Results: final and selected weights on the test set, once -----------------------------
            if not progress.best_epoch:  # resumed only to end, and never evaluated before
                validation = validate(progress.epochs_started)
            if main:
                state.save_weights(run, "final")
            final = validation if split == "test" and validation else evaluate_on(test_loader, "final weights, test")
            selected = final
            if progress.best_step != progress.global_step:
                model = _load_on_all(config, run / "best_model.pdparams")
                selected = evaluate_on(test_loader, "selected weights, test", model)
    except Interrupted as interrupted:
        log.info("%s: saved %s; continue with --resume", interrupted, distributed.on_main_process(save))
        raise
    finally:
        bar.finish()
        if main:
            history.close()
    results = {"selected_on": split, "selected": {"epoch": progress.best_epoch, "test": selected.figures()},
               "final": {"epoch": progress.epochs_started, "test": final.figures()}, "skipped_steps": progress.skipped}
    if main:
        write_json(run.results, results)
    for name, found in (("selected", selected), ("final", final)):
        log.info("%s weights (epoch %d): test top-1 %.2f %%, loss %.4f", name, results[name]["epoch"],
                 100 * found.top1, found.loss)
    return results


def _load_weights(model: nn.Layer, weights: str) -> None:
    report = load_weights(model, find_weights(weights), num_classes_mismatch="fresh_head")
    log.info("%s", "\n".join(report.lines()))


def _load_on_all(config: CfgNode, path: Path) -> nn.Layer:
    """Return a network with the weights of a file that only the main process reads."""
    loaded = distributed.on_main_process(lambda: load_model(config, path)[0])
    model = build_model(config) if loaded is None else loaded
    distributed.broadcast(model.state_dict().values())
    return model


def _count_skipped(taken: bool, loss: Any, run: RunFolder, progress: TrainingProgress) -> None:
    """Count and log a skipped step; UserError for too many in a row."""
    if taken:
        progress.skipped_in_a_row = 0
        return
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    log.warning("iteration %d skipped: its loss is %s%s (%d skipped so far)", progress.global_step, float(loss),
                ", its gradient not finite" if math.isfinite(float(loss)) else "", progress.skipped)
    if progress.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
        raise UserError(f"{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped up to iteration {progress.global_step} "
                        f"(TRAIN.ON_NAN), the last with loss {float(loss)}; {_advice(run)}")


def _check_finite(loss: float, of: str, run: RunFolder, progress: TrainingProgress) -> None:
    if not math.isfinite(loss):
        raise UserError(f"the {of} loss is {loss} at iteration {progress.global_step}; {_advice(run)}, or "
                        "TRAIN.ON_NAN skip")


def _advice(run: RunFolder) -> str:
    """Return the last recorded loss, and what to try against one that is not finite."""
    rows = read_table(run / "steps.csv")
    last = f"that of training at iteration {rows[-1]['iteration']} was {rows[-1]['train_loss']}" if rows else \
        "none was recorded before"
    return (f"{last}; the newest checkpoint is from before: try a lower OPTIMIZER.LR, a longer SCHEDULE.WARMUP_EPOCHS, "
            "TRAIN.GRAD_CLIP 1.0, TRAIN.PRECISION float32")
