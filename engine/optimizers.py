"""Paddle's optimizers with a step that is one compiled call for all parameters on a CPU.

Paddle calls an operator for each parameter, where networks with many small tensors spend a good part of their step.
Everything but the step is Paddle's: accumulators and their names, the state, the learning rate, clearing gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn
from paddle.regularizer import L2Decay

from kernels import optimizer as compiled


@dataclass
class _Plan:
    """What the compiled call takes for a list of parameters: their accumulators, and float32 factors ``[rows, N]``.

    The first row of the factors is the parameter's own factor of the learning rate.
    """

    owners: list[int]
    states: list[paddle.Tensor]
    factors: np.ndarray


class _InOneCall:
    """Takes the step of the Paddle optimizer behind this class as one compiled call, where that applies.

    It applies on the CPU in the ``auto`` mode of ``kernels``, to a flat list of float32 parameters (no groups) with
    dense gradients, clipped by their global norm or not at all. Otherwise Paddle's own step is taken; each goes on
    from the other's state. Where the processor has AVX-512 the results are equal to Paddle's bit by bit, but for the
    global norm: its squares are summed in float64 here.
    """

    _kinds: tuple[str, ...]  # of accumulators, in the order that the compiled call takes them
    _plan: _Plan | None = None

    @paddle.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient, as Paddle's own step does."""
        parameters, gradients = self._with_gradients() if self._applies() else ([], [])
        plan = self._plan_for(parameters) if parameters else None
        if plan is None:
            super().step()
            return
        factors = plan.factors.copy()
        factors[0] *= np.float32(self.get_lr())
        self._update(parameters, gradients, plan.states, factors, self._grad_clip.clip_norm if self._grad_clip else 0.0)

    def _applies(self) -> bool:
        """Tell whether the options of this optimizer and the place of this run are those of the compiled call."""
        clip = self._grad_clip
        return (
            compiled.available()
            and not isinstance(self._parameter_list[0], dict)
            and (clip is None or (type(clip) is nn.ClipGradByGlobalNorm and not clip.auto_skip_clip))
            and self._get_auxiliary_var("found_inf") is None  # of Paddle's loss scaler
            and not self._use_multi_tensor
        )

    def _with_gradients(self) -> tuple[list[paddle.Tensor], list[paddle.Tensor]]:
        """Return the parameters that have a gradient, and the gradients; nothing where one of them is not taken."""
        parameters = [parameter for parameter in self._parameter_list
                      if not parameter.stop_gradient and parameter._grad_ivar() is not None]
        gradients = [parameter._grad_ivar() for parameter in parameters]
        if compiled.takes(gradients):
            return parameters, gradients
        if any(gradient.is_selected_rows() for gradient in gradients):
            return [], []
        gradients = [gradient.contiguous() for gradient in gradients]
        return (parameters, gradients) if compiled.takes(gradients) else ([], [])

    def _plan_for(self, parameters: list[paddle.Tensor]) -> _Plan | None:
        owners = list(map(id, parameters))
        if self._plan is None or self._plan.owners != owners:
            decays = [self._l2(parameter) for parameter in parameters]
            clipped = all(getattr(parameter, "need_clip", True) for parameter in parameters)
            if None in decays or not compiled.takes(parameters) or (self._grad_clip and not clipped):
                return None
            self._create_accumulators(paddle.static.default_main_program().global_block(), parameters)
            states = [self._get_accumulator(kind, parameter) for kind in self._kinds for parameter in parameters]
            if not compiled.takes(states):
                return None
            rates = [parameter.optimize_attr["learning_rate"] for parameter in parameters]
            rows = [rates, decays, *self._more_factors(parameters)]
            self._plan = _Plan(owners, states, np.array(rows, "float32"))
        return self._plan

    def _l2(self, parameter: paddle.Tensor) -> float | None:
        """Return how much of a parameter is added to its gradient; None for another kind of decay."""
        decay = parameter.regularizer or self.regularization
        return 0.0 if decay is None else decay._coeff if type(decay) is L2Decay else None

    def _more_factors(self, parameters: list[paddle.Tensor]) -> list[list[float]]:
        return []

    def _update(self, parameters: list[paddle.Tensor], gradients: list[paddle.Tensor], states: list[paddle.Tensor],
                factors: np.ndarray, clip_norm: float) -> None:
        raise NotImplementedError


class _AdamInOneCall(_InOneCall):
    _kinds = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")

    def _applies(self) -> bool:
        return super()._applies() and not self._amsgrad and all(
            isinstance(number, float) for number in (self._beta1, self._beta2, self._epsilon))

    def _more_factors(self, parameters: list[paddle.Tensor]) -> list[list[float]]:
        return [[0.0] * len(parameters)]

    def _update(self, parameters: list[paddle.Tensor], gradients: list[paddle.Tensor], states: list[paddle.Tensor],
                factors: np.ndarray, clip_norm: float) -> None:
        compiled.adam(parameters, gradients, states, factors, (self._beta1, self._beta2), self._epsilon, clip_norm)


class Adam(_AdamInOneCall, paddle.optimizer.Adam):
    """``paddle.optimizer.Adam``; weight decay is added to the gradient."""


class AdamW(_AdamInOneCall, paddle.optimizer.AdamW):
    """``paddle.optimizer.AdamW``; weight decay is decoupled from the gradient."""

    def _more_factors(self, parameters: list[paddle.Tensor]) -> list[list[float]]:
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

    def _update(self, parameters: list[paddle.Tensor], gradients: list[paddle.Tensor], states: list[paddle.Tensor],
                factors: np.ndarray, clip_norm: float) -> None:
        compiled.momentum(parameters, gradients, states, factors, self._momentum, clip_norm)
