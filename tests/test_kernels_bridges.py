"""The compiled attention between tokens and maps against Paddle's operators."""

# ruff: noqa: F811 (fixtures are imported, then asked for by name)

from __future__ import annotations

import numpy as np
import paddle
import pytest
from kernel_checks import assert_threads_change_no_bit, compare, compiled, ours, own_cache, with_gradients  # noqa: F401

import kernels

SIZES = [  # images, heads, tokens, width of a head, height, width of the map
    (3, 2, 3, 6, 8, 8), (2, 4, 6, 10, 7, 7), (2, 1, 1, 5, 1, 1), (3, 2, 4, 16, 2, 2), (1, 2, 5, 8, 14, 15),
    (2, 3, 9, 17, 4, 5), (2, 2, 6, 6, 28, 28),
]


def _values(size: tuple[int, ...], count: int, scale: float = 1.0) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    batch, heads, tokens, width, *sides = size
    x = scale * rng.standard_normal((batch, heads * width, *sides))
    return x, [scale * rng.standard_normal((batch, tokens, heads * width)) for _ in range(count)]


def _stock(function):
    def call(*inputs):
        with kernels.using("stock"):
            return function(*inputs)
    return call


@compiled
@pytest.mark.parametrize("size", SIZES)
def test_tokens_that_ask_a_map(size, ours) -> None:
    def function(query, x):
        return kernels.attend_map(query, x, size[1])

    x, (query,) = _values(size, 1)
    compare(_stock(function), function, {"query": query, "x": x}, 2e-6)
    assert ours() == 1


@compiled
@pytest.mark.parametrize("size", SIZES)
def test_a_map_that_asks_tokens(size, ours) -> None:
    def function(x, key, value):
        return kernels.attend_tokens(x, key, value, size[1])

    x, (key, value) = _values(size, 2)
    compare(_stock(function), function, {"x": x, "key": key, "value": value}, 2e-6)
    assert ours() == 1


@compiled
def test_large_logits_stay_finite() -> None:
    x, (query, value) = _values((2, 2, 3, 6, 5, 7), 2, 30.0)
    for results in (with_gradients(lambda *t: kernels.attend_map(*t, 2), [query, x]),
                    with_gradients(lambda *t: kernels.attend_tokens(*t, 2), [x, query, value])):
        assert all(np.isfinite(item).all() for item in results)


@compiled
def test_strided_inputs_and_gradients_that_nobody_wants(ours) -> None:
    x, (query, value) = (paddle.to_tensor(item, "float32") if isinstance(item, np.ndarray) else
                         [paddle.to_tensor(each, "float32") for each in item]
                         for item in _values((2, 2, 3, 6, 4, 4), 2))
    query.stop_gradient = False
    turned = x.transpose([0, 2, 3, 1]).contiguous().transpose([0, 3, 1, 2])
    found = [kernels.attend_map(query, turned, 2), kernels.attend_tokens(turned, query, value, 2)]
    sum(item.sum() for item in found).backward()
    assert x.grad is None and query.grad is not None and ours() == 2
    with kernels.using("stock"):
        for got, want in zip(found, [kernels.attend_map(query, x, 2), kernels.attend_tokens(x, query, value, 2)],
                             strict=True):
            np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-5, atol=1e-5)


@compiled
def test_dropout_and_float64_are_left_to_paddle(ours) -> None:
    x, (query,) = _values((2, 2, 3, 6, 4, 4), 1)
    single = [paddle.to_tensor(item, "float32") for item in (query, x)]
    double = [paddle.to_tensor(item) for item in (query, x)]
    paddle.seed(0)
    dropped = kernels.attend_map(*single, 2, dropout=0.5)
    exact = kernels.attend_map(*double, 2)
    assert ours() == 0
    np.testing.assert_allclose(kernels.attend_map(*single, 2).numpy(), exact.numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(dropped.numpy() - exact.numpy()).max() > 0.1


@compiled
def test_threads_change_no_bit() -> None:
    x, (key, value) = _values((4, 2, 3, 12, 28, 28), 2)
    assert_threads_change_no_bit(lambda: [
        *with_gradients(lambda *t: kernels.attend_map(*t, 2), [key, x]),
        *with_gradients(lambda *t: kernels.attend_tokens(*t, 2), [x, key, value])])
