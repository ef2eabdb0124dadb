"""The compiled operators over channels-last maps as Paddle functions with gradients.

The functions that call them return None where there is no compiled operator for the call.
"""

from __future__ import annotations

import paddle
from paddle.autograd import PyLayer
from paddle.autograd.py_layer import once_differentiable

from kernels.dispatch import run, usable
from kernels.tensors import empty, numel


class Residual(PyLayer):
    """``Residual.apply(x, branch, kept, scale, share)``: ``[B, ..., C]`` twice, ``[C]`` or None twice, B or None."""

    @staticmethod
    def forward(ctx, x, branch, kept, scale, share):
        x, branch = x.contiguous(), branch.contiguous()
        factors = [None if item is None else item.contiguous() for item in (kept, scale, share)]
        ctx.sizes = (numel(x) // x.shape[-1], x.shape[-1], numel(x) // x.shape[-1] // x.shape[0])
        y = empty(*x.shape)
        run("residual_forward", *ctx.sizes, x, branch, *factors, y)
        # What no gradient needs is not kept; the operator does not look at it.
        ctx.save_for_backward(None if kept is None else x, None if scale is None else branch, *factors)
        ctx.shape = x.shape
        ctx.wanted = [item is not None and not item.stop_gradient for item in (x, branch, kept, scale)]
        ctx.given = [item is not None for item in (x, branch, kept, scale, share)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensor()
        grads = [empty(*ctx.shape), empty(*ctx.shape)]
        grads += [empty(ctx.shape[-1]) if given else None for given in ctx.given[2:4]]
        run("residual_backward", *ctx.sizes, *saved, grad.contiguous(), *grads)
        grads = [item if wanted else None for item, wanted in zip(grads, ctx.wanted, strict=True)]
        return tuple(item for item, given in zip([*grads, None], ctx.given, strict=True) if given)


class StarRelu(PyLayer):
    """``StarRelu.apply(x, scale, bias)``: any shape, ``[1]``, ``[1]``."""

    @staticmethod
    def forward(ctx, x, scale, bias):
        x = x.contiguous()
        y = empty(*x.shape)
        run("star_relu_forward", numel(x), x, scale, bias, y)
        ctx.save_for_backward(x, scale)
        ctx.wanted = [not item.stop_gradient for item in (x, scale, bias)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, scale = ctx.saved_tensor()
        grads = empty(*x.shape), empty(1), empty(1)
        run("star_relu_backward", numel(x), x, scale, grad.contiguous(), *grads)
        return tuple(item if wanted else None for item, wanted in zip(grads, ctx.wanted, strict=True))


class GroupNorm(PyLayer):
    """``GroupNorm.apply(x, weight, bias, epsilon)`` of one group: ``[B, ..., C]``, ``[C]``, ``[C]``."""

    @staticmethod
    def forward(ctx, x, weight, bias, epsilon):
        x, weight = x.contiguous(), weight.contiguous()
        ctx.sizes = (x.shape[0], numel(x) // x.shape[0] // x.shape[-1], x.shape[-1])
        y, moments = empty(*x.shape), empty(x.shape[0], 2)
        run("group_norm_forward", *ctx.sizes, epsilon, x, weight, bias.contiguous(), y, moments)
        ctx.save_for_backward(x, weight, moments)
        ctx.wanted = [not item.stop_gradient for item in (x, weight, bias)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, moments = ctx.saved_tensor()
        grads = empty(*x.shape), empty(*weight.shape), empty(*weight.shape)
        run("group_norm_backward", *ctx.sizes, x, weight, moments, grad.contiguous(), *grads)
        return tuple(item if wanted else None for item, wanted in zip(grads, ctx.wanted, strict=True))


class Pooling(PyLayer):
    """``Pooling.apply(x, size)``: ``[B, H, W, C]``; the mean of ``size``² positions minus the one in the middle."""

    @staticmethod
    def forward(ctx, x, size):
        y = empty(*x.shape)
        run("pooling", *x.shape, size // 2, 0, x.contiguous(), y)
        ctx.size = size
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_x = empty(*grad.shape)
        run("pooling", *grad.shape, ctx.size // 2, 1, grad.contiguous(), grad_x)
        return grad_x


def connected(
    x: paddle.Tensor, branch: paddle.Tensor, kept: paddle.Tensor | None, scale: paddle.Tensor | None,
    share: paddle.Tensor | None,
) -> paddle.Tensor | None:
    """Run the compiled residual connection."""
    if not usable(x, branch, kept, scale, share) or branch.shape != x.shape:
        return None
    for factor in (kept, scale):
        if factor is not None and factor.shape != x.shape[-1:]:
            return None
    if share is not None and numel(share) != x.shape[0]:
        return None
    return Residual.apply(x, branch, kept, scale, share)


def activated(x: paddle.Tensor, scale: paddle.Tensor, bias: paddle.Tensor) -> paddle.Tensor | None:
    """Run the compiled StarReLU."""
    if not usable(x, scale, bias) or scale.shape != [1] or bias.shape != [1]:
        return None
    return StarRelu.apply(x, scale, bias)


def normalised(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor, epsilon: float) -> paddle.Tensor | None:
    """Run the compiled group norm."""
    if not usable(x, weight, bias) or x.ndim != 4 or weight.shape != x.shape[-1:] or bias.shape != weight.shape:
        return None
    return GroupNorm.apply(x, weight, bias, epsilon)


def pooled(x: paddle.Tensor, size: int) -> paddle.Tensor | None:
    """Run the compiled pooling."""
    if not usable(x) or x.ndim != 4:
        return None
    return Pooling.apply(x, size)
