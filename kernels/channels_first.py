"""Operators over channels-first maps, ``[B, C, H, W]``, each with Paddle's own behind it; ``kernels`` exports them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import kernels

if TYPE_CHECKING:
    import paddle


def batch_norm(
    x: paddle.Tensor,
    mean: paddle.Tensor,
    variance: paddle.Tensor,
    weight: paddle.Tensor | None = None,
    bias: paddle.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    before: str | None = None,
    after: str | None = None,
    residual: paddle.Tensor | None = None,
    share: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """Return ``share · after(norm(before(x))) + residual``, the norm being ``paddle.nn.functional.batch_norm``.

    Args:
        x: ``[B, C, ...]``.
        mean: the running mean, ``[C]``; used outside training, and moved in training by ``momentum``.
        variance: the running variance (biased, as Paddle has it), ``[C]``.
        weight: ``[C]`` or None.
        bias: ``[C]`` or None.
        training: whether mean and variance are those of the batch.
        momentum: how much of the running ones stays.
        epsilon: is added to the variance.
        before: "gelu", "relu", "relu6", "hardswish" or None; the first two are compiled, without one after.
        after: the same; all are compiled, without one before.
        residual: like ``x``, or None.
        share: factors of images, ``[B, 1, ...]``, or None; it has no gradient.
    """
    if kernels.mode() == "auto":
        from kernels.planes import normalised

        y = normalised(x, mean, variance, weight, bias, training, momentum, epsilon, before, after, residual, share)
        if y is not None:
            return y
    from paddle.nn import functional as F

    y = F.batch_norm(_activated(x, before), mean, variance, weight, bias, training, momentum, epsilon)
    y = _activated(y, after)
    y = y if share is None else y * share
    return y if residual is None else y + residual


def _activated(x: paddle.Tensor, name: str | None) -> paddle.Tensor:
    from paddle.nn import functional as F

    if name == "gelu":
        return kernels.gelu(x)
    return x if name is None else getattr(F, name)(x)


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


def channel_shuffle(x: paddle.Tensor, groups: int) -> paddle.Tensor:
    """Return ``paddle.nn.functional.channel_shuffle``: ``[B, C, H, W]``, C a multiple of ``groups``."""
    if kernels.mode() == "auto":
        from kernels.planes import shuffled

        y = shuffled(x, groups)
        if y is not None:
            return y
    from paddle.nn.functional import channel_shuffle as stock

    return stock(x, groups)
