"""What a run trains: network, optimizer, EMA and progress; one step of it, and its checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paddle
from yacs.config import CfgNode

from datasets.loader import BatchMix, EvalLoader, mix_images, mix_labels
from engine import checkpoint, distributed, runtime
from engine.evaluate import Evaluation, LabelSmoothingCrossEntropy, evaluate
from engine.model import build_model
from engine.optim import ModelEma, build_optimizer
from engine.run import RunFolder
from engine.weights import save_weights
from errors import UserError
from kernels import optimizer as compiled
from utils import pair
from utils.fileio import write_atomically

log = logging.getLogger("suite")

CPU_MICRO_BATCH_PIXELS = 16 * 224 * 224  # 16 images of 224×224 or 784 of 32×32


@dataclass
class TrainingProgress:
    """How far a run is: ``step`` batches into ``epoch`` (both from 0), and what its results need."""

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    seconds: float = 0.0  # of training in this epoch, over all sittings; repeated work counts once
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of RunningMean, in this epoch
    best_epoch: int = 0  # from 1; 0: none evaluated
    best_step: int = 0
    best_accuracy: float = -1.0
    best_loss: float = 0.0  # decides between equal accuracies
    ema_updates: int = 0
    skipped: int = 0  # steps, by TRAIN.ON_NAN
    skipped_in_a_row: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)

    @property
    def epochs_started(self) -> int:
        """Return the number, from 1, of the epoch that the current weights belong to."""
        return self.epoch + (self.step > 0)


class RunningMean:
    """Means over images of loss and accuracy; adding needs no synchronisation with the device, reading does."""

    def __init__(self, sums: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> None:
        self._sums = paddle.to_tensor(sums, dtype="float64")

    def add(self, loss: paddle.Tensor, correct: paddle.Tensor, images: int) -> None:
        """Add a batch: its mean loss, its number of correct images, and its number of images."""
        batch = [loss.astype("float64") * images, correct.astype("float64"), paddle.full([], images, "float64")]
        self._sums = self._sums + paddle.stack(batch)

    def sums(self) -> tuple[float, float, float]:
        """Return (sum of losses, correct images, images)."""
        loss, correct, images = self._sums.tolist()
        return loss, correct, images

    def means(self) -> tuple[float, float]:
        """Return (mean loss, accuracy); NaN before the first batch."""
        loss, correct, images = self.sums()
        return (loss / images, correct / images) if images else (float("nan"), float("nan"))


class Step(NamedTuple):
    """The result of one optimizer step over the whole batch; ``taken`` is False where TRAIN.ON_NAN skipped it."""

    loss: paddle.Tensor
    correct: paddle.Tensor
    images: int
    taken: bool = True


class TrainingState:
    """Everything that training changes, and that a checkpoint therefore holds.

    ``precision`` is TRAIN.PRECISION with ``auto`` resolved, by default for this machine.
    """

    def __init__(self, config: CfgNode, precision: str = "") -> None:
        self.config = config
        self.precision = precision or runtime.choose_precision(config.TRAIN.PRECISION)
        self.model = build_model(config)
        if config.TRAIN.SYNC_BATCH_NORM and distributed.world_size() > 1:
            from engine.sync_batch_norm import convert_sync_batch_norm

            convert_sync_batch_norm(self.model)
        self.loss = LabelSmoothingCrossEntropy(config.LOSS.LABEL_SMOOTHING)
        self.optimizer = build_optimizer(self.model, config.OPTIMIZER, config.TRAIN.GRAD_CLIP)
        self.scaler = paddle.amp.GradScaler(enable=self.precision == "float16")
        self.ema = ModelEma(self.model, config.TRAIN.EMA_DECAY) if config.TRAIN.EMA_DECAY else None
        augment = config.AUGMENT
        self.mix = BatchMix(augment.MIXUP, augment.CUTMIX, augment.MIX_PROB, augment.MIX_SWITCH_PROB)
        self.micro_batches = count_micro_batches(config, paddle.get_device())
        self.progress = TrainingProgress()
        self.means = RunningMean()

    def broadcast(self) -> None:
        """Give all processes the weights of process 0."""
        ema = self.ema.state.values() if self.ema else ()
        distributed.broadcast([*self.model.state_dict().values(), *ema])

    def step(self, images: np.ndarray, labels: np.ndarray, global_step: int, lr: float,
             between: Callable[[], None] = lambda: None) -> Step:
        """Take one optimizer step on this process's shard of a batch, ``[B, 3, H, W]`` and ``[B]``.

        ``between`` is called before each micro-batch. Whatever it raises leaves the state as it was, and so does a
        non-finite loss or gradient where TRAIN.ON_NAN is skip. Each process draws its own dropout and drop path masks.
        No other number depends on how many processes there are.
        """
        config = self.config
        whole = len(labels) if distributed.world_size() == 1 else config.DATA.BATCH_SIZE
        skip = config.TRAIN.ON_NAN == "skip"
        undo = [(tensor, tensor.clone()) for tensor in self._statistics()] if self.micro_batches > 1 or skip else []
        mix = self.mix.draw(config.RUNTIME.SEED, global_step, *images.shape[2:])
        images = mix_images(images, mix)
        targets = labels if mix.ratio == 1.0 else mix_labels(labels, config.MODEL.NUM_CLASSES, mix)
        ranks = [distributed.rank()] if distributed.world_size() > 1 else []
        runtime.seed_everything(config.RUNTIME.SEED, global_step, *ranks)
        self.optimizer.set_lr(lr)
        loss, correct = paddle.zeros([]), paddle.zeros([])
        count = min(self.micro_batches, *distributed.shard_sizes(whole))
        for part in np.array_split(np.arange(len(labels)), count):
            try:
                between()
            except BaseException:
                self._undo(undo)
                raise
            with runtime.autocast(self.precision, config.TRAIN.AMP_LEVEL):
                logits = self.model(paddle.to_tensor(images[part]))
            part_loss = self.loss(logits, paddle.to_tensor(targets[part])) * (len(part) / whole)
            self.scaler.scale(part_loss).backward()
            loss += part_loss.detach()
            correct += (logits.detach().argmax(-1) == paddle.to_tensor(labels[part])).sum().astype("float32")
        self._all_reduce([loss, correct], len(labels) / whole)
        if skip and not self._is_finite(loss):
            self._undo(undo)
            return Step(loss, correct, whole, taken=False)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.clear_grad(set_to_zero=False)
        if self.ema:
            self.ema.update(self.model)
        return Step(loss, correct, whole)

    def evaluate(self, loader: EvalLoader, advance: Callable[[int], None]) -> Evaluation:
        """Evaluate the weights that the run saves: the EMA where there is one."""
        with self.ema.applied_to(self.model) if self.ema else nullcontext():
            return evaluate(self.model, loader, self.loss, advance)

    def save_weights(self, run: RunFolder, kind: str) -> None:
        """Write ``<kind>_model.pdparams`` (the evaluated weights) and ``<kind>_optimizer.pdopt``."""
        save_weights(run / f"{kind}_model.pdparams", self.ema.state if self.ema else self.model.state_dict())
        state = self.optimizer.state_dict()
        write_atomically(run / f"{kind}_optimizer.pdopt", lambda path: paddle.save(state, str(path)))

    def save(self, run: RunFolder) -> Path:
        """Write a checkpoint; raises UserError for weights that are not finite."""
        progress = self.progress
        parts = {"model": checkpoint.model_arrays(self.model),
                 "optimizer": checkpoint.optimizer_arrays(self.optimizer, self.model)}
        if self.ema:
            parts["ema"] = {name: tensor.numpy() for name, tensor in self.ema.state.items()}
            progress.ema_updates = self.ema.updates
        for part, arrays in parts.items():
            for name, array in arrays.items():
                if not np.isfinite(array).all():
                    raise UserError(f"after iteration {progress.global_step} {name} of the {part} is not finite: no "
                                    "checkpoint is written, the newest is from before")
        progress.sums = self.means.sums()
        progress.scaler = {key: value.tolist() if isinstance(value, np.ndarray) else value
                           for key, value in self.scaler.state_dict().items()}
        return checkpoint.save_checkpoint(run.checkpoints, progress.global_step, parts, asdict(progress),
                                          self.config.TRAIN.KEEP_CHECKPOINTS)

    def restore(self, run: RunFolder) -> None:
        """Continue from the newest intact checkpoint, which process 0 reads; from the start where there is none."""
        saved = distributed.on_main_process(lambda: checkpoint.load_newest(run.checkpoints, log.warning))
        saved = distributed.broadcast_checkpoint(saved)
        if saved is None:
            log.warning("%s holds no whole checkpoint: starting from the beginning", run.checkpoints)
            return
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        for part in ("model", "ema") if self.ema else ("model",):
            if {name: array.shape for name, array in saved.parts.get(part, {}).items()} != shapes:
                raise UserError(f"{saved.path}: its {part} is not that of {self.config.MODEL.NAME} as it is built now")
        progress = checkpoint.read_progress(saved, TrainingProgress())
        self.model.set_state_dict(saved.parts["model"])
        checkpoint.restore_optimizer(self.optimizer, self.model, saved.parts.get("optimizer", {}), saved.path)
        if self.ema:
            self.ema.state = {name: paddle.to_tensor(array) for name, array in saved.parts["ema"].items()}
            self.ema.updates = progress.ema_updates
        if progress.scaler:
            self.scaler.load_state_dict({key: np.asarray(value, "float32") if isinstance(value, list) else value
                                         for key, value in progress.scaler.items()})
        self.progress, self.means = progress, RunningMean(progress.sums)
        log.info("resuming from %s: epoch %d, batch %d", saved.path, progress.epoch + 1, progress.step)

    def _all_reduce(self, metrics: list[paddle.Tensor], fraction: float) -> None:
        """Sum gradients and metrics over the processes, and average the batch statistics by images."""
        if distributed.world_size() == 1:
            return
        statistics = self._statistics()
        with paddle.no_grad():
            for tensor in statistics:
                tensor.scale_(fraction)
        distributed.all_reduce_coalesced([*self._gradients(), *statistics, *metrics])

    def _gradients(self) -> list[paddle.Tensor]:
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    @paddle.no_grad()
    def _is_finite(self, loss: paddle.Tensor) -> bool:
        """Return whether loss and gradients are finite; gradients scaled for float16 are left to the scaler."""
        gradients = [] if self.scaler.is_enable() else self._gradients()
        if compiled.available() and compiled.takes(gradients):
            return math.isfinite(float(loss)) and math.isfinite(compiled.sum_squares(gradients))
        return bool(paddle.isfinite(paddle.stack([loss, *(gradient.abs().sum() for gradient in gradients)])).all())

    def _statistics(self) -> list[paddle.Tensor]:
        """Return the running statistics of batch norms, which a forward pass in training mode changes."""
        return [tensor for name, tensor in self.model.state_dict().items() if name.endswith(("_mean", "_variance"))]

    def _undo(self, statistics: list[tuple[paddle.Tensor, paddle.Tensor]]) -> None:
        """Drop the gradients of an abandoned step and restore the batch statistics."""
        self.optimizer.clear_grad(set_to_zero=False)
        for tensor, before in statistics:
            tensor.copy_(before, False)


def count_micro_batches(config: CfgNode, device: str) -> int:
    """Return the micro-batches of a batch: TRAIN.ACCUMULATE, or with 0 as few as fit into memory.

    That is one on a GPU. On a CPU a micro-batch has at most CPU_MICRO_BATCH_PIXELS: iFormer-S needs more than 18 GB for
    128 images of 224×224, 5 GB for 16. Deviation from the recipes, logged: batch norms see one micro-batch.
    """
    if config.TRAIN.ACCUMULATE or device != "cpu":
        return config.TRAIN.ACCUMULATE or 1
    height, width = pair(config.DATA.IMAGE_SIZE)
    images = max(distributed.shard_sizes(config.DATA.BATCH_SIZE))
    count = min(-(-images * height * width // CPU_MICRO_BATCH_PIXELS), images)
    if count > 1:
        log.info("batches of %d images in %d micro-batches of up to %d, for a CPU's memory; batch norms see one "
                 "(TRAIN.ACCUMULATE)", images, count, -(-images // count))
    return count
