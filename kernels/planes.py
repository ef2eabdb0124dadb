"""The compiled operators over the planes of maps as Paddle functions with gradients."""

from __future__ import annotations

import paddle
from paddle.autograd import PyLayer
from paddle.autograd.py_layer import once_differentiable

from kernels.dispatch import empty, run, usable


def _sizes(x: paddle.Tensor) -> tuple[int, int, int]:
    batch, channels = x.shape[:2]
    return batch, channels, x.size // (batch * channels)


class BatchNorm(PyLayer):
    """``BatchNorm.apply(x, weight, bias, running=(mean, variance), momentum=..., epsilon=...)``.

    ``x`` is ``[B, C, ...]``; the running moments, given by their addresses, are brought up to date.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, *, running, momentum, epsilon):
        x, weight = x.contiguous(), weight.contiguous()
        y, moments = empty(*x.shape), empty(2, x.shape[1])
        run("batch_norm_forward", *_sizes(x), epsilon, momentum, x, weight, bias.contiguous(), *running, moments, y)
        ctx.save_for_backward(x, weight, moments)
        ctx.wanted = [not item.stop_gradient for item in (x, weight, bias)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, moments = ctx.saved_tensor()
        grads = empty(*x.shape), empty(*weight.shape), empty(*weight.shape)
        run("batch_norm_backward", *_sizes(x), x, weight, moments, grad.contiguous(), *grads)
        return tuple(item if wanted else None for item, wanted in zip(grads, ctx.wanted, strict=True))


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


def normalise(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor,
    mean: paddle.Tensor,
    variance: paddle.Tensor,
    training: bool,
    momentum: float,
    epsilon: float,
) -> paddle.Tensor | None:
    """Return batch normalisation; None where there is no compiled operator, as for gradients in evaluation."""
    tensors = (x, weight, bias, mean, variance)
    if not usable(*tensors) or any(item.shape != x.shape[1:2] for item in tensors[1:]):
        return None
    if training:
        running = (mean.data_ptr(), variance.data_ptr())
        return BatchNorm.apply(x, weight, bias, running=running, momentum=momentum, epsilon=epsilon)
    if paddle.is_grad_enabled() and not all(tensor.stop_gradient for tensor in (x, weight, bias)):
        return None
    x, y = x.contiguous(), empty(*x.shape)
    run("batch_norm_apply", *_sizes(x), epsilon, x, weight, bias, mean, variance, y)
    return y
