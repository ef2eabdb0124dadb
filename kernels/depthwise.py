"""The compiled depthwise convolution as a Paddle function with gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import paddle
from paddle.autograd import PyLayer
from paddle.autograd.py_layer import once_differentiable

from errors import UserError
from kernels.dispatch import empty, run, usable


class Shape(ctypes.Structure):
    """Mirror of ``struct Shape`` in ``depthwise.cc``."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("batch", "channels", "height", "width", "out_height", "out_width"),
            *("kernel_height", "kernel_width", "stride", "pad_top", "pad_left"),
        )
    )

    @property
    def pointer(self) -> int:
        """The address, as long as this object lives."""
        return ctypes.addressof(self)


def applicable(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor | None,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
) -> Shape | None:
    """Return the geometry of a call that the compiled operator takes; None for Paddle's operator to take it.

    Raises:
        UserError: when the kernel is larger than the padded map (Paddle returns a map of size -1).
    """
    if not usable(x, weight, bias):
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    return geometry(tuple(x.shape), tuple(weight.shape), *map(_setting, (stride, padding, dilation)))


def _setting(value: int | str | Sequence[int]) -> int | str | tuple[int, ...] | None:
    """Return a hashable form of a stride, padding or dilation; None for other forms that Paddle knows."""
    if isinstance(value, (int, str)):
        return value
    return tuple(value) if all(isinstance(item, int) for item in value) else None


@lru_cache(maxsize=1024)
def geometry(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    stride: int | tuple[int, ...] | None,
    padding: int | str | tuple[int, ...] | None,
    dilation: int | tuple[int, ...] | None,
) -> Shape | None:
    """Return the sizes of a convolution of ``x`` by ``weight`` (shapes); None where the operator has no such."""
    if len(x) != 4 or len(weight) != 4 or weight[1] != 1 or weight[0] != x[1]:
        return None
    step = stride[0] if stride in {(1, 1), (2, 2)} else stride
    if step not in {1, 2} or dilation not in {1, (1, 1)}:
        return None
    pads = _pads(padding, x[2:], weight[2:], step)
    if pads is None:
        return None
    sizes = []
    for size, kernel, (before, after) in zip(x[2:], weight[2:], pads, strict=True):
        if not (0 <= before < kernel and 0 <= after < kernel):
            return None
        if size + before + after < kernel:
            raise UserError(
                f"A depthwise convolution got a {x[2]}×{x[3]} map, which with padding {padding} is smaller than its "
                f"{weight[2]}×{weight[3]} kernel; use larger images or a smaller kernel."
            )
        sizes.append((size + before + after - kernel) // step + 1)
    return Shape(*x, *sizes, *weight[2:], step, pads[0][0], pads[1][0])


def _pads(
    padding: int | str | tuple[int, ...] | None, size: tuple[int, ...], kernel: tuple[int, ...], stride: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return ``((top, bottom), (left, right))`` of what Paddle's ``padding`` means; None for rarer forms."""
    if padding in {"VALID", "SAME"}:
        needed = ((-(-n // stride) - 1) * stride + k - n for n, k in zip(size, kernel, strict=True))
        totals = [max(total, 0) if padding == "SAME" else 0 for total in needed]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    if isinstance(padding, tuple) and len(padding) in {2, 4}:
        return (padding[:2], padding[2:]) if len(padding) == 4 else ((padding[0],) * 2, (padding[1],) * 2)
    return None


def convolve(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None, shape: Shape) -> paddle.Tensor:
    """Run the compiled operator on float32 CPU tensors of this geometry (see :func:`applicable`)."""
    if bias is None:
        return _Convolution.apply(x, weight, shape=shape)
    return _Convolution.apply(x, weight, bias, shape=shape)


class _Convolution(PyLayer):
    @staticmethod
    def forward(ctx, x, weight, bias=None, *, shape):
        x, weight = x.contiguous(), weight.contiguous()
        y = empty(shape.batch, shape.channels, shape.out_height, shape.out_width)
        run("depthwise_forward", shape.pointer, x, weight, None if bias is None else bias.contiguous(), y)
        ctx.save_for_backward(x, weight)
        ctx.shape = shape
        ctx.has_bias = bias is not None
        ctx.wanted = [item is not None and not item.stop_gradient for item in (x, weight, bias)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensor()
        shapes = (x.shape, weight.shape, weight.shape[:1])
        grads = [empty(*size) if wanted else None for size, wanted in zip(shapes, ctx.wanted, strict=True)]
        run("depthwise_backward", ctx.shape.pointer, x, weight, grad.contiguous(), *grads)
        return tuple(grads) if ctx.has_bias else tuple(grads[:2])

