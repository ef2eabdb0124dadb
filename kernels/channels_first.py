"""Operators over channels-first maps, ``[B, C, H, W]``, each with Paddle's own behind it; ``kernels`` exports them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import kernels

if TYPE_CHECKING:
    import paddle


def dynamic_relu(x: paddle.Tensor, first: paddle.Tensor, second: paddle.Tensor) -> paddle.Tensor:
    """Return max(first · x, second · x): ``[B, C, H, W]`` with slopes ``[B, C]`` and ``[B, C]``."""
    if kernels.mode() == "auto":
        from kernels.planes import steepest

        y = steepest(x, first, second)
        if y is not None:
            return y
    from paddle.nn.functional import relu

    lower = x * second.unsqueeze([2, 3])
    # The backward pass of Paddle's maximum is several times as long on a CPU.
    return lower + relu(x * first.unsqueeze([2, 3]) - lower)
