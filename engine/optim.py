"""The optimizer of a config, the learning rate schedule, and the EMA of the weights.

Adam, AdamW and Momentum are Paddle's, but on a CPU a step is one compiled call for all parameters. Paddle's operator
for each is a good part of a step for networks with many small tensors. Works with Paddle 2.6 to 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn
from paddle.base.layer_helper import LayerHelper
from paddle.regularizer import L2Decay
from yacs.config import CfgNode

import kernels
from kernels import optimizer as compiled

Tensors = Sequence[paddle.Tensor]
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Newton-Schulz, Muon's authors': of X, (X Xᵀ) X and (X Xᵀ)² X
_ITERATIONS = 5


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
        return AdamW(config.LR, *config.BETAS, **decoupled)
    if config.NAME == "muon":
        return Muon(config.LR, *config.BETAS, matrices=hidden_matrices(model), momentum=config.MOMENTUM, **decoupled)
    for parameter in trainable:  # no parameter groups: Paddle would clip each by its own norm
        parameter.regularizer = L2Decay(decay) if parameter.name in decayed else None
    if config.NAME == "sgd":
        return Momentum(config.LR, config.MOMENTUM, parameters=trainable, grad_clip=clip)
    return Adam(config.LR, *config.BETAS, epsilon=config.EPSILON, parameters=trainable, grad_clip=clip)


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


# Paddle's optimizers in one call --------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """Arguments of the compiled call for a list of parameters; row 0 of ``factors`` scales the learning rate."""

    owners: list[int]  # ids of the parameters
    states: Tensors
    factors: np.ndarray  # float32 [rows, N]


class _InOneCall:
    """Replaces the step of the Paddle optimizer that follows in the MRO by one compiled call, where that applies.

    It applies on a CPU in the ``auto`` mode of ``kernels``, to float32 parameters. Otherwise Paddle's own step is
    taken; each continues from the other's state. With AVX-512 the results equal Paddle's bit by bit, except for the
    global norm, whose squares are summed in float64 here. It supports only the options that ``build_optimizer`` passes;
    ``parameters`` is a list without groups, whose regularizers are ``L2Decay`` or None.
    """

    _kinds: tuple[str, ...]  # of accumulators, in the order of the compiled call
    _plan: _Plan | None = None

    @paddle.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient."""
        parameters, gradients = self._with_gradients() if compiled.available() else ([], [])
        plan = self._plan_for(parameters) if parameters else None
        if plan is None:
            super().step()
            return
        factors = plan.factors.copy()
        factors[0] *= np.float32(self.get_lr())
        clip_norm = self._grad_clip.clip_norm if self._grad_clip else 0.0
        update, *constants = self._compiled_call()
        update(parameters, gradients, plan.states, factors, *constants, clip_norm)

    def _with_gradients(self) -> tuple[Tensors, Tensors]:
        """Return the parameters that have a gradient, and the gradients; nothing where one is not float32."""
        parameters = [parameter for parameter in self._parameter_list
                      if not parameter.stop_gradient and parameter._grad_ivar() is not None]
        gradients = [parameter._grad_ivar() for parameter in parameters]
        if not compiled.takes(gradients):
            gradients = [gradient.contiguous() for gradient in gradients]
        return (parameters, gradients) if compiled.takes(gradients) else ([], [])

    def _plan_for(self, parameters: Tensors) -> _Plan | None:
        owners = list(map(id, parameters))
        if self._plan is None or self._plan.owners != owners:
            if not compiled.takes(parameters):
                return None
            if self.helper is None:  # what Paddle's own step would create first
                self.helper = LayerHelper(type(self).__name__)
            self._create_accumulators(paddle.static.default_main_program().global_block(), parameters)
            states = [self._get_accumulator(kind, parameter) for kind in self._kinds for parameter in parameters]
            if not compiled.takes(states):
                return None
            rates = [parameter.optimize_attr["learning_rate"] for parameter in parameters]
            decays = [parameter.regularizer._coeff if parameter.regularizer else 0.0 for parameter in parameters]
            rows = [rates, decays, *self._more_factors(parameters)]
            self._plan = _Plan(owners, states, np.array(rows, "float32"))
        return self._plan

    def _more_factors(self, parameters: Tensors) -> list[list[float]]:
        """Return rows of factors after learning rate and L2 decay."""
        return []

    def _compiled_call(self) -> tuple:
        """Return the compiled function and the constants between its factors and the norm of the clipping."""
        raise NotImplementedError


class _AdamInOneCall(_InOneCall):
    _kinds = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")

    def _more_factors(self, parameters: Tensors) -> list[list[float]]:
        return [[0.0] * len(parameters)]

    def _compiled_call(self) -> tuple:
        return compiled.adam, (self._beta1, self._beta2), self._epsilon


