"""One step over a list of tensors as one compiled call: Adam, momentum, moving averages, sums of squares.

The tensors are float32, contiguous and on the CPU; who calls these functions has asked :func:`takes` before, and
keeps the tensors alive. Addresses are read at every call, as gradients move from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle

from kernels import mode
from kernels.dispatch import run, usable
from kernels.tensors import numel


def available() -> bool:
    """Tell whether the compiled steps may be taken at all: on the CPU, in ``auto`` mode, with a compiler."""
    return mode() == "auto" and usable()


def takes(tensors: Sequence[paddle.Tensor]) -> bool:
    """Tell whether the compiled steps take these tensors, on top of :func:`available`."""
    taken = (paddle.float32,)  # `in` asks whether they are the same before it compares, which takes five times as long
    return all(
        tensor.is_dense() and tensor.is_contiguous() and tensor.dtype in taken and tensor.place.is_cpu_place()
        for tensor in tensors
    )


def adam(
    parameters: Sequence[paddle.Tensor], gradients: Sequence[paddle.Tensor], states: Sequence[paddle.Tensor],
    factors: np.ndarray, betas: tuple[float, float], epsilon: float, clip: float,
) -> None:
    """Take a step of ``paddle.optimizer.Adam`` or ``AdamW`` in place.

    Args:
        parameters: N tensors.
        gradients: theirs.
        states: their first moments, second moments, and powers of both betas, 4 N tensors.
        factors: learning rates, decay as L2 in the gradient and decay of the parameter itself, float32 ``[3, N]``.
        betas: decay of the two moments.
        epsilon: what is added to the root of the second moment, before its bias is corrected.
        clip: factor of all gradients.
    """
    _step("adam_step", [*parameters, *gradients, *states], factors, *betas, epsilon, clip)


def momentum(
    parameters: Sequence[paddle.Tensor], gradients: Sequence[paddle.Tensor], states: Sequence[paddle.Tensor],
    factors: np.ndarray, decay: float, clip: float,
) -> None:
    """Take a step of ``paddle.optimizer.Momentum`` in place.

    Args:
        parameters: N tensors.
        gradients: theirs.
        states: their velocities.
        factors: learning rates, and decay as L2 in the gradient, float32 ``[2, N]``.
        decay: what is kept of the velocity.
        clip: factor of all gradients.
    """
    _step("momentum_step", [*parameters, *gradients, *states], factors, decay, clip)


def average(averages: Sequence[paddle.Tensor], tensors: Sequence[paddle.Tensor], factors: np.ndarray) -> None:
    """Set N averages to themselves and N tensors, by float32 factors ``[2, N]``; 0 and 1 copy a tensor."""
    _step("average_step", [*averages, *tensors], factors)


def sum_squares(tensors: Sequence[paddle.Tensor]) -> float:
    """Return the sum of the squares of all numbers of N tensors, formed in float64."""
    total = np.zeros(1)
    _step("sum_squares", tensors, total)
    return float(total[0])


def _step(name: str, tensors: Sequence[paddle.Tensor], numbers: np.ndarray, *scalars: float) -> None:
    """Call an operator on N sizes, the addresses of one or several times N tensors, and numbers."""
    count = numbers.shape[-1] if numbers.ndim > 1 else len(tensors)
    sizes = np.array([numel(tensor) for tensor in tensors[:count]], "int64")
    addresses = np.array([tensor.data_ptr() for tensor in tensors], "int64")
    run(name, count, sizes.ctypes.data, addresses.ctypes.data, numbers.ctypes.data, *scalars)
