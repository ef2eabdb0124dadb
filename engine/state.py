"""What a run trains, one step of it, and all of it to a checkpoint and back."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import paddle
from yacs.config import CfgNode

from datasets.loader import EvalLoader
from datasets.mix import BatchMix, mix_images, mix_labels
from engine import checkpoint, distributed, runtime
from engine.evaluate import Evaluation, evaluate
from engine.losses import LabelSmoothingCrossEntropy
from engine.model import build_model
from engine.optim import WeightAverage, build_optimizer
from engine.run import RunFolder
from engine.sync_batch_norm import convert_sync_batch_norm
from engine.weights.load import save_weights
from errors import UserError
from kernels import optimizer as compiled
from utils.fileio import write_atomically

if TYPE_CHECKING:  # which loads networks as this module builds them
    from engine.teachers import Teachers

log = logging.getLogger("suite")

CPU_PART_PIXELS = 16 * 224 * 224  # 16 images of 224×224; a batch of 784 at 32×32

def parts_of_batch(config: CfgNode, device: str) -> int:
    """Return the parts that a batch is split into: TRAIN.ACCUMULATE, or where that is 0 as few as fit.

    On a GPU that is one, as the recipes have it. On a CPU a part has at most CPU_PART_PIXELS: a whole batch of 128
    images of 224×224 takes iFormer-S more than 18 GB, parts of 16 images 5 GB. Batch norms then see one part: a
    deviation from the recipe, which the log tells.
    """
    if config.TRAIN.ACCUMULATE or device != "cpu":
        return config.TRAIN.ACCUMULATE or 1
    size = config.DATA.IMAGE_SIZE
    pixels = size[0] * size[1] if isinstance(size, list) else size * size
    images = max(distributed.shard_sizes(config.DATA.BATCH_SIZE))
    parts = min(-(-images * pixels // CPU_PART_PIXELS), images)
    if parts > 1:
        log.info("batches of %d images in %d parts of up to %d, for a CPU's memory; batch norms see one part "
                 "(TRAIN.ACCUMULATE)", images, parts, -(-images // parts))
    return parts


@dataclass
class Position:
    """Where a run stands: ``step`` batches into ``epoch`` (both from 0), and what it remembers from before."""

    epoch: int = 0
    step: int = 0
    iteration: int = 0
    seconds: float = 0.0  # of training in the epoch so far, over all sittings; what is lost and done again counts once
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of RunningMean, over the epoch so far
    best_epoch: int = 0
    best_iteration: int = 0
    best_accuracy: float = -1.0
    best_loss: float = 0.0  # decides between equal accuracies
    average_updates: int = 0
    skipped: int = 0  # steps, as TRAIN.ON_NAN has it
    skipped_in_a_row: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)


class Step(NamedTuple):
    """What one optimizer step found, over the whole batch; ``taken`` is False where TRAIN.ON_NAN skipped it."""

    loss: paddle.Tensor
    correct: paddle.Tensor
    images: int
    taken: bool = True


class TrainingState:
    """A network with its loss, optimizer, loss scaler and moving average, and the teachers that it may have."""

    def __init__(self, config: CfgNode, teachers: Teachers | None = None) -> None:
        self.config = config
        self.teachers = teachers
        self.model = build_model(config)
        if config.TRAIN.SYNC_BATCH_NORM and distributed.world_size() > 1:
            convert_sync_batch_norm(self.model)
        self.loss = LabelSmoothingCrossEntropy(config.LOSS.LABEL_SMOOTHING)
        self.optimizer = build_optimizer(self.model, config.OPTIMIZER, config.TRAIN.GRAD_CLIP)
        self.scaler = paddle.amp.GradScaler(enable=config.TRAIN.PRECISION == "float16")
        self.average = WeightAverage(self.model, config.TRAIN.EMA_DECAY) if config.TRAIN.EMA_DECAY else None
        augment = config.AUGMENT
        self.mix = BatchMix(augment.MIXUP, augment.CUTMIX, augment.MIX_PROB, augment.MIX_SWITCH_PROB)
        self.parts = parts_of_batch(config, paddle.get_device())

    def share(self) -> None:
        """Let all processes start from the weights of process 0."""
        average = self.average.state.values() if self.average else ()
        distributed.broadcast([*self.model.state_dict().values(), *average])

    def step(self, images: np.ndarray, labels: np.ndarray, iteration: int, lr: float,
             between_parts: Callable[[], None] = lambda: None) -> Step:
        """Take one optimizer step from this process's share of a batch.

        What ``between_parts`` raises leaves the state as it was before the step; so does a loss or gradient that is
        no number where TRAIN.ON_NAN is skip. Masks of dropout and drop path are drawn by each process for its own
        images: those are the only numbers that depend on how many processes there are.
        """
        config = self.config
        whole = len(labels) if distributed.world_size() == 1 else config.DATA.BATCH_SIZE
        skip = config.TRAIN.ON_NAN == "skip"
        before = [(tensor, tensor.clone()) for tensor in self._statistics()] if self.parts > 1 or skip else []
        mix = self.mix.draw(config.RUNTIME.SEED, iteration, *images.shape[2:])
        images = mix_images(images, mix)
        targets = labels if mix.ratio == 1.0 else mix_labels(labels, config.MODEL.NUM_CLASSES, mix)
        runtime.seed_everything(config.RUNTIME.SEED, iteration, *[distributed.rank()] * (distributed.world_size() > 1))
        self.optimizer.set_lr(lr)
        loss, correct = paddle.zeros([]), paddle.zeros([])
        for part in np.array_split(np.arange(len(labels)), min(self.parts, *distributed.shard_sizes(whole))):
            try:
                between_parts()
            except BaseException:
                self._undo(before)
                raise
            batch = paddle.to_tensor(images[part])
            with runtime.autocast(config.TRAIN.PRECISION, config.TRAIN.AMP_LEVEL):
                output = self.model(batch)
                taught = self.teachers.probabilities(batch) if self.teachers else None
            share = self.loss(output, paddle.to_tensor(targets[part]))
            if taught is not None:
                share = self.teachers.loss(output, taught, share)
            share = share * (len(part) / whole)
            self.scaler.scale(share).backward()
            loss += share.detach()
            correct += (output.detach().argmax(-1) == paddle.to_tensor(labels[part])).sum().astype("float32")
        self._unite([loss, correct], len(labels) / whole)
        if skip and not self._is_finite(loss):
            self._undo(before)
            return Step(loss, correct, whole, taken=False)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.clear_grad(set_to_zero=False)
        if self.average:
            self.average.update(self.model)
        return Step(loss, correct, whole)

    def _unite(self, figures: list[paddle.Tensor], share: float) -> None:
        """Add up gradients and figures of all processes, and take the mean of their batch statistics."""
        if distributed.world_size() == 1:
            return
        statistics = self._statistics()
        with paddle.no_grad():
            for tensor in statistics:
                tensor.scale_(share)
        distributed.all_reduce_coalesced([*self._gradients(), *statistics, *figures])

    def _gradients(self) -> list[paddle.Tensor]:
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    @paddle.no_grad()
    def _is_finite(self, loss: paddle.Tensor) -> bool:
        """Tell whether the step may be taken. Of gradients that were scaled for float16, the scaler judges."""
        gradients = [] if self.scaler.is_enable() else self._gradients()
        if compiled.available() and compiled.takes(gradients):
            return math.isfinite(float(loss)) and math.isfinite(compiled.sum_squares(gradients))
        return bool(paddle.isfinite(paddle.stack([loss, *(gradient.abs().sum() for gradient in gradients)])).all())

    def _statistics(self) -> list[paddle.Tensor]:
        """Return what a forward pass in training mode changes: the running statistics of batch norms."""
        return [tensor for name, tensor in self.model.state_dict().items() if name.endswith(("_mean", "_variance"))]

    def _undo(self, statistics: list[tuple[paddle.Tensor, paddle.Tensor]]) -> None:
        """Forget the gradients of a step that is given up, and what its parts did to the batch statistics."""
        self.optimizer.clear_grad(set_to_zero=False)
        for tensor, before in statistics:
            tensor.copy_(before, False)

    def evaluate(self, loader: EvalLoader, advance: Callable[[int], None]) -> Evaluation:
        """Evaluate the weights that the run saves: their moving average where there is one."""
        arguments = (self.model, loader, self.loss, advance)
        if not self.average:
            return evaluate(*arguments)
        with self.average.applied_to(self.model):
            return evaluate(*arguments)

    def save_weights(self, run: RunFolder, kind: str) -> None:
        """Write ``<kind>_model.pdparams`` (the evaluated weights) and ``<kind>_optimizer.pdopt``."""
        save_weights(run / f"{kind}_model.pdparams", self.average.state if self.average else self.model.state_dict())
        state = self.optimizer.state_dict()
        write_atomically(run / f"{kind}_optimizer.pdopt", lambda path: paddle.save(state, str(path)))

    def save(self, run: RunFolder, position: Position) -> Path:
        """Write the checkpoint of ``position``; raises UserError for weights that are no numbers."""
        parts = {"model": checkpoint.model_arrays(self.model),
                 "optimizer": checkpoint.optimizer_arrays(self.optimizer, self.model)}
        if self.average:
            parts["average"] = {name: tensor.numpy() for name, tensor in self.average.state.items()}
            position.average_updates = self.average.updates
        for part, arrays in parts.items():
            for name, array in arrays.items():
                if not np.isfinite(array).all():
                    raise UserError(f"iteration {position.iteration} left a {part} whose {name} is no number: no "
                                    "checkpoint is written, the newest is from before")
        position.scaler = {key: value.tolist() if isinstance(value, np.ndarray) else value
                           for key, value in self.scaler.state_dict().items()}
        return checkpoint.save_checkpoint(run.checkpoints, position.iteration, parts, asdict(position),
                                          self.config.TRAIN.KEEP_CHECKPOINTS)

    def restore(self, run: RunFolder) -> Position:
        """Continue from the newest whole checkpoint of a run, which process 0 reads; from the start without one."""
        saved = distributed.on_main_process(lambda: checkpoint.load_newest(run.checkpoints, log.warning))
        saved = distributed.broadcast_checkpoint(saved)
        if saved is None:
            log.warning("%s holds no whole checkpoint: starting from the beginning", run.checkpoints)
            return Position()
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        for part in ("model", "average") if self.average else ("model",):
            if {name: array.shape for name, array in saved.parts.get(part, {}).items()} != shapes:
                raise UserError(f"{saved.path}: its {part} is not that of {self.config.MODEL.NAME} as it is built now")
        self.model.set_state_dict(saved.parts["model"])
        checkpoint.restore_optimizer(self.optimizer, self.model, saved.parts.get("optimizer", {}), saved.path)
        position = checkpoint.read_position(saved, Position())
        if self.average:
            self.average.state = {name: paddle.to_tensor(array) for name, array in saved.parts["average"].items()}
            self.average.updates = position.average_updates
        if position.scaler:
            self.scaler.load_state_dict({key: np.asarray(value, "float32") if isinstance(value, list) else value
                                         for key, value in position.scaler.items()})
        log.info("resuming from %s: epoch %d, batch %d", saved.path, position.epoch + 1, position.step)
        return position