class Adam(_AdamInOneCall, paddle.optimizer.Adam):
    """``paddle.optimizer.Adam``; weight decay is added to the gradient."""


class AdamW(_AdamInOneCall, paddle.optimizer.AdamW):
    """``paddle.optimizer.AdamW`` with ``apply_decay_param_fun``; weight decay is decoupled."""

    def _more_factors(self, parameters: Tensors) -> list[list[float]]:
        return [[self._weight_decay * self._apply_decay_param_fun(parameter.name) for parameter in parameters]]


class Momentum(_InOneCall, paddle.optimizer.Momentum):
    """``paddle.optimizer.Momentum``; weight decay is added to the gradient."""

    _kinds = ("velocity",)

    def _compiled_call(self) -> tuple:
        return compiled.momentum, self._momentum


# Muon -----------------------------------------------------------------------------------------------------------------


def hidden_matrices(model: nn.Layer) -> list[paddle.Tensor]:
    """Return the trainable weights of fully connected layers and dense convolutions, without the head's.

    The head is the layer named by the network's ``head_name`` (``models.layers.Classifier``), else the last fully
    connected layer.
    """
    layers = [layer for layer in model.sublayers(include_self=True) if isinstance(layer, (nn.Linear, nn.Conv2D))]
    if hasattr(model, "head_name"):
        head = [layer for path, layer in model.named_sublayers() if f"{path}.".startswith(f"{model.head_name}.")]
    else:
        head = [layer for layer in layers if isinstance(layer, nn.Linear)][-1:]
    return [layer.weight for layer in layers
            if all(layer is not part for part in head) and getattr(layer, "_groups", 1) == 1 and layer.weight.trainable]


@paddle.no_grad()
def orthogonalize(matrix: paddle.Tensor) -> paddle.Tensor:
    """Return nearly ``U Vᵀ`` of the matrix's singular value decomposition ``U S Vᵀ``, ``[m, n]`` float32.

    Five Newton-Schulz iterations of Jordan et al. (see :class:`Muon`) with bfloat16 operands on CPUs that multiply
    them. Singular values that are not tiny end between 0.7 and 1.2.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t().contiguous() if tall else matrix
    x = x / ((x * x).sum().sqrt() + 1e-7)  # Paddle's norm takes powers one by one
    with kernels.bfloat16_products():
        for _ in range(_ITERATIONS):
            square = kernels.product(x, x, transpose_b=True)
            x = a * x + kernels.product(b * square + c * kernels.product(square, square), x)
    return x.t().contiguous() if tall else x


class Muon(AdamW):
    """Nesterov's momentum, orthogonalised, for ``matrices``; AdamW for the rest of ``parameters``.

    Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), for the step; filters
    ``[C', C, kh, kw]`` are matrices ``[C', C·kh·kw]``. Liu et al., arXiv 2502.16982, for the scale
    ``0.2 · sqrt(max(m, n))``, which gives the step the root mean square of AdamW's, so that one learning rate and one
    decoupled weight decay serve all parameters. Deviation: ``grad_clip`` bounds the norm of all gradients together.
    Other arguments are AdamW's.
    """

    def __init__(self, *others: float, parameters: list[paddle.Tensor], matrices: list[paddle.Tensor],
                 momentum: float, **options: object) -> None:
        super().__init__(*others, parameters=parameters, **options)
        self._momentum, self._matrices = momentum, matrices
        taken = set(map(id, matrices))
        self._others = [parameter for parameter in parameters if id(parameter) not in taken]

    @paddle.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient; none where Paddle's loss scaler found one that is not finite."""
        if self._get_auxiliary_var("found_inf"):
            return
        if self._grad_clip:
            pairs = [(parameter, parameter.grad) for parameter in self._parameter_list if parameter.grad is not None]
            for (_, gradient), (_, clipped) in zip(pairs, self._grad_clip(pairs), strict=True):
                gradient.copy_(clipped, False)
        everything, self._parameter_list = self._parameter_list, self._others
        try:
            super().step()
        finally:
            self._parameter_list = everything
        for matrix in self._matrices:
            if matrix.grad is not None:
                self._update_matrix(matrix, matrix.grad)

    def _update_matrix(self, matrix: paddle.Tensor, gradient: paddle.Tensor) -> None:
        if matrix.name not in self._accumulators["momentum"]:
            self._add_accumulator("momentum", matrix)
        velocity = self._get_accumulator("momentum", matrix)
        velocity.scale_(self._momentum).add_(gradient)
        rows = matrix.shape[0]
        update = orthogonalize((gradient + self._momentum * velocity).reshape([rows, -1]))
        rate = self.get_lr()
        matrix.scale_(1.0 - rate * self._weight_decay * self._apply_decay_param_fun(matrix.name))
        matrix.subtract_((0.2 * math.sqrt(max(update.shape)) * rate * update).reshape(matrix.shape))
