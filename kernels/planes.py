"""The compiled dynamic ReLU as a Paddle function with gradients."""

from __future__ import annotations

import paddle
from paddle.autograd import PyLayer
from paddle.autograd.py_layer import once_differentiable

from kernels.dispatch import empty, run, usable


class DynamicRelu(PyLayer):
    """``DynamicRelu.apply(x, first, second)``: ``[B, C, ...]`` with slopes ``[B, C]`` and ``[B, C]``."""

    @staticmethod
    def forward(ctx, x, first, second):
        x, first, second = x.contiguous(), first.contiguous(), second.contiguous()
        y = empty(*x.shape)
        run("dynamic_relu_forward", first.size, x.size // first.size, x, first, second, y)
        ctx.save_for_backward(x, first, second)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, first, second = ctx.saved_tensor()
        grads = empty(*x.shape), empty(*first.shape), empty(*second.shape)
        run("dynamic_relu_backward", first.size, x.size // first.size, x, first, second, grad.contiguous(), *grads)
        return grads


def steepest(x: paddle.Tensor, first: paddle.Tensor, second: paddle.Tensor) -> paddle.Tensor | None:
    """Return dynamic ReLU; None where there is no compiled operator."""
    if not usable(x, first, second) or not x.shape[:2] == first.shape == second.shape:
        return None
    return DynamicRelu.apply(x, first, second)
