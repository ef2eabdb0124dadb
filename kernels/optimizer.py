"""One step over a list of tensors as one compiled call: ``optimizer.cc``.

The tensors are those that :func:`takes` accepts. They are changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle

from kernels.dispatch import compiled, run


def available() -> bool:
    """Return whether there are compiled steps at all: on the CPU, in ``auto`` mode, with a compiler."""
    return paddle.get_device().startswith("cpu") and compiled()


def takes(tensors: Sequence[paddle.Tensor]) -> bool:
    """Return whether the compiled steps take these tensors, on top of :func:`available`."""
    taken = (paddle.float32,)  # `in` compares identities first, which takes a fifth of the time of ==
    return all(
        tensor.is_dense() and tensor.is_contiguous() and tensor.dtype in taken and tensor.place.is_cpu_place()
        for tensor in tensors
    )


def adam(
    parameters: list[paddle.Tensor], gradients: list[paddle.Tensor], states: list[paddle.Tensor],
    factors: np.ndarray, betas: tuple[float, float], epsilon: float, clip_norm: float,
) -> None:
    """Take a step of ``paddle.optimizer.Adam`` or ``AdamW``.

    Args:
        parameters: N tensors.
        gradients: theirs.
        states: first moments, second moments, and powers of both betas, 4 N tensors.
        factors: learning rates, decay as L2 in the gradient and decay of the parameter itself, float32 ``[3, N]``.
        betas: decay of the two moments.
        epsilon: is added to the root of the second moment, before its bias is corrected.
        clip_norm: bound of the norm of all gradients; 0 for none.
    """
    count = len(parameters)
    groups = [states[start : start + count] for start in range(0, 4 * count, count)]
    run("adam", parameters, gradients, *groups, factors.ravel().tolist(), *betas, epsilon, clip_norm)


def momentum(
    parameters: list[paddle.Tensor], gradients: list[paddle.Tensor], states: list[paddle.Tensor],
    factors: np.ndarray, decay: float, clip_norm: float,
) -> None:
    """Take a step of ``paddle.optimizer.Momentum``.

    Args:
        parameters: N tensors.
        gradients: theirs.
        states: their velocities.
        factors: learning rates, and decay as L2 in the gradient, float32 ``[2, N]``.
        decay: weight of the old velocity.
        clip_norm: bound of the norm of all gradients; 0 for none.
    """
    run("momentum", parameters, gradients, states, factors.ravel().tolist(), decay, clip_norm)


def average(averages: list[paddle.Tensor], tensors: list[paddle.Tensor], factors: np.ndarray) -> None:
    """Set N averages to themselves and N tensors, by float32 factors ``[2, N]``; 0 and 1 copy a tensor."""
    run("average", averages, tensors, factors.ravel().tolist())


def sum_squares(tensors: list[paddle.Tensor]) -> float:
    """Return the sum of the squares of all numbers of N tensors, formed in float64."""
    return float(run("sum_squares", tensors))
