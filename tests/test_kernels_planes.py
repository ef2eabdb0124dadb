"""Dynamic ReLU and the channel shuffle against Paddle's own operators."""

# ruff: noqa: F811 (fixtures are imported, then asked for by name)
from __future__ import annotations

import numpy as np
import paddle
import pytest
from kernel_checks import compare, compiled, ours, own_cache  # noqa: F401

import kernels
from kernels import dispatch, planes

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


@compiled
@pytest.mark.parametrize(("shape", "groups"), [((2, 6, 5, 7), 3), ((64, 20, 1, 1), 4), ((3, 18, 40, 41), 2),
                                               ((3, 5, 2, 2), 5), ((3, 5, 2, 2), 1)])
def test_channel_shuffle(shape, groups, monkeypatch):
    calls = []
    monkeypatch.setattr(planes, "run", lambda *arguments: calls.append(arguments[0]) or dispatch.run(*arguments))
    x, grad = (paddle.to_tensor(array) for array in (arrays(shape)["x"], arrays(shape)["x"][::-1].copy()))
    found = []
    for mode in kernels.MODES:
        x.stop_gradient = False
        with kernels.using(mode):
            y = kernels.channel_shuffle(x, groups)
        y.backward(grad)
        found.append((y.numpy(), x.grad.numpy()))
        x.clear_grad()
    assert calls == ["channel_shuffle"] * 2
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])
