"""The compiled depthwise convolution as a Paddle function with gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import paddle
from paddle.autograd import PyLayer
from paddle.autograd.py_layer import once_differentiable

from errors import UserError
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


@paddle.jit.not_to_static
def applicable(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor | None,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
) -> Shape | None:
    """Return the geometry of a call that the compiled operator takes; None for Paddle's operator to take it.

    Mixed precision needs no case of its own: Paddle has none on the CPU.

    Raises:
        UserError: when the kernel is larger than the padded map (Paddle returns a map of size -1).
    """
    if not paddle.in_dynamic_mode() or not paddle.get_device().startswith("cpu"):
        return None
    for tensor in (x, weight) if bias is None else (x, weight, bias):
        if tensor.dtype != paddle.float32 or not tensor.place.is_cpu_place():
            return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    shape = geometry(tuple(x.shape), tuple(weight.shape), *map(_setting, (stride, padding, dilation)))
    return None if shape is None or isinstance(build.library(), build.Unavailable) else shape


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
    if len(x) != 4 or len(weight) != 4 or weight[1] != 1 or weight[0] != x[1] or min(x + weight) < 1:
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
    @once_differentiable
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
