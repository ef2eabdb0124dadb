"""The compiled operators over channels-first maps as Paddle functions with gradients.

The functions that call them return None where there is no compiled operator for the call.
"""

from __future__ import annotations

import paddle
from paddle.autograd import PyLayer
from paddle.autograd.py_layer import once_differentiable

from kernels.dispatch import run, usable
from kernels.tensors import empty, numel

AFTER = {None: 0, "gelu": 1, "relu": 2, "relu6": 3, "hardswish": 4}
"""The activations that may come after a compiled batch norm, by their numbers in ``batch_norm.cc``."""
BEFORE = {name: AFTER[name] for name in (None, "gelu", "relu")}
"""Those that may come before it; not both."""


class BatchNorm(PyLayer):
    """``BatchNorm.apply(x, residual, share, weight, bias, mean, variance, ...)``.

    ``[B, C, ...]`` twice, B, ``[C]`` four times; residual, share, weight and bias may be None. ``own`` tells whether
    mean and variance are those of this batch.
    """

    @staticmethod
    def forward(ctx, x, residual, share, weight, bias, mean, variance, own, epsilon, before, after):
        ctx.sizes = _sizes(x)
        ctx.settings = BEFORE[before], AFTER[after]
        given = (x, residual, share, weight, bias)
        x, residual, share, weight, bias = (None if item is None else item.contiguous() for item in given)
        y = empty(*x.shape)
        run("batch_norm_forward", *ctx.settings, *ctx.sizes, epsilon, x, mean, variance, weight, bias, residual, share,
            y)
        ctx.save_for_backward(x, mean, variance, weight, bias, share)
        ctx.own, ctx.epsilon = own, epsilon
        ctx.given = [item is not None for item in given]
        ctx.wanted = [item is not None and not item.stop_gradient for item in given]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean, variance, weight, bias, share = ctx.saved_tensor()
        _, connected, _, *affine = ctx.wanted
        # The gradient of the residual is a copy: Paddle adds the next one into it.
        grad_x, grad_residual = empty(*x.shape), empty(*x.shape) if connected else None
        grad_weight, grad_bias = (empty(x.shape[1]) if wanted else None for wanted in affine)
        run("batch_norm_backward", *ctx.settings, int(ctx.own), *ctx.sizes, ctx.epsilon, x, mean, variance, weight,
            bias, share, grad.contiguous(), grad_x, grad_weight, grad_bias, grad_residual)
        grads = (grad_x if ctx.wanted[0] else None, grad_residual, None, grad_weight, grad_bias)
        return (*(item for item, given in zip(grads, ctx.given, strict=True) if given), None, None)


class DynamicRelu(PyLayer):
    """``DynamicRelu.apply(x, first, second)``: ``[B, C, ...]`` with slopes ``[B, C]`` and ``[B, C]``."""

    @staticmethod
    def forward(ctx, x, first, second):
        x, first, second = x.contiguous(), first.contiguous(), second.contiguous()
        y = empty(*x.shape)
        run("dynamic_relu_forward", *_planes(x), x, first, second, y)
        ctx.save_for_backward(x, first, second)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, first, second = ctx.saved_tensor()
        grads = empty(*x.shape), empty(*first.shape), empty(*second.shape)
        run("dynamic_relu_backward", *_planes(x), x, first, second, grad.contiguous(), *grads)
        return grads


class ChannelShuffle(PyLayer):
    """``ChannelShuffle.apply(x, groups)``: ``[B, C, ...]``."""

    @staticmethod
    def forward(ctx, x, groups):
        images, channels, plane = ctx.sizes = _sizes(x)
        ctx.groups = groups
        y = empty(*x.shape)
        run("channel_shuffle", images, channels, groups, plane, x.contiguous(), y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        images, channels, plane = ctx.sizes
        grad_x = empty(*grad.shape)
        run("channel_shuffle", images, channels, channels // ctx.groups, plane, grad.contiguous(), grad_x)
        return grad_x


def normalised(
    x: paddle.Tensor,
    mean: paddle.Tensor,
    variance: paddle.Tensor,
    weight: paddle.Tensor | None,
    bias: paddle.Tensor | None,
    training: bool,
    momentum: float,
    epsilon: float,
    before: str | None,
    after: str | None,
    residual: paddle.Tensor | None,
    share: paddle.Tensor | None,
) -> paddle.Tensor | None:
    """Return the batch norm, with what stands around it."""
    channels = [item for item in (mean, variance, weight, bias) if item is not None]
    if not usable(x, residual, share, *channels) or (before and after) or before not in BEFORE or x.ndim < 2:
        return None
    if any(item.shape != x.shape[1:2] for item in channels) or not (mean.is_contiguous() and variance.is_contiguous()):
        return None
    if (residual is not None and residual.shape != x.shape) or (share is not None and numel(share) != x.shape[0]):
        return None
    if training:
        running = mean, variance
        mean, variance = empty(*mean.shape), empty(*mean.shape)
        run("batch_norm_moments", BEFORE[before], *_sizes(x), momentum, x.contiguous(), mean, variance, *running)
    return BatchNorm.apply(x, residual, share, weight, bias, mean, variance, training, epsilon, before, after)


def steepest(x: paddle.Tensor, first: paddle.Tensor, second: paddle.Tensor) -> paddle.Tensor | None:
    """Return dynamic ReLU."""
    if not usable(x, first, second) or not x.shape[:2] == first.shape == second.shape:
        return None
    return DynamicRelu.apply(x, first, second)


def shuffled(x: paddle.Tensor, groups: int) -> paddle.Tensor | None:
    """Return the channel shuffle."""
    if not usable(x) or x.ndim != 4 or x.shape[1] % groups:
        return None
    return ChannelShuffle.apply(x, groups)


def _planes(x: paddle.Tensor) -> tuple[int, int]:
    """Return planes and positions."""
    batch, channels, positions = _sizes(x)
    return batch * channels, positions


def _sizes(x: paddle.Tensor) -> tuple[int, int, int]:
    """Return images, channels and positions."""
    batch, channels = x.shape[:2]
    return batch, channels, numel(x) // (batch * channels)
