"""Paddle's Adam, AdamW and Momentum with a step that is one compiled call for all parameters on a CPU.

Paddle calls one operator per parameter, a good part of a step for networks with many small tensors. Everything else is
Paddle's: accumulators and their names, the state, the learning rate, clearing gradients. Works with Paddle 2.6 to 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn
from paddle.base.layer_helper import LayerHelper
from paddle.regularizer import L2Decay

from kernels import optimizer as compiled

Tensors = Sequence[paddle.Tensor]


@dataclass
class _Plan:
    """Arguments of the compiled call for a list of parameters; row 0 of ``factors`` scales the learning rate."""

    owners: list[int]
    states: Tensors
    factors: np.ndarray  # float32 [rows, N]


class _InOneCall:
    """Replaces the step of the Paddle optimizer that follows in the MRO by one compiled call, where that applies.

    It applies on a CPU in the ``auto`` mode of ``kernels``, to a flat list of float32 parameters (no groups) with
    dense gradients and no clipping but by the global norm. Otherwise Paddle's own step is taken; each continues from
    the other's state. With AVX-512 the results equal Paddle's bit by bit, except for the global norm, whose squares
    are summed in float64 here.
    """

    _kinds: tuple[str, ...]  # of accumulators, in the order of the compiled call
    _plan: _Plan | None = None

    @paddle.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient."""
        parameters, gradients = self._with_gradients() if self._applies() else ([], [])
        plan = self._plan_for(parameters) if parameters else None
        if plan is None:
            super().step()
            return
        factors = plan.factors.copy()
        factors[0] *= np.float32(self.get_lr())
        self._update(parameters, gradients, plan.states, factors, self._grad_clip.clip_norm if self._grad_clip else 0.0)

    def _applies(self) -> bool:
        clip = self._grad_clip
        return (
            compiled.available()
            and not isinstance(self._parameter_list[0], dict)
            and (clip is None or (type(clip) is nn.ClipGradByGlobalNorm and not clip.auto_skip_clip))
            and self._get_auxiliary_var("found_inf") is None  # set by Paddle's loss scaler
            and not self._use_multi_tensor
        )

    def _with_gradients(self) -> tuple[Tensors, Tensors]:
        """Return the parameters that have a gradient, and the gradients; nothing where one is not supported."""
        parameters = [parameter for parameter in self._parameter_list
                      if not parameter.stop_gradient and parameter._grad_ivar() is not None]
        gradients = [parameter._grad_ivar() for parameter in parameters]
        if not compiled.takes(gradients) and not any(gradient.is_selected_rows() for gradient in gradients):
            gradients = [gradient.contiguous() for gradient in gradients]
        return (parameters, gradients) if compiled.takes(gradients) else ([], [])

    def _plan_for(self, parameters: Tensors) -> _Plan | None:
        owners = list(map(id, parameters))
        if self._plan is None or self._plan.owners != owners:
            decays = [self._l2(parameter) for parameter in parameters]
            clipped = all(getattr(parameter, "need_clip", True) for parameter in parameters)
            if None in decays or not compiled.takes(parameters) or (self._grad_clip and not clipped):
                return None
            if self.helper is None:  # what Paddle's own step would create first
                self.helper = LayerHelper(type(self).__name__)
            self._create_accumulators(paddle.static.default_main_program().global_block(), parameters)
            states = [self._get_accumulator(kind, parameter) for kind in self._kinds for parameter in parameters]
            if not compiled.takes(states):
                return None
            rates = [parameter.optimize_attr["learning_rate"] for parameter in parameters]
            rows = [rates, decays, *self._more_factors(parameters)]
            self._plan = _Plan(owners, states, np.array(rows, "float32"))
        return self._plan

    def _l2(self, parameter: paddle.Tensor) -> float | None:
        """Return the factor of the parameter that is added to its gradient; None for another kind of decay."""
        decay = parameter.regularizer or self.regularization
        return 0.0 if decay is None else decay._coeff if type(decay) is L2Decay else None

    def _more_factors(self, parameters: Tensors) -> list[list[float]]:
        return []

    def _update(self, parameters: Tensors, gradients: Tensors, states: Tensors,
                factors: np.ndarray, clip_norm: float) -> None:
        raise NotImplementedError


class _AdamInOneCall(_InOneCall):
    _kinds = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")

    def _applies(self) -> bool:
        return super()._applies() and not getattr(self, "_amsgrad", False) and all(
            isinstance(number, float) for number in (self._beta1, self._beta2, self._epsilon))

    def _more_factors(self, parameters: Tensors) -> list[list[float]]:
        return [[0.0] * len(parameters)]

    def _update(self, parameters: Tensors, gradients: Tensors, states: Tensors,
                factors: np.ndarray, clip_norm: float) -> None:
        compiled.adam(parameters, gradients, states, factors, (self._beta1, self._beta2), self._epsilon, clip_norm)


class Adam(_AdamInOneCall, paddle.optimizer.Adam):
    """``paddle.optimizer.Adam``; weight decay is added to the gradient."""


class AdamW(_AdamInOneCall, paddle.optimizer.AdamW):
    """``paddle.optimizer.AdamW``; weight decay is decoupled from the gradient."""

    def _more_factors(self, parameters: Tensors) -> list[list[float]]:
        decays = self._apply_decay_param_fun or (lambda name: True)
        return [[self._weight_decay * bool(decays(parameter.name)) for parameter in parameters]]


class Momentum(_InOneCall, paddle.optimizer.Momentum):
    """``paddle.optimizer.Momentum``; weight decay is added to the gradient."""

    _kinds = ("velocity",)

    def _applies(self) -> bool:
        return super()._applies() and not self._use_nesterov and self._rescale_grad == 1.0

    def _l2(self, parameter: paddle.Tensor) -> float | None:
        own = super()._l2(parameter)
        return self._regularization_coeff if parameter.regularizer is None and own == 0 else own

    def _update(self, parameters: Tensors, gradients: Tensors, states: Tensors,
                factors: np.ndarray, clip_norm: float) -> None:
        compiled.momentum(parameters, gradients, states, factors, self._momentum, clip_norm)
