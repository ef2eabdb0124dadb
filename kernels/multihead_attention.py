"""Attention of several heads among tokens, ``multihead_attention.cc``, and between tokens and maps, ``bridges.cc``."""

from __future__ import annotations

import paddle
from paddle.nn import functional as F

from kernels import build
from kernels.dispatch import compiled, compiled_bfloat16, run


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
        return run("attention", query, key, value, bias, scale, compiled_bfloat16(), _needs_grad(bias))
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
        return run("self_attention", qkv, bias, axis, scale, compiled_bfloat16(), _needs_grad(bias))
    return attention(*qkv.unbind(axis), bias, scale, dropout)


def attend_map(query: paddle.Tensor, x: paddle.Tensor, heads: int, dropout: float = 0.0) -> paddle.Tensor:
    """Let tokens ask a map, whose positions are keys and values: softmax(query · map / √d) · map for every head.

    Args:
        query: ``[B, T, C]``, C = heads · d.
        x: ``[B, C, H, W]``.
        heads: number of heads.
        dropout: rate at which probabilities are dropped; other than 0 is left to Paddle.

    Returns:
        ``[B, T, C]``.
    """
    if not dropout and compiled(query, x):
        return run("attend_map", query, x, heads)
    keys = x.reshape([0, heads, x.shape[1] // heads, -1])  # [B, heads, d, HW]
    attn = F.softmax(paddle.matmul(_scaled(query, heads), keys), axis=-1)
    attn = F.dropout(attn, dropout) if dropout else attn
    return paddle.matmul(attn, keys, transpose_y=True).transpose([0, 2, 1, 3]).flatten(2)


def attend_tokens(
    x: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, heads: int, dropout: float = 0.0
) -> paddle.Tensor:
    """Let the positions of a map ask tokens: softmax(map · key / √d) · value for every head.

    Args:
        x: ``[B, C, H, W]``, C = heads · d.
        key: ``[B, T, C]``.
        value: ``[B, T, C]``.
        heads: number of heads.
        dropout: rate at which probabilities are dropped; other than 0 is left to Paddle.

    Returns:
        ``[B, C, H, W]``.
    """
    if not dropout and compiled(x, key, value):
        return run("attend_tokens", x, key, value, heads)
    query = x.reshape([0, heads, x.shape[1] // heads, -1])  # [B, heads, d, HW]
    attn = F.softmax(paddle.matmul(query, _scaled(key, heads), transpose_x=True, transpose_y=True), axis=-1)
    attn = F.dropout(attn, dropout) if dropout else attn
    value = _by_head(value, heads)
    return paddle.matmul(value, attn, transpose_x=True, transpose_y=True).reshape(x.shape)


def _by_head(tokens: paddle.Tensor, heads: int) -> paddle.Tensor:
    """``[B, T, C]`` to ``[B, heads, T, C / heads]``."""
    return tokens.reshape([0, 0, heads, -1]).transpose([0, 2, 1, 3])


def _scaled(tokens: paddle.Tensor, heads: int) -> paddle.Tensor:
    tokens = _by_head(tokens, heads)
    return tokens * tokens.shape[-1] ** -0.5


def _needs_grad(bias: paddle.Tensor | None) -> bool:
    return bias is not None and not bias.stop_gradient
