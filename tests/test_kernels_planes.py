"""Dynamic ReLU against Paddle's own operators."""

# ruff: noqa: F811 (fixtures are imported, then asked for by name)
from __future__ import annotations

import numpy as np
import paddle
import pytest
from kernel_checks import compare, compiled, ours, own_cache  # noqa: F401

import kernels

SHAPES = [(2, 3, 5, 7), (64, 19, 1, 1), (5, 20, 4, 4), (3, 17, 40, 41)]


def arrays(shape, *more):
    draw = np.random.default_rng(0).standard_normal
    return {"x": 2 * draw(shape).astype("float32") + 1} | {name: draw(size).astype("float32") for name, size in more}


@compiled
@pytest.mark.parametrize("shape", SHAPES)
def test_dynamic_relu(shape, ours):
    def stock(x, first, second):
        return paddle.maximum(x * first.unsqueeze([2, 3]), x * second.unsqueeze([2, 3]))

    compare(stock, kernels.dynamic_relu, arrays(shape, ("first", shape[:2]), ("second", shape[:2])))
    assert ours() == 1
    with kernels.using("stock"):
        compare(stock, kernels.dynamic_relu, arrays(shape, ("first", shape[:2]), ("second", shape[:2])))
    assert ours() == 1
