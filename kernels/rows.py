"""Operators over rows of channels, ``rows.cc``, and matrix products, ``matmul.cc``."""

from __future__ import annotations

import paddle
from paddle.nn import functional as F

import kernels
from kernels import build
from kernels.dispatch import compiled, compiled_bfloat16, run


def gelu(x: paddle.Tensor) -> paddle.Tensor:
    """Return ``x`` times the normal distribution function of ``x``, as ``paddle.nn.functional.gelu``; any shape."""
    return run("gelu", x) if compiled(x) else F.gelu(x)


def mean(x: paddle.Tensor, axis: int) -> paddle.Tensor:
    """Return the mean over an axis, as ``x.mean(axis)``: ``[B, N, C]`` to ``[B, C]``, or ``[B, C, N]`` with axis -1.

    Compiled for every axis but the first; Paddle's runs on one thread.
    """
    axis %= x.ndim
    return run("mean", x, axis, x.shape[axis]) if axis and compiled(x) else x.mean(axis)


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
        return run("linear", x, weight, bias, transposed, kernels.rounds_to_bfloat16(), *needs_grad)
    return F.linear(x, weight.t() if transposed else weight, bias)


def product(a: paddle.Tensor, b: paddle.Tensor, transpose_b: bool = False) -> paddle.Tensor:
    """Multiply two matrices, without gradients, for optimizers.

    Args:
        a: ``[m, k]``.
        b: ``[k, n]``, or ``[n, k]`` where ``transpose_b``.
        transpose_b: transpose ``b`` first.

    Returns:
        ``[m, n]``. Within :func:`kernels.bfloat16_products` operands are rounded where the processor has such products.
    """
    if compiled(a, b) and build.library().onednn:
        return run("product", a, b, transpose_b, compiled_bfloat16())
    return a.matmul(b, transpose_y=transpose_b)
