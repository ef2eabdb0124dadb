"""Build the optimizer of a config, the learning rate schedule, and the EMA of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import paddle
from paddle import nn
from paddle.regularizer import L2Decay
from yacs.config import CfgNode

from engine import optimizers
from engine.muon import Muon, hidden_matrices
from kernels import optimizer as compiled


def build_optimizer(model: nn.Layer, config: CfgNode, grad_clip: float = 0.0) -> paddle.optimizer.Optimizer:
    """Return the optimizer of an OPTIMIZER section over the trainable parameters of ``model``.

    ``adam`` and ``sgd`` add weight decay to the gradient (L2, as Paddle's float ``weight_decay``); it is decoupled in
    ``adamw`` and ``muon``, which is AdamW for all but the hidden matrices.
    """
    clip = nn.ClipGradByGlobalNorm(grad_clip) if grad_clip else None
    trainable = [parameter for parameter in model.parameters() if parameter.trainable]
    decay = config.WEIGHT_DECAY
    decayed = {p.name for p in trainable if config.DECAY_ALL or p.ndim > 1}
    decoupled = {"epsilon": config.EPSILON, "parameters": trainable, "grad_clip": clip, "weight_decay": decay,
                 "apply_decay_param_fun": decayed.__contains__}
    if config.NAME == "adamw":
        return optimizers.AdamW(config.LR, *config.BETAS, **decoupled)
    if config.NAME == "muon":
        return Muon(config.LR, *config.BETAS, matrices=hidden_matrices(model), momentum=config.MOMENTUM, **decoupled)
    for parameter in trainable:  # no parameter groups: Paddle would clip each by its own norm
        parameter.regularizer = L2Decay(decay) if parameter.name in decayed else None
    if config.NAME == "sgd":
        return optimizers.Momentum(config.LR, config.MOMENTUM, parameters=trainable, grad_clip=clip)
    return optimizers.Adam(config.LR, *config.BETAS, epsilon=config.EPSILON, parameters=trainable, grad_clip=clip)


def learning_rate(step: int, steps_per_epoch: int, epochs: int, peak: float, schedule: CfgNode) -> float:
    """Return the learning rate of a global step (from 0), a pure function of its arguments.

    A linear warm-up, then the schedule over the remaining steps. ``cosine`` without warm-up is Paddle's
    ``CosineAnnealingDecay(peak, T_max=epochs · steps_per_epoch, eta_min=MIN_LR)`` stepped at every step.
    """
    warmup = round(schedule.WARMUP_EPOCHS * steps_per_epoch)
    if step < warmup:
        return schedule.WARMUP_LR + (peak - schedule.WARMUP_LR) * step / warmup
    done = min((step - warmup) / max(epochs * steps_per_epoch - warmup, 1), 1.0)
    if schedule.NAME == "cosine":
        return schedule.MIN_LR + (peak - schedule.MIN_LR) * 0.5 * (1.0 + math.cos(math.pi * done))
    if schedule.NAME == "piecewise_linear":
        return peak * float(np.interp(done, *zip(*schedule.POINTS, strict=True)))
    return peak


class ModelEma:
    """Exponential moving average (EMA) of a model's parameters; batch statistics are copied.

    ``ema = d · ema + (1 - d) · weight`` after each step, with ``d = min(decay, (1 + n) / (10 + n))`` at update n, so
    that the first updates forget the initialisation.
    """

    def __init__(self, model: nn.Layer, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @paddle.no_grad()
    def update(self, model: nn.Layer) -> None:
        """Take one step towards the model's weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        tensors = model.state_dict()
        averages = [self.state[name] for name in tensors]
        if compiled.available() and compiled.takes([*averages, *tensors.values()]):
            factors = [(0.0, 1.0) if tensor.stop_gradient else (decay, 1.0 - decay) for tensor in tensors.values()]
            compiled.average(averages, list(tensors.values()), np.array(factors, "float32").T.copy())
            return
        for average, tensor in zip(averages, tensors.values(), strict=True):
            if tensor.stop_gradient:
                average.copy_(tensor, False)
            else:
                average.scale_(decay).add_(tensor * (1.0 - decay))

    @contextmanager
    def applied_to(self, model: nn.Layer) -> Iterator[None]:
        """Replace the model's weights by their EMA for the length of a ``with`` block."""
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.set_state_dict(self.state)
        try:
            yield
        finally:
            model.set_state_dict(own)
