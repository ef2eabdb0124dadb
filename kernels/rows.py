"""Operators over rows of channels: ``rows.cc``."""

from __future__ import annotations

import paddle
from paddle.nn import functional as F

from kernels import build, settings
from kernels.dispatch import compiled, run


def gelu(x: paddle.Tensor) -> paddle.Tensor:
    """Return ``x`` times the normal distribution function of ``x``, as ``paddle.nn.functional.gelu``; any shape."""
    return run("gelu", x) if compiled(x) else F.gelu(x)


def layer_norm(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor, epsilon: float = 1e-5) -> paddle.Tensor:
    """Normalise the last axis as ``paddle.nn.functional.layer_norm``: ``[..., C]`` with ``[C]`` and ``[C]``."""
    if compiled(x, weight, bias):
        return run("layer_norm", x, weight, bias, epsilon)
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def linear(
    x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None = None, transposed: bool = False
) -> paddle.Tensor:
    """Return ``x @ weight + bias`` as ``paddle.nn.functional.linear``; on the CPU with oneDNN's matrix product.

    Args:
        x: ``[..., C]``.
        weight: ``[C, D]``; ``[D, C]`` where ``transposed``, as a 1×1 convolution's flattened weight.
        bias: ``[D]`` or None.
        transposed: whether the outputs are the first axis of ``weight``.

    Returns:
        ``[..., D]``.
    """
    if compiled(x, weight, bias) and x.ndim > 1 and build.library().onednn:
        needs_grad = not x.stop_gradient, not weight.stop_gradient
        return run("linear", x, weight, bias, transposed, settings.rounds_to_bfloat16(), *needs_grad)
    return F.linear(x, weight.t() if transposed else weight, bias)
