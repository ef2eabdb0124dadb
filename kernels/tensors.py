"""Tensors without the cost of Paddle's Python: their sizes, and room for new ones."""

from __future__ import annotations

import math

import paddle
from paddle import _C_ops

_CPU = paddle.CPUPlace()


def numel(tensor: paddle.Tensor) -> int:
    """Return how many numbers a tensor has; ``tensor.size`` runs an operator to find out."""
    return math.prod(tensor.shape)


def empty(*like: int) -> paddle.Tensor:
    """Return an uninitialised float32 tensor of this shape on the CPU.

    ``paddle.empty`` looks at every argument for what it may be, which takes longer than a small operator.
    """
    return _C_ops.empty(like, paddle.float32, _CPU)
