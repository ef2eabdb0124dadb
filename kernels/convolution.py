"""Convolutions of two axes: ``convolution.cc``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import paddle
from paddle.nn import functional as F

from errors import UserError
from kernels import build, rounds_to_bfloat16
from kernels.dispatch import compiled, run

Setting = int | str | Sequence[int]
"""A stride, padding or dilation as users write it."""


def conv2d(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> paddle.Tensor:
    """Convolve as ``paddle.nn.functional.conv2d``; compiled are dense, grouped and depthwise convolutions.

    On the CPU it has first derivatives only, like Paddle's own.

    Args:
        x: ``[B, C, H, W]``.
        weight: ``[C', C / groups, kh, kw]``.
        bias: ``[C']`` or None.
        stride: one step, or ``(vertical, horizontal)``; compiled for equal ones, depthwise for 1 and 2.
        padding: zeros around the map: one number, ``(vertical, horizontal)``, ``(top, bottom, left, right)``,
            ``"VALID"`` or ``"SAME"``.
        dilation: distance of the taps; other than 1 is left to Paddle.
        groups: groups of channels.

    Returns:
        ``[B, C', H', W']``, in the precision of ``x``.

    Raises:
        UserError: when the kernel is larger than the padded map (compiled operator; Paddle's returns a size of -1).
    """
    settings = _settings(x, weight, stride, padding, dilation, groups) if compiled(x, weight, bias) else None
    if settings is not None:
        return run("conv2d", x, weight, bias, *settings, not x.stop_gradient, not weight.stop_gradient)
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    # Paddle adds a bias as [1, C', 1, 1], which its broadcast on the CPU takes up to ten times as long for.
    return y if bias is None else y + bias.reshape([-1, 1, 1])


def _settings(x: paddle.Tensor, weight: paddle.Tensor, stride: Setting, padding: Setting, dilation: Setting,
              groups: int) -> tuple[int | bool, ...] | None:
    """Return the attributes of the compiled operator; None where it does not apply."""
    where = _windows(tuple(x.shape[2:]), tuple(weight.shape[2:]), *map(_hashable, (stride, padding, dilation)))
    if where is None:
        return None
    *out, step, top, left, narrow = where
    depthwise = groups == x.shape[1] > 1 and weight.shape[0] // groups <= build.library().lanes
    if (step > 2 or not narrow) if depthwise else not build.library().onednn:
        return None
    bfloat16 = rounds_to_bfloat16() and not depthwise
    return *out, step, top, left, groups, depthwise, bfloat16


def _hashable(value: Setting) -> int | str | tuple[int, ...] | None:
    """Return a hashable form, None for the rarer ones that Paddle knows."""
    if isinstance(value, (int, str)):
        return value
    return tuple(value) if all(isinstance(item, int) for item in value) else None


@lru_cache(maxsize=1024)
def _windows(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: int | tuple[int, ...] | None,
    padding: int | str | tuple[int, ...] | None,
    dilation: int | tuple[int, ...] | None,
) -> tuple[int, int, int, int, int, bool] | None:
    """Return where the windows of ``kernel`` (height, width) lie on a map of ``size``; None where Paddle is to do it.

    That is: height and width of the result, stride, padding above and to the left, and whether every padding is
    smaller than its kernel.
    """
    if isinstance(stride, tuple) and len(set(stride)) == 1 and len(stride) == 2:
        stride = stride[0]
    if not isinstance(stride, int) or stride < 1 or dilation not in {1, (1, 1)}:
        return None
    pads = _pads(padding, size, kernel, stride)
    if pads is None or min(*pads[0], *pads[1]) < 0:
        return None
    padded = [length + sum(pad) for length, pad in zip(size, pads, strict=True)]
    if padded[0] < kernel[0] or padded[1] < kernel[1]:
        raise UserError(
            f"A convolution got a {size[0]}×{size[1]} map, which with padding {padding} is smaller than its "
            f"{kernel[0]}×{kernel[1]} kernel; use larger images or a smaller kernel."
        )
    out = ((length - side) // stride + 1 for length, side in zip(padded, kernel, strict=True))
    narrow = max(pads[0]) < kernel[0] and max(pads[1]) < kernel[1]
    return *out, stride, pads[0][0], pads[1][0], narrow


def _pads(
    padding: int | str | tuple[int, ...] | None, size: tuple[int, ...], kernel: tuple[int, ...], stride: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return ``((top, bottom), (left, right))``."""
    if padding in {"VALID", "SAME"}:
        needed = ((-(-n // stride) - 1) * stride + k - n for n, k in zip(size, kernel, strict=True))
        totals = [max(total, 0) if padding == "SAME" else 0 for total in needed]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    if isinstance(padding, tuple) and len(padding) in {2, 4}:
        return (padding[:2], padding[2:]) if len(padding) == 4 else ((padding[0],) * 2, (padding[1],) * 2)
    return None
