"""Operators over maps: norms, activations, pooling, residual connections and layouts.

Channels-last, ``[B, H, W, C]``: ``maps.cc`` and ``pooling.cc``; channels-first, ``[B, C, H, W]``: ``batchnorm.cc`` and
``planes.cc``.
"""

from __future__ import annotations

import paddle
from paddle import _C_ops
from paddle.nn import functional as F

from kernels.dispatch import compiled, run
from kernels.rows import gelu

AFTER = {None: 0, "gelu": 1, "relu": 2, "relu6": 3, "hardswish": 4}
"""The activations that may come after a compiled batch norm, by their numbers in ``batchnorm.cc``."""
BEFORE = {name: AFTER[name] for name in (None, "gelu", "relu")}
"""Those that may come before it; not both."""


def residual(
    x: paddle.Tensor,
    branch: paddle.Tensor,
    kept: paddle.Tensor | None = None,
    scale: paddle.Tensor | None = None,
    keep_scale: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """Return ``x · kept + keep_scale · branch · scale``; None counts as 1.

    Args:
        x: ``[B, ..., C]``.
        branch: like ``x``; or ``[1, ..., C]`` for all images, without factors.
        kept: factors of channels, ``[C]``.
        scale: factors of channels, ``[C]``.
        keep_scale: factors of images, ``[B, 1, ...]``, without a gradient.
    """
    if compiled(x, branch, kept, scale, keep_scale):
        if kept is None and scale is None:
            return run("residual", x, branch, keep_scale, branch.shape[0] < x.shape[0])
        return run("scaled_residual", x, branch, kept, scale, keep_scale)
    branch = branch if scale is None else branch * scale
    return (x if kept is None else x * kept) + (branch if keep_scale is None else branch * keep_scale)


def star_relu(x: paddle.Tensor, scale: paddle.Tensor, bias: paddle.Tensor) -> paddle.Tensor:
    """Return ``scale · relu(x)² + bias``: any shape, with ``[1]`` and ``[1]``."""
    return run("star_relu", x, scale, bias) if compiled(x, scale, bias) else scale * F.relu(x).square() + bias


def group_norm(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor, epsilon: float = 1e-5) -> paddle.Tensor:
    """Normalise each image as a whole, ``[B, H, W, C]``, as ``paddle.nn.functional.group_norm`` with one group."""
    if compiled(x, weight, bias):
        return run("group_norm", x, weight, bias, epsilon)
    return _C_ops.group_norm(x, weight, bias, epsilon, 1, "NHWC")  # Paddle 2.6 has no functional.group_norm


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


def dynamic_relu(x: paddle.Tensor, first: paddle.Tensor, second: paddle.Tensor) -> paddle.Tensor:
    """Return max(first · x, second · x): ``[B, C, H, W]`` with slopes ``[B, C]`` and ``[B, C]``."""
    if compiled(x, first, second):
        return run("dynamic_relu", x, first, second)
    lower = x * second.unsqueeze([2, 3])
    # The backward pass of Paddle's maximum is several times as long on a CPU.
    return lower + F.relu(x * first.unsqueeze([2, 3]) - lower)


def channel_shuffle(x: paddle.Tensor, groups: int) -> paddle.Tensor:
    """Return ``paddle.nn.functional.channel_shuffle``: ``[B, C, H, W]``, C a multiple of ``groups``."""
    return run("channel_shuffle", x, groups) if compiled(x) else F.channel_shuffle(x, groups)


def average_pool(x: paddle.Tensor, size: int) -> paddle.Tensor:
    """Return means of windows of ``size`` × ``size`` positions side by side: ``[B, C, ⌈H / size⌉, ⌈W / size⌉]``.

    Windows at the border are smaller where ``size`` does not divide the map; 2 is compiled.
    """
    return run("average_pool", x) if size == 2 and compiled(x) else F.avg_pool2d(x, size, ceil_mode=True)


def channels_last(x: paddle.Tensor) -> paddle.Tensor:
    """Return ``[B, C, H, W]`` as ``[B, H, W, C]``."""
    return run("move_channels", x, True) if compiled(x) and x.is_contiguous() else x.transpose([0, 2, 3, 1])


def channels_first(x: paddle.Tensor) -> paddle.Tensor:
    """Return ``[B, H, W, C]`` as ``[B, C, H, W]``."""
    return run("move_channels", x, False) if compiled(x) and x.is_contiguous() else x.transpose([0, 3, 1, 2])
