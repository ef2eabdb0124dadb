"""The compiled operators over rows of channels as Paddle functions with gradients."""

from __future__ import annotations

import paddle
from paddle.autograd import PyLayer
from paddle.autograd.py_layer import once_differentiable

from kernels.dispatch import run
from kernels.products import current, product, rounding
from kernels.tensors import empty, numel

SMALL = 3 << 19  # multiply-accumulates


def _rows(x: paddle.Tensor) -> tuple[int, int]:
    return numel(x) // x.shape[-1], x.shape[-1]


def worthwhile(x: paddle.Tensor, outputs: int) -> bool:
    """Tell whether a fully connected layer is worth a Python function with a gradient, which costs some 40 µs.

    Paddle's is slower from about ``SMALL`` products on. Mixed precision is for layers of every size.
    """
    return numel(x) * outputs > SMALL or rounding()


class Gelu(PyLayer):
    """``Gelu.apply(x)``: any shape."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        y = empty(*x.shape)
        run("gelu_forward", numel(x), x, y)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensor()
        grad_x = empty(*x.shape)
        run("gelu_backward", numel(x), x, grad.contiguous(), grad_x)
        return grad_x


class Linear(PyLayer):
    """``Linear.apply(x, weight, bias, transposed=...)``: ``[..., C]`` to ``[..., D]``.

    ``weight`` is ``[C, D]``, or ``[D, C]`` where transposed; ``bias`` is ``[D]`` or left out.
    """

    @staticmethod
    def forward(ctx, x, weight, bias=None, *, transposed):
        features = x.shape[-1]
        rows, weight = x.reshape([-1, features]).contiguous(), weight.contiguous()
        ctx.product = current()
        y = product(rows, weight, transpose_b=transposed, function=ctx.product)
        if bias is not None:
            run("bias_forward", *y.shape, bias.contiguous(), y)
        ctx.save_for_backward(rows, weight)
        ctx.shape = x.shape
        ctx.transposed = transposed
        ctx.has_bias = bias is not None
        ctx.wanted = [item is not None and not item.stop_gradient for item in (x, weight, bias)]
        return y.reshape([*x.shape[:-1], y.shape[1]])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensor()
        grad = grad.reshape([rows.shape[0], -1]).contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.wanted[0]:
            grad_x = product(grad, weight, transpose_b=not ctx.transposed, function=ctx.product).reshape(ctx.shape)
        if ctx.wanted[1]:
            operands = (grad, rows) if ctx.transposed else (rows, grad)
            grad_weight = product(*operands, transpose_a=True, function=ctx.product)
        if ctx.wanted[2]:
            grad_bias = empty(grad.shape[1])
            run("bias_backward", *grad.shape, grad, grad_bias)
        return (grad_x, grad_weight, grad_bias) if ctx.has_bias else (grad_x, grad_weight)


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
