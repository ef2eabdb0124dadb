"""Batch normalisation and dynamic ReLU against Paddle's own operators."""

# ruff: noqa: F811 (fixtures are imported, then asked for by name)
from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from kernel_checks import compare, compiled, ours, own_cache  # noqa: F401

import kernels

SHAPES = [(2, 3, 5, 7), (64, 19, 1, 1), (5, 20, 4, 4), (3, 17, 40, 41)]


def arrays(shape, *more):
    draw = np.random.default_rng(0).standard_normal
    return {"x": 2 * draw(shape).astype("float32") + 1} | {name: draw(size).astype("float32") for name, size in more}


@compiled
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_in_training(shape, ours):
    channels = shape[1]
    running = {}

    def moments(name, like):
        return running.setdefault((name, like.dtype), [paddle.full([channels], 0.3, like.dtype),
                                                       paddle.full([channels], 1.7, like.dtype)])

    def stock(x, weight, bias):
        return F.batch_norm(x, *moments("stock", x), weight, bias, training=True, momentum=0.8, epsilon=1e-3)

    def own(x, weight, bias):
        return kernels.batch_norm(x, weight, bias, *moments("own", x), training=True, momentum=0.8, epsilon=1e-3)

    compare(stock, own, arrays(shape, ("weight", channels), ("bias", channels)))
    assert ours() == 1
    for want, got in zip(running["stock", paddle.float64], running["own", paddle.float32], strict=True):
        np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-6, atol=1e-6)


@compiled
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_in_evaluation(shape, ours):
    rng = np.random.default_rng(1)
    mean, variance = (paddle.to_tensor(rng.random(shape[1]).astype("float32") + 0.1) for _ in range(2))
    values = [paddle.to_tensor(item) for item in arrays(shape, ("weight", shape[1]), ("bias", shape[1])).values()]
    want = F.batch_norm(values[0], mean, variance, *values[1:])
    before = mean.numpy(), variance.numpy()
    np.testing.assert_allclose(kernels.batch_norm(*values, mean, variance).numpy(), want.numpy(), rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal([mean.numpy(), variance.numpy()], before)
    values[0].stop_gradient = False  # gradients in evaluation are Paddle's
    assert not kernels.batch_norm(*values, mean, variance).stop_gradient


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
