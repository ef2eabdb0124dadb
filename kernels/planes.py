"""Operators over the planes of channels-first maps, ``[B, C, H, W]``: ``planes.cc``."""

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
