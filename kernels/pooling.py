"""Pooling of channels-last maps, ``[B, H, W, C]``: ``pooling.cc``."""

from __future__ import annotations

import paddle
from paddle.nn import functional as F

from kernels import settings
from kernels.dispatch import compiled, run
from kernels.maps import group_norm, residual


def pool_difference(x: paddle.Tensor, size: int) -> paddle.Tensor:
    """Return the mean over ``size`` × ``size`` positions around each, without padding, minus the position itself.

    Args:
        x: ``[B, H, W, C]``.
        size: odd.
    """
    if compiled(x):
        return run("pool_difference", x, size // 2)
    return F.avg_pool2d(x, size, stride=1, padding=size // 2, exclusive=True, data_format="NHWC") - x


def pool_mixer(
    x: paddle.Tensor,
    norm: tuple[paddle.Tensor, paddle.Tensor],
    size: int,
    epsilon: float = 1e-5,
    scale: paddle.Tensor | None = None,
    keep_scale: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """Return ``x + keep_scale · scale · pool_difference(group_norm(x))``; None counts as 1.

    One operator within :func:`kernels.bfloat16_products`, although it rounds nothing: its sums have another order.

    Args:
        x: ``[B, H, W, C]``.
        norm: weight and bias of the norm, ``[C]`` each. The bias has no effect.
        size: of the window, odd.
        epsilon: is added to the variance.
        scale: factors of channels, ``[C]``.
        keep_scale: factors of images, ``[B, 1, 1, 1]``, without a gradient.
    """
    if settings.rounds_to_bfloat16() and compiled(x, *norm, scale, keep_scale):
        return run("pool_mixer", x, *norm, scale, keep_scale, size // 2, epsilon)
    return residual(x, pool_difference(group_norm(x, *norm, epsilon), size), scale=scale, keep_scale=keep_scale)
