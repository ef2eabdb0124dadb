"""The compiled filter in the frequency domain as a Paddle function with gradients."""

from __future__ import annotations

import paddle
from paddle.autograd import PyLayer
from paddle.autograd.py_layer import once_differentiable

from kernels.dispatch import run, usable
from kernels.tensors import empty


class Filter(PyLayer):
    """``Filter.apply(x, real, imag, scores)``: ``[B, H, W, C]`` by planes ``[H · (W // 2 + 1), K]``.

    ``scores`` is ``[B, K, C]``; left out where K = C.
    """

    @staticmethod
    def forward(ctx, x, real, imag, scores=None):
        inputs = [item.contiguous() for item in ((x, real, imag) if scores is None else (x, real, imag, scores))]
        y = empty(*x.shape)
        run("filter_forward", *x.shape, real.shape[1], *inputs, *([None] if scores is None else []), y)
        ctx.save_for_backward(*inputs)
        ctx.wanted = [not item.stop_gradient for item in inputs]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs = ctx.saved_tensor()
        missing = [None] * (4 - len(inputs))
        grads = [empty(*item.shape) for item in inputs]
        sizes = (*inputs[0].shape, inputs[1].shape[1])
        run("filter_backward", *sizes, *inputs, *missing, grad.contiguous(), *grads, *missing)
        return tuple(item if wanted else None for item, wanted in zip(grads, ctx.wanted, strict=True))


def filtered(
    x: paddle.Tensor, real: paddle.Tensor, imag: paddle.Tensor, scores: paddle.Tensor | None
) -> paddle.Tensor | None:
    """Run the compiled operator; None where there is none for this call."""
    if not usable(x, real, imag, scores) or x.ndim != 4 or real.ndim != 2:
        return None
    batch, height, width, channels = x.shape
    bins, planes = real.shape
    wanted = planes == channels if scores is None else scores.shape == [batch, planes, channels]
    if not wanted or imag.shape != real.shape or bins != height * (width // 2 + 1):
        return None
    return Filter.apply(*((x, real, imag) if scores is None else (x, real, imag, scores)))
