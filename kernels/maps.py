"""Operators over channels-last maps, ``[B, H, W, C]``: ``maps.cc``."""

from __future__ import annotations

import paddle
from paddle import _C_ops
from paddle.nn import functional as F

from kernels.dispatch import compiled, run


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
