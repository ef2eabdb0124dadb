"""Attention between tokens, ``[B, T, C]``, and maps, ``[B, C, H, W]``: ``bridges.cc``."""

from __future__ import annotations

import paddle
from paddle import matmul
from paddle.nn import functional as F

from kernels.dispatch import compiled, run


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
    attn = F.softmax(matmul(_scaled(query, heads), keys), axis=-1)
    attn = F.dropout(attn, dropout) if dropout else attn
    return matmul(attn, keys, transpose_y=True).transpose([0, 2, 1, 3]).flatten(2)


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
    attn = F.softmax(matmul(query, _scaled(key, heads), transpose_x=True, transpose_y=True), axis=-1)
    attn = F.dropout(attn, dropout) if dropout else attn
    value = _by_head(value, heads)
    return matmul(value, attn, transpose_x=True, transpose_y=True).reshape(x.shape)


def _by_head(tokens: paddle.Tensor, heads: int) -> paddle.Tensor:
    """``[B, T, C]`` to ``[B, heads, T, C / heads]``."""
    return tokens.reshape([0, 0, heads, -1]).transpose([0, 2, 1, 3])


def _scaled(tokens: paddle.Tensor, heads: int) -> paddle.Tensor:
    tokens = _by_head(tokens, heads)
    return tokens * tokens.shape[-1] ** -0.5
