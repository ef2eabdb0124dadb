"""Operators over channels-first maps, ``[B, C, H, W]``, each with Paddle's own behind it; ``kernels`` exports them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import kernels

if TYPE_CHECKING:
    import paddle


def batch_norm(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor,
    mean: paddle.Tensor,
    variance: paddle.Tensor,
    training: bool = False,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
) -> paddle.Tensor:
    """Normalise every channel as ``paddle.nn.functional.batch_norm``.

    Args:
        x: ``[B, C, H, W]``.
        weight: ``[C]``.
        bias: ``[C]``.
        mean: running means, ``[C]``; in training they are brought up to date.
        variance: running variances (biased, as Paddle's are), ``[C]``.
        training: whether the batch's own moments are taken.
        momentum: share of the running moments that stays.
        epsilon: added to variances.

    Returns:
        ``[B, C, H, W]``.
    """
    if kernels.mode() == "auto":
        from kernels.planes import normalise

        y = normalise(x, weight, bias, mean, variance, training, momentum, epsilon)
        if y is not None:
            return y
    from paddle.nn.functional import batch_norm as stock

    return stock(x, mean, variance, weight, bias, training, momentum, epsilon)


def dynamic_relu(x: paddle.Tensor, first: paddle.Tensor, second: paddle.Tensor) -> paddle.Tensor:
    """Return max(first · x, second · x): ``[B, C, H, W]`` with slopes ``[B, C]`` and ``[B, C]``."""
    if kernels.mode() == "auto":
        from kernels.planes import steepest

        y = steepest(x, first, second)
        if y is not None:
            return y
    from paddle.nn.functional import relu

    lower = x * second.unsqueeze([2, 3])
    # The backward pass of Paddle's maximum is several times as long on a CPU.
    return lower + relu(x * first.unsqueeze([2, 3]) - lower)
