"""Batch norm with the activation and the residual connection beside it: ``batchnorm.cc``."""

from __future__ import annotations

import paddle
from paddle.nn import functional as F

from kernels.dispatch import compiled, run
from kernels.rows import gelu

AFTER = {None: 0, "gelu": 1, "relu": 2, "relu6": 3, "hardswish": 4}
"""The activations that may come after a compiled batch norm, by their numbers in ``batchnorm.cc``."""
BEFORE = {name: AFTER[name] for name in (None, "gelu", "relu")}
"""Those that may come before it; not both."""


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
    keep_scale: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """Return ``keep_scale · after(norm(before(x))) + residual``, the norm being ``paddle.nn.functional.batch_norm``.

    Args:
        x: ``[B, C, ...]``.
        mean: the running mean, ``[C]``; used outside training, updated in training.
        variance: the running variance (biased, as Paddle has it), ``[C]``.
        weight: ``[C]`` or None.
        bias: ``[C]`` or None.
        training: whether mean and variance are those of the batch.
        momentum: weight of the old running mean and variance.
        epsilon: is added to the variance.
        before: "gelu", "relu", "relu6", "hardswish" or None; the first two are compiled, without one after.
        after: the same; all are compiled, without one before.
        residual: like ``x``, or None.
        keep_scale: factors of images, ``[B, 1, ...]``, or None; it has no gradient.
    """
    fits = before in BEFORE and not (before and after)
    fits = fits and compiled(x, mean, variance, weight, bias, residual, keep_scale)
    if fits and mean.is_contiguous() and variance.is_contiguous():  # these two are updated in place
        return run("batch_norm", x, mean, variance, weight, bias, residual, keep_scale, training, momentum, epsilon,
                   BEFORE[before], AFTER[after], residual is not None)
    y = F.batch_norm(_activated(x, before), mean, variance, weight, bias, training, momentum, epsilon)
    y = _activated(y, after)
    y = y if keep_scale is None else y * keep_scale
    return y if residual is None else y + residual


def _activated(x: paddle.Tensor, name: str | None) -> paddle.Tensor:
    if name == "gelu":
        return gelu(x)
    return x if name is None else getattr(F, name)(x)
