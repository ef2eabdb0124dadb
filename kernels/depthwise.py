"""The compiled depthwise convolution as a Paddle function with gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import paddle
from paddle.autograd import PyLayer
from paddle.base import core, framework

from kernels import build


class Shape(ctypes.Structure):
    """Mirror of ``struct Shape`` in ``depthwise.cc``."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("batch", "channels", "height", "width", "out_height", "out_width"),
            *("kernel_height", "kernel_width", "stride", "pad_top", "pad_left"),
        )
    )


def applicable(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor | None,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
) -> Shape | None:
    """Return the geometry of a call that the compiled operator takes; None for Paddle's operator to take it.

    Calls with mistakes in them are left to Paddle as well, whose messages users know.
    """
    if not paddle.in_dynamic_mode() or framework._dygraph_tracer()._amp_level != core.AmpLevel.O0:
        return None
    for tensor in (x, weight) if bias is None else (x, weight, bias):
        if tensor.dtype != paddle.float32 or not tensor.place.is_cpu_place():
            return None
    if not framework._current_expected_place_().is_cpu_place():  # where the result would be made
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    settings = (item if isinstance(item, (int, str)) else tuple(item) for item in (stride, padding, dilation))
    shape = geometry(tuple(x.shape), tuple(weight.shape), *settings)
    return None if shape is None or isinstance(build.library(), build.Unavailable) else shape


@lru_cache(maxsize=1024)
def geometry(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    stride: int | tuple[int, ...],
    padding: int | str | tuple[int, ...],
    dilation: int | tuple[int, ...],
) -> Shape | None:
    """Return the sizes of a convolution of ``x`` by ``weight`` (shapes), None where the operator has no such."""
    stride, dilation = _pair(stride), _pair(dilation)
    if len(x) != 4 or len(weight) != 4 or weight[1] != 1 or weight[0] != x[1] or dilation != (1, 1):
        return None
    if stride is None or stride[0] != stride[1] or stride[0] < 1 or min(x + weight) < 1:
        return None
    pads = _pads(padding, x[2:], weight[2:], stride[0])
    if pads is None:
        return None
    sizes = []
    for size, kernel, (before, after) in zip(x[2:], weight[2:], pads, strict=True):
        out = (size + before + after - kernel) // stride[0] + 1
        if not (0 <= before < kernel and 0 <= after < kernel) or out < 1:
            return None
        sizes.append(out)
    return Shape(*x, *sizes, *weight[2:], stride[0], pads[0][0], pads[1][0])


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...] | None:
    pair = (value, value) if isinstance(value, int) else value
    return pair if len(pair) == 2 and all(isinstance(item, int) for item in pair) else None


def _pads(
    padding: int | str | tuple[int, ...], size: tuple[int, ...], kernel: tuple[int, ...], stride: int
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return ``((top, bottom), (left, right))`` of what Paddle's ``padding`` means, None where it is unknown."""
    if isinstance(padding, str):
        if padding.upper() == "VALID":
            return (0, 0), (0, 0)
        if padding.upper() != "SAME":
            return None
        totals = [max((-(-n // stride) - 1) * stride + k - n, 0) for n, k in zip(size, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    if not all(isinstance(item, int) for item in padding):
        return None
    if len(padding) == 2:
        return (padding[0], padding[0]), (padding[1], padding[1])
    return (padding[:2], padding[2:]) if len(padding) == 4 else None


def convolve(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None, shape: Shape) -> paddle.Tensor:
    """Run the compiled operator on float32 CPU tensors of this geometry (see :func:`applicable`)."""
    if bias is None:
        return _Convolution.apply(x, weight, shape=shape)
    return _Convolution.apply(x, weight, bias, shape=shape)


class _Convolution(PyLayer):
    @staticmethod
    def forward(ctx, x, weight, bias=None, *, shape):
        x, weight = x.contiguous(), weight.contiguous()
        y = paddle.empty([shape.batch, shape.channels, shape.out_height, shape.out_width], dtype="float32")
        bias_pointer = None if bias is None else bias.contiguous().data_ptr()
        _run(
            build.library().depthwise_forward,
            *(shape, x.data_ptr(), weight.data_ptr(), bias_pointer, y.data_ptr()),
        )
        ctx.save_for_backward(x, weight)
        ctx.shape = shape
        ctx.has_bias = bias is not None
        ctx.wanted = [item is not None and not item.stop_gradient for item in (x, weight, bias)]
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensor()
        grad = grad.contiguous()
        shapes = (x.shape, weight.shape, weight.shape[:1])
        grads = [
            paddle.empty(size, dtype="float32") if wanted else None
            for size, wanted in zip(shapes, ctx.wanted, strict=True)
        ]
        pointers = [None if item is None else item.data_ptr() for item in grads]
        _run(
            build.library().depthwise_backward,
            *(ctx.shape, x.data_ptr(), weight.data_ptr(), grad.data_ptr(), *pointers),
        )
        return tuple(grads) if ctx.has_bias else tuple(grads[:2])


def _run(function, shape: Shape, *pointers: int | None) -> None:
    if function(ctypes.byref(shape), *pointers):
        raise MemoryError("The depthwise convolution found no memory for its scratch planes.")
