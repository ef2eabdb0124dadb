"""The compiled convolutions as Paddle functions with gradients."""

from __future__ import annotations

import ctypes

import paddle
from paddle.autograd import PyLayer
from paddle.autograd.py_layer import once_differentiable

from kernels import build, products
from kernels.dispatch import run, usable
from kernels.geometry import Setting, Windows, windows
from kernels.tensors import empty


class Shape(ctypes.Structure):
    """Mirror of ``struct ConvolutionShape`` in ``convolution.h``."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("batch", "channels", "height", "width", "out_channels", "out_height", "out_width"),
            *("kernel_height", "kernel_width", "stride", "pad_top", "pad_left", "groups"),
        )
    )

    @classmethod
    def of(cls, x: paddle.Tensor, weight: paddle.Tensor, where: Windows, groups: int) -> Shape:
        """Return the shape of a convolution of ``x`` by ``weight``."""
        out, kernel = (weight.shape[0], *where.out), weight.shape[2:]
        return cls(*x.shape, *out, *kernel, where.stride, where.pad_top, where.pad_left, groups)


def convolve(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor | None,
    stride: Setting,
    padding: Setting,
    dilation: Setting,
    groups: int,
) -> paddle.Tensor | None:
    """Run the compiled operator; None where there is none for this call, or a mistake in it for Paddle to tell."""
    if not usable(x, weight, bias) or x.ndim != 4 or weight.ndim != 4:
        return None
    channels, outputs = x.shape[1], weight.shape[0]
    if weight.shape[1] * groups != channels or outputs % groups or (bias is not None and bias.shape != [outputs]):
        return None
    where = windows(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    if where is None:
        return None
    depthwise = groups == channels > 1 and outputs // groups <= build.library().lanes
    if (where.stride > 2 or not where.narrow) if depthwise else not products.available():
        return None
    operator = ("depthwise",) if depthwise else ("dense", products.address(products.current()))
    inputs = (x, weight) if bias is None else (x, weight, bias)
    return _Convolution.apply(*inputs, shape=Shape.of(x, weight, where, groups), operator=operator)


class _Convolution(PyLayer):
    @staticmethod
    def forward(ctx, x, weight, bias=None, *, shape, operator):
        x, weight = x.contiguous(), weight.contiguous()
        y = empty(shape.batch, shape.out_channels, shape.out_height, shape.out_width)
        name, *extra = operator
        offset = None if bias is None else bias.contiguous()
        run(f"{name}_forward", ctypes.addressof(shape), *extra, x, weight, offset, y)
        ctx.save_for_backward(x, weight)
        ctx.shape = shape
        ctx.operator = operator
        ctx.has_bias = bias is not None
        ctx.wanted = [item is not None and not item.stop_gradient for item in (x, weight, bias)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensor()
        shapes = (x.shape, weight.shape, weight.shape[:1])
        grads = [empty(*size) if wanted else None for size, wanted in zip(shapes, ctx.wanted, strict=True)]
        name, *extra = ctx.operator
        run(f"{name}_backward", ctypes.addressof(ctx.shape), *extra, x, weight, grad.contiguous(), *grads)
        return tuple(grads) if ctx.has_bias else tuple(grads[:2])
