"""Attention between a few tokens and a map, compiled, as Paddle functions with gradients.

The functions that call them return None where there is no compiled operator for the call.
"""

from __future__ import annotations

import paddle
from paddle.autograd import PyLayer
from paddle.autograd.py_layer import once_differentiable

from kernels.dispatch import run, usable
from kernels.tensors import empty, numel


class AttendMap(PyLayer):
    """``AttendMap.apply(query, x, heads=...)``, see :func:`kernels.attend_map`."""

    @staticmethod
    def forward(ctx, query, x, *, heads):
        query, x = query.contiguous(), x.contiguous()
        ctx.sizes = _sizes(x, query, heads)
        weights, out = empty(*_weights(ctx.sizes)), empty(*query.shape)
        run("attend_map_forward", *ctx.sizes, query, x, weights, out)
        ctx.save_for_backward(query, x, weights)
        ctx.wanted = [not item.stop_gradient for item in (query, x)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, x, weights = ctx.saved_tensor()
        grads = empty(*query.shape), empty(*x.shape)
        run("attend_map_backward", *ctx.sizes, query, x, weights, grad.contiguous(), *grads)
        return tuple(item if wanted else None for item, wanted in zip(grads, ctx.wanted, strict=True))


class AttendTokens(PyLayer):
    """``AttendTokens.apply(x, key, value, heads=...)``, see :func:`kernels.attend_tokens`."""

    @staticmethod
    def forward(ctx, x, key, value, *, heads):
        x, key, value = x.contiguous(), key.contiguous(), value.contiguous()
        ctx.sizes = _sizes(x, key, heads)
        weights, out = empty(*_weights(ctx.sizes)), empty(*x.shape)
        run("attend_tokens_forward", *ctx.sizes, x, key, value, weights, out)
        ctx.save_for_backward(x, key, value, weights)
        ctx.wanted = [not item.stop_gradient for item in (x, key, value)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, key, value, weights = ctx.saved_tensor()
        grads = empty(*x.shape), empty(*key.shape), empty(*value.shape)
        run("attend_tokens_backward", *ctx.sizes, x, key, value, weights, grad.contiguous(), *grads)
        return tuple(item if wanted else None for item, wanted in zip(grads, ctx.wanted, strict=True))


def map_attended(query: paddle.Tensor, x: paddle.Tensor, heads: int) -> paddle.Tensor | None:
    """Run the compiled attention of tokens to a map."""
    return AttendMap.apply(query, x, heads=heads) if usable(query, x) and _fit(x, heads, query) else None


def tokens_attended(
    x: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, heads: int
) -> paddle.Tensor | None:
    """Run the compiled attention of a map to tokens."""
    if not usable(x, key, value) or not _fit(x, heads, key, value):
        return None
    return AttendTokens.apply(x, key, value, heads=heads)


def _fit(x: paddle.Tensor, heads: int, *tokens: paddle.Tensor) -> bool:
    """Tell whether the operators take a map ``[B, C, ...]`` with tokens, each ``[B, T, C]``."""
    return x.ndim > 2 and x.shape[1] % heads == 0 and all(
        item.ndim == 3 and item.shape[::2] == x.shape[:2] and item.shape == tokens[0].shape for item in tokens)


def _sizes(x: paddle.Tensor, tokens: paddle.Tensor, heads: int) -> tuple[int, int, int, int, int, float]:
    """Return images, heads, tokens, width of a head, positions, and the factor of the products."""
    batch, count, channels = tokens.shape
    width = channels // heads
    return batch, heads, count, width, numel(x) // (batch * channels), width**-0.5


def _weights(sizes: tuple[int, int, int, int, int, float]) -> tuple[int, int, int, int]:
    batch, heads, count, _, positions, _ = sizes
    return batch, heads, count, positions
