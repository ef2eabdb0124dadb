"""The compiled attention as Paddle functions with gradients."""

from __future__ import annotations

import ctypes

import paddle
from paddle.autograd import PyLayer
from paddle.autograd.py_layer import once_differentiable

from kernels import products
from kernels.dispatch import run, usable
from kernels.tensors import empty


class Strides(ctypes.Structure):
    """Mirror of ``struct Strides`` in ``attention.cc``."""

    _fields_ = (("image", ctypes.c_int64), ("position", ctypes.c_int64), ("head", ctypes.c_int64))


class Shape(ctypes.Structure):
    """Mirror of ``struct AttentionShape`` in ``attention.cc``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "queries", "keys", "width")),
        *((name, Strides) for name in ("query", "key", "value", "mixed")),
    )


def attended(query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, bias: paddle.Tensor | None,
             scale: float) -> paddle.Tensor | None:
    """Return what :func:`kernels.attention` does, None where the compiled operator does not take these inputs."""
    if not (usable(query, key, value, bias) and products.available() and key.shape == value.shape):
        return None
    return Attention.apply(*((query, key, value) if bias is None else (query, key, value, bias)), scale=scale)


def self_attended(qkv: paddle.Tensor, bias: paddle.Tensor | None, scale: float | None) -> paddle.Tensor | None:
    """Return what :func:`kernels.self_attention` does, None where the compiled operator does not take these inputs."""
    if not (usable(qkv, bias) and products.available()):
        return None
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return SelfAttention.apply(*((qkv,) if bias is None else (qkv, bias)), scale=scale)


class Attention(PyLayer):
    """``Attention.apply(query, key, value, bias, scale=...)``, see :func:`kernels.attention`; bias may be left out."""

    @staticmethod
    def forward(ctx, query, key, value, bias=None, *, scale):
        query, key, value = (item.contiguous() for item in (query, key, value))
        batch, queries, heads, width = query.shape
        own, other = (Strides(count * heads * width, heads * width, width) for count in (queries, key.shape[1]))
        ctx.shape = Shape(batch, heads, queries, key.shape[1], width, own, other, other, own)
        ctx.scale = scale
        ctx.wanted = [item is not None and not item.stop_gradient for item in (query, key, value, bias)]
        ctx.has_bias = bias is not None
        offset = None if bias is None else bias.contiguous()
        mixed, kept = _forward(ctx.shape, scale, query, key, value, offset)
        ctx.save_for_backward(query, key, value, kept, *(() if bias is None else (offset,)))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, kept, *bias = ctx.saved_tensor()
        grads = [empty(*item.shape) for item in (query, key, value)]
        grads.append(empty(*bias[0].shape) if ctx.wanted[3] else None)
        inputs = (query, key, value, bias[0] if bias else None, kept, grad.contiguous())
        run("attention_backward", ctypes.addressof(ctx.shape), products.address(), ctx.scale, *inputs, *grads)
        found = [item if wanted else None for item, wanted in zip(grads, ctx.wanted, strict=True)]
        return tuple(found if ctx.has_bias else found[:3])


class SelfAttention(PyLayer):
    """``SelfAttention.apply(qkv, bias, scale=...)``, see :func:`kernels.self_attention`; bias may be left out."""

    @staticmethod
    def forward(ctx, qkv, bias=None, *, scale):
        qkv = qkv.contiguous()
        batch, positions, _, heads, width = qkv.shape
        packed = Strides(3 * positions * heads * width, 3 * heads * width, width)
        own = Strides(positions * heads * width, heads * width, width)
        ctx.shape = Shape(batch, heads, positions, positions, width, packed, packed, packed, own)
        ctx.scale = scale
        ctx.bias_wanted = bias is not None and not bias.stop_gradient
        ctx.has_bias = bias is not None
        offset = None if bias is None else bias.contiguous()
        mixed, kept = _forward(ctx.shape, scale, *_parts(qkv), offset)
        ctx.save_for_backward(qkv, kept, *(() if bias is None else (offset,)))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        qkv, kept, *bias = ctx.saved_tensor()
        grad_qkv = empty(*qkv.shape)
        grad_bias = empty(*bias[0].shape) if ctx.bias_wanted else None
        inputs = (*_parts(qkv), bias[0] if bias else None, kept, grad.contiguous())
        outputs = (*_parts(grad_qkv), grad_bias)
        run("attention_backward", ctypes.addressof(ctx.shape), products.address(), ctx.scale, *inputs, *outputs)
        return (grad_qkv, grad_bias) if ctx.has_bias else grad_qkv


def _parts(qkv: paddle.Tensor) -> list[int]:
    """Return where queries, keys and values start in ``[B, N, 3, heads, width]``."""
    return [qkv.data_ptr() + part * qkv.shape[3] * qkv.shape[4] * 4 for part in range(3)]


def _forward(shape: Shape, scale: float, *inputs: paddle.Tensor | int | None) -> tuple[paddle.Tensor, paddle.Tensor]:
    mixed = empty(shape.batch, shape.queries, shape.heads, shape.width)
    kept = empty(shape.batch, shape.heads, shape.queries, 2)
    run("attention_forward", ctypes.addressof(shape), products.address(), scale, *inputs, mixed, kept)
    return mixed, kept
