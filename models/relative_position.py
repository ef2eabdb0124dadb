"""Relative attention on maps: a learned bias for every offset between query and key, for maps of any size.

A table for maps of ``size`` = (H, W) is ``[(2H-1)(2W-1), heads]``: one number for each head and offset, row-major in
(y_query - y_key + H - 1, x_query - x_key + W - 1). Where a map differs from its table, the table is resampled
bilinearly, as CoAtNet's authors do to fine-tune at larger image sizes (https://arxiv.org/abs/2106.04803, appendix A.1).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import paddle
from paddle import nn

from errors import UserError
from models.layers import resize_position_embedding, trunc_normal_


class RelativePositionBias(nn.Layer):
    """A table for maps of ``size``; gives the bias of a map of any size, ``[num_heads, H·W, H·W]``."""

    def __init__(self, size: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        self.size = size
        self.relative_position_bias_table = self.create_parameter([table_rows(size), num_heads],
                                                                  default_initializer=trunc_normal_)

    def forward(self, height: int, width: int) -> paddle.Tensor:
        return relative_bias(self.relative_position_bias_table, self.size, height, width)


def table_rows(size: tuple[int, int]) -> int:
    """Return how many offsets there are between two positions of a map of ``size``."""
    return (2 * size[0] - 1) * (2 * size[1] - 1)


def relative_bias(table: paddle.Tensor, size: tuple[int, int], height: int, width: int) -> paddle.Tensor:
    """Return the bias of a ``height`` × ``width`` map, ``[heads, H·W, H·W]`` (query, key), of a table for ``size``."""
    if size != (height, width):
        table = resize_table(table, size, (height, width))
    index = paddle.to_tensor(_relative_index(height, width))
    return paddle.index_select(table.t(), index, axis=1).reshape([-1, height * width, height * width])


def resize_table(table: paddle.Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> paddle.Tensor:
    """Resample a table for maps of ``size`` to one for maps of ``new_size``."""
    grid = table.reshape([1, 2 * size[0] - 1, 2 * size[1] - 1, -1])
    return resize_position_embedding(grid, 2 * new_size[0] - 1, 2 * new_size[1] - 1).flatten(0, 2)


def resize_square_table(name: str, array: np.ndarray, new_size: tuple[int, int]) -> np.ndarray:
    """Resample the table ``name`` of a file, whose H and W nothing tells, to one for maps of ``new_size``.

    They are taken to be equal; raises UserError where that cannot be.
    """
    side = math.isqrt(len(array))
    if side * side != len(array) or side % 2 == 0:
        raise UserError(f"{name} has {len(array)} rows, expected {table_rows(new_size)}, and cannot be resized: it is "
                        "no table of a square image")
    side = (side + 1) // 2
    return resize_table(paddle.to_tensor(array), (side, side), new_size).numpy()


@functools.lru_cache(maxsize=32)
def _relative_index(height: int, width: int) -> np.ndarray:
    """Return int64 ``[(H·W)²]``: for each query and key the row of the table that holds their offset.

    A numpy array, not a buffer of a layer: ``Layer.to(dtype=...)`` would cast it.
    """
    y, x = (axis.reshape(-1) for axis in np.indices((height, width)))
    dy = y[:, None] - y[None, :] + height - 1
    dx = x[:, None] - x[None, :] + width - 1
    return (dy * (2 * width - 1) + dx).reshape(-1)
