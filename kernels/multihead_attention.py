"""Attention of several heads: ``multihead_attention.cc``."""

from __future__ import annotations

import paddle
from paddle.nn import functional as F

from kernels import build, settings
from kernels.dispatch import compiled, run


def attention(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> paddle.Tensor:
    """Return ``softmax(scale · query keyᵀ + bias) value`` for every head.

    Args:
        query: ``[B, N, heads, d]``.
        key: ``[B, M, heads, d]``.
        value: ``[B, M, heads, d]``.
        bias: ``[heads, N, M]`` or None.
        scale: factor of the products, ``1 / √d`` where None.
        dropout: rate at which probabilities are dropped; other than 0 is left to Paddle.

    Returns:
        ``[B, N, heads, d]``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not dropout and compiled(query, key, value, bias) and build.library().onednn:
        return run("attention", query, key, value, bias, scale, _bfloat16(), _needs_grad(bias))
    query, key, value = (x.transpose([0, 2, 1, 3]) for x in (query, key, value))
    logits = paddle.matmul(query * scale, key, transpose_y=True)
    attn = F.softmax(logits if bias is None else logits + bias, axis=-1)
    return paddle.matmul(F.dropout(attn, dropout) if dropout else attn, value).transpose([0, 2, 1, 3])


def self_attention(
    qkv: paddle.Tensor, bias: paddle.Tensor | None = None, scale: float | None = None, dropout: float = 0.0,
    axis: int = 2,
) -> paddle.Tensor:
    """Return :func:`attention` of packed queries, keys and values without a copy of them.

    These follow each other along ``axis``, ``[B, N, 3, heads, d]`` or ``[B, N, heads, 3, d]``.
    """
    if not dropout and compiled(qkv, bias) and build.library().onednn:
        scale = qkv.shape[-1] ** -0.5 if scale is None else scale
        return run("self_attention", qkv, bias, axis, scale, _bfloat16(), _needs_grad(bias))
    return attention(*qkv.unbind(axis), bias, scale, dropout)


def _bfloat16() -> bool:
    return settings.rounds_to_bfloat16() and build.library().bfloat16


def _needs_grad(bias: paddle.Tensor | None) -> bool:
    return bias is not None and not bias.stop_gradient
