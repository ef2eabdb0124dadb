"""The compiled operators over rows of channels as Paddle functions with gradients."""

from __future__ import annotations

import paddle
from paddle.autograd import PyLayer
from paddle.autograd.py_layer import once_differentiable

from kernels.dispatch import empty, run


def _rows(x: paddle.Tensor) -> tuple[int, int]:
    return x.size // x.shape[-1], x.shape[-1]


class Gelu(PyLayer):
    """``Gelu.apply(x)``: any shape."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        y = empty(*x.shape)
        run("gelu_forward", x.size, x, y)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensor()
        grad_x = empty(*x.shape)
        run("gelu_backward", x.size, x, grad.contiguous(), grad_x)
        return grad_x


class Linear(PyLayer):
    """``Linear.apply(x, weight, bias)``: ``[..., C]``, ``[C, D]`` and ``[D]`` to ``[..., D]``.

    The products are Paddle's; the bias is added in place, and its gradient summed here.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        y = paddle.matmul(x, weight)
        run("bias_forward", *_rows(y), bias.contiguous(), y)
        ctx.save_for_backward(x, weight)
        ctx.wanted = [not item.stop_gradient for item in (x, weight, bias)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensor()
        grad = grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.wanted[0]:
            grad_x = paddle.matmul(grad, weight, transpose_y=True)
        if ctx.wanted[1]:
            rows = x.reshape([-1, weight.shape[0]]), grad.reshape([-1, weight.shape[1]])
            grad_weight = paddle.matmul(*rows, transpose_x=True)
        if ctx.wanted[2]:
            grad_bias = empty(weight.shape[1])
            run("bias_backward", *_rows(grad), grad, grad_bias)
        return grad_x, grad_weight, grad_bias


class LayerNorm(PyLayer):
    """``LayerNorm.apply(x, weight, bias, epsilon)`` over the last axis: ``[..., C]``, ``[C]``, ``[C]``."""

    @staticmethod
    def forward(ctx, x, weight, bias, epsilon):
        x, weight = x.contiguous(), weight.contiguous()
        y = empty(*x.shape)
        run("norm_forward", *_rows(x), epsilon, x, weight, bias.contiguous(), y)
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        ctx.wanted = [not item.stop_gradient for item in (x, weight, bias)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensor()
        grads = empty(*x.shape), empty(*weight.shape), empty(*weight.shape)
        run("norm_backward", *_rows(x), ctx.epsilon, x, weight, grad.contiguous(), *grads)
        return tuple(item if wanted else None for item, wanted in zip(grads, ctx.wanted, strict=True))
