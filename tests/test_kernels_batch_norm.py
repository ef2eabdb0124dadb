"""The compiled batch norm, and what it does of its neighbours' work, against Paddle's own operators."""

# ruff: noqa: F811 (fixtures are imported, then asked for by name)
from __future__ import annotations

import numpy as np
import paddle
import pytest
from kernel_checks import (  # noqa: F401
    assert_threads_change_no_bit,
    compare,
    compiled,
    ours,
    own_cache,
    with_gradients,
)

import kernels
from models.layers import NormAct

SHAPES = [(2, 3, 5, 7), (5, 7, 1, 1), (6, 9), (4, 37, 2, 2), (64, 19, 4, 4), (3, 17, 40, 41), (1, 6, 12, 13)]
ACTIVATIONS = [(None, None), ("gelu", None), ("relu", None), (None, "gelu"), (None, "relu6"), (None, "hardswish")]


def draw(shape, *names):
    generator = np.random.default_rng(0)
    values = {"x": 2 * generator.standard_normal(shape).astype("float32") + 3}
    sizes = {name: shape if name == "residual" else shape[1:2] for name in names}
    return values | {name: generator.standard_normal(size).astype("float32") for name, size in sizes.items()}


def operator(names, training=True, after_call=lambda mean, variance: None, **settings):
    """The norm as a function of x and the tensors of these names, with running statistics of its own each time."""
    def call(x, *given):
        channels = x.shape[1]
        mean, variance = (paddle.linspace(low, 2.0, channels).astype(x.dtype) for low in (-1.0, 0.5))
        share = paddle.to_tensor(np.arange(x.shape[0]) % 3, dtype=x.dtype).reshape([-1] + [1] * (x.ndim - 1))
        tensors = dict(zip(names, given, strict=True)) | ({"share": share} if names else {})
        y = kernels.batch_norm(x, mean, variance, training=training, **settings, **tensors)
        after_call(mean, variance)
        return y

    return call


def stock(function):
    def call(*arguments):
        with kernels.using("stock"):
            return function(*arguments)

    return call


@compiled
@pytest.mark.parametrize("names", [(), ("weight", "bias", "residual")], ids=["plain", "all"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(("before", "after"), ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm(shape, before, after, training, names, ours):
    call = operator(names, training, before=before, after=after)
    compare(stock(call), call, draw(shape, *names), small=2e-6)
    assert ours() == 1


@compiled
@pytest.mark.parametrize("shape", SHAPES)
def test_running_statistics(shape, ours):
    x, found = draw(shape)["x"], []
    for dtype in ("float64", "float32"):
        call = operator((), momentum=0.7, before="gelu", after_call=lambda *stats: found.append(stats))
        call(paddle.to_tensor(x, dtype=dtype))
    for exact, own in zip(*found, strict=True):
        np.testing.assert_allclose(own.numpy(), exact.numpy(), rtol=3e-6, atol=1e-6)
    assert ours() == 1


@compiled
def test_no_digits_cancel(ours):
    """A mean of a thousand deviations, and a first image unlike the others."""
    x = np.random.default_rng(0).standard_normal((8, 3, 9, 9)).astype("float32") + 1000
    for first in (1000, 0, -5000):
        x[0] += first - x[0].mean()
        exact = x.astype("float64")
        expected = (exact - exact.mean((0, 2, 3), keepdims=True)) / exact.std((0, 2, 3), keepdims=True)
        found = kernels.batch_norm(paddle.to_tensor(x), paddle.zeros([3]), paddle.ones([3]), training=True, epsilon=0.0)
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-4)
    same = kernels.batch_norm(paddle.full([4, 2, 3, 3], 0.1), paddle.zeros([2]), paddle.ones([2]), training=True)
    assert float(same.abs().max()) < 1e-4
    assert ours() == 4


@compiled
@pytest.mark.parametrize("shape", [(9, 24, 40, 41), (70, 300, 2, 2), (2, 4, 150, 150)])
def test_threads_change_no_bit(shape):
    values = draw(shape, "weight", "bias", "residual")
    call = operator(tuple(values)[1:], before="gelu")
    assert_threads_change_no_bit(lambda: with_gradients(call, values.values()))


@compiled
def test_only_wanted_gradients_and_views(ours):
    names = ("weight", "bias", "residual")
    values = list(draw((4, 6, 5, 7), *names).values())
    call = operator(names, after="gelu")
    everything = None
    for wanted in (range(4), *([i] for i in range(4))):
        inputs = [paddle.to_tensor(item, stop_gradient=number not in wanted) for number, item in enumerate(values)]
        y = call(*inputs)
        y.backward(paddle.cos(y.detach()))
        everything = everything or [item.grad.numpy() for item in inputs]
        assert [item.grad is not None for item in inputs] == [number in wanted for number in range(4)]
        for number in wanted:
            np.testing.assert_array_equal(inputs[number].grad.numpy(), everything[number])
    view = paddle.to_tensor(values[0].transpose(3, 2, 1, 0)).transpose([3, 2, 1, 0])
    np.testing.assert_array_equal(call(view, *map(paddle.to_tensor, values[1:])).numpy(), y.numpy())
    assert ours() == 6


def test_paddle_takes_the_others(ours):
    call = operator(("weight", "bias", "residual"), before="gelu")
    arguments = [paddle.to_tensor(item) for item in draw((4, 6, 5, 7), "weight", "bias", "residual").values()]
    double = call(*(item.astype("float64") for item in arguments))
    with kernels.using("stock"):
        single = call(*arguments)
    both = kernels.batch_norm(arguments[0], paddle.zeros([6]), paddle.ones([6]), before="relu6", after="relu")

    def named(x, weight, bias, residual):
        return call(x, weight, bias, residual)

    static = paddle.jit.to_static(named, full_graph=True)(*arguments)
    assert ours() == 0 and double.dtype == paddle.float64
    for found in (single, static):
        np.testing.assert_allclose(found.numpy(), double.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(both.numpy(), arguments[0].numpy().clip(0, 6), rtol=1e-5)


def test_residual_gradient_is_its_own():
    """Whoever keeps the gradient of the result sees that one, though the residual's goes on to be summed."""
    x = paddle.randn([2, 6, 3, 3])
    x.stop_gradient = False
    hidden = x * 2
    y = NormAct(6)(hidden * 3, residual=hidden)
    y.retain_grads()
    y.backward(paddle.full_like(y, 5.0))
    assert bool((y.grad == 5.0).all())
