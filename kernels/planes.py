"""Operators over the planes of channels-first maps, ``[B, C, H, W]``, and transposition: ``planes.cc``."""

from __future__ import annotations

import paddle
from paddle.nn import functional as F

from kernels.dispatch import compiled, run


def dynamic_relu(x: paddle.Tensor, first: paddle.Tensor, second: paddle.Tensor) -> paddle.Tensor:
    """Return max(first · x, second · x): ``[B, C, H, W]`` with slopes ``[B, C]`` and ``[B, C]``."""
    if compiled(x, first, second):
        return run("dynamic_relu", x, first, second)
    lower = x * second.unsqueeze([2, 3])
    # The backward pass of Paddle's maximum is several times as long on a CPU.
    return lower + F.relu(x * first.unsqueeze([2, 3]) - lower)


def channel_shuffle(x: paddle.Tensor, groups: int) -> paddle.Tensor:
    """Return ``paddle.nn.functional.channel_shuffle``: ``[B, C, H, W]``, C a multiple of ``groups``."""
    return run("channel_shuffle", x, groups) if compiled(x) else F.channel_shuffle(x, groups)


def average_pool(x: paddle.Tensor, size: int) -> paddle.Tensor:
    """Return means of windows of ``size`` × ``size`` positions side by side: ``[B, C, ⌈H / size⌉, ⌈W / size⌉]``.

    Windows at the border are smaller where ``size`` does not divide the map; 2 is compiled.
    """
    return run("average_pool", x) if size == 2 and compiled(x) else F.avg_pool2d(x, size, ceil_mode=True)


def channels_last(x: paddle.Tensor) -> paddle.Tensor:
    """Return ``[B, C, H, W]`` as ``[B, H, W, C]``."""
    return run("move_channels", x, True) if compiled(x) and x.is_contiguous() else x.transpose([0, 2, 3, 1])


def channels_first(x: paddle.Tensor) -> paddle.Tensor:
    """Return ``[B, H, W, C]`` as ``[B, C, H, W]``."""
    return run("move_channels", x, False) if compiled(x) and x.is_contiguous() else x.transpose([0, 3, 1, 2])
