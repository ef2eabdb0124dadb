"""The compiled convolutions against Paddle's own: values, gradients, and which calls they take."""

# ruff: noqa: F811 (fixtures are imported, then asked for by name)
from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from kernel_checks import compare, compiled, ours, own_cache, with_gradients  # noqa: F401

import kernels
from errors import UserError

# [B, C, H, W], (kh, kw), stride, padding
GRID = [
    ((2, 3, 4, 4), (3, 3), 1, 1),
    ((33, 48, 4, 4), (3, 3), 1, 1),
    ((3, 17, 1, 1), (3, 3), 1, 1),
    ((2, 40, 2, 2), (3, 3), 1, 1),
    ((2, 16, 5, 3), (7, 11), 1, (3, 5)),
    ((2, 20, 7, 9), (3, 5), 2, (1, 2)),
    ((20, 33, 14, 14), (3, 3), 2, 1),
    ((2, 33, 112, 96), (3, 3), 2, 1),
    ((1, 16, 111, 57), (3, 3), 1, 1),
    ((2, 18, 30, 28), (9, 9), 1, 4),
    ((1, 18, 56, 56), (11, 11), 2, 5),
    ((2, 18, 20, 16), (5, 5), 2, (1, 2, 2, 1)),
    ((2, 18, 15, 14), (5, 5), 2, "SAME"),
    ((2, 18, 15, 14), (5, 5), 1, "SAME"),
    ((2, 18, 15, 14), (3, 3), 2, "VALID"),
    ((2, 5, 70, 300), (3, 3), 1, 2),
    ((1, 7, 70, 300), (3, 7), 2, 0),
    ((2, 9, 6, 6), (1, 1), 1, 0),
]


def arrays(shape, kernel):
    draw = np.random.default_rng(0).standard_normal
    return [draw(size).astype("float32") for size in (shape, (shape[1], 1, *kernel), shape[1:2])]


@compiled
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), GRID)
def test_parity_with_paddle(shape, kernel, stride, padding, bias, ours):
    def stock(x, weight, bias=None):
        return F.conv2d(x, weight, bias, stride, padding, groups=shape[1])

    def own(x, weight, bias=None):
        return kernels.depthwise_conv2d(x, weight, bias, stride, padding)

    names = ("x", "weight", "bias") if bias else ("x", "weight")
    compare(stock, own, dict(zip(names, arrays(shape, kernel), strict=False)))
    assert ours() == 1


@compiled
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("shape", "out", "kernel", "stride", "padding"), [
    ((3, 5, 9, 8), 7, (3, 3), 2, 1),
    ((2, 5, 70, 90), 7, (5, 5), 1, 2),
    ((70, 12, 4, 4), 20, (3, 3), 2, 1),
    ((40, 12, 2, 2), 20, (3, 3), 1, 1),
    ((2, 3, 33, 35), 8, (7, 7), 7, 0),
    ((2, 3, 32, 48), 20, (16, 16), 16, 0),
    ((2, 3, 30, 31), 6, (3, 5), 2, "SAME"),
    ((1, 4, 9, 9), 6, (3, 3), 1, (0, 5, 4, 1)),
    ((1, 4, 100, 130), 6, (2, 2), 1, "VALID"),
    ((33, 20, 7, 7), 40, (1, 1), 1, 0),
    ((2, 20, 70, 80), 4, (1, 1), 1, 0),
    ((3, 20, 7, 7), 40, (1, 1), 2, 0),
    ((3, 4, 5, 5), 6, (1, 1), 1, 1),
])
def test_dense_parity_with_paddle(shape, out, kernel, stride, padding, bias, ours):
    draw = np.random.default_rng(0).standard_normal
    sizes = {"x": shape, "weight": (out, shape[1], *kernel), "bias": (out,)}
    compare(
        lambda x, weight, bias=None: F.conv2d(x, weight, bias, stride, padding),
        lambda x, weight, bias=None: kernels.conv2d(x, weight, bias, stride, padding),
        {name: draw(size).astype("float32") for name, size in sizes.items() if bias or name != "bias"},
    )
    assert ours() == 1


@compiled
@pytest.mark.parametrize(("shape", "multiplier", "groups", "kernel", "stride", "padding"), [
    ((2, 8, 9, 7), 3, 8, 3, 1, 1),
    ((3, 20, 6, 5), 6, 20, 3, 2, 1),
    ((2, 36, 12, 11), 4, 36, 5, 2, 2),
    ((2, 8, 5, 5), 17, 8, 3, 1, 1),
    ((1, 7, 70, 130), 2, 7, 3, 1, 1),
    ((5, 12, 6, 6), 3, 4, 1, 1, 0),
    ((3, 16, 20, 20), 1, 4, 1, 1, 0),
    ((2, 12, 9, 9), 2, 3, 3, 2, 1),
])
def test_groups_parity_with_paddle(shape, multiplier, groups, kernel, stride, padding, ours):
    draw = np.random.default_rng(0).standard_normal
    out = multiplier * shape[1]
    sizes = {"x": shape, "weight": (out, shape[1] // groups, kernel, kernel), "bias": (out,)}
    settings = (stride, padding, 1, groups)
    compare(
        lambda *tensors: F.conv2d(*tensors, *settings),
        lambda *tensors: kernels.conv2d(*tensors, *settings),
        {name: draw(size).astype("float32") for name, size in sizes.items()},
    )
    assert ours() == 1


@compiled
def test_only_wanted_gradients(ours):
    x, weight, bias = map(paddle.to_tensor, arrays((2, 20, 6, 6), (3, 3)))
    with paddle.no_grad():
        assert kernels.depthwise_conv2d(x, weight, bias, 1, 1).stop_gradient
    assert kernels.depthwise_conv2d(x, weight, bias, 1, 1).stop_gradient
    everything = with_gradients(lambda *a: kernels.depthwise_conv2d(*a, 1, 1), arrays((2, 20, 6, 6), (3, 3)))[1:]
    grad = np.random.default_rng(1).standard_normal(x.shape).astype("float32")
    for wanted in range(3):
        inputs = [item.detach() for item in (x, weight, bias)]
        inputs[wanted].stop_gradient = False
        kernels.depthwise_conv2d(*inputs, 1, 1).backward(paddle.to_tensor(grad))
        assert [item.grad is not None for item in inputs] == [number == wanted for number in range(3)]
        np.testing.assert_array_equal(inputs[wanted].grad.numpy(), everything[wanted])
    assert ours() == 6


@compiled
def test_gradients_accumulate_and_layouts(ours):
    x, weight, bias = map(paddle.to_tensor, arrays((3, 20, 6, 5), (3, 3)))
    weight.stop_gradient = False
    once = kernels.depthwise_conv2d(x, weight, bias, 1, 1)
    once.sum().backward()
    first = weight.grad.numpy().copy()
    kernels.depthwise_conv2d(x, weight, bias, 1, 1).sum().backward()
    np.testing.assert_array_equal(weight.grad.numpy(), 2 * first)
    turned = paddle.to_tensor(x.numpy().transpose(0, 2, 3, 1)).transpose([0, 3, 1, 2])
    assert not turned.is_contiguous()
    np.testing.assert_array_equal(kernels.depthwise_conv2d(turned, weight, bias, 1, 1).numpy(), once.numpy())
    sliced = kernels.depthwise_conv2d(x[1:], weight, bias, 1, 1)
    np.testing.assert_array_equal(sliced.numpy(), once.numpy()[1:])
    weight.clear_gradient()
    # a gradient that arrives as a transposed view
    y = kernels.depthwise_conv2d(x, weight, bias, 1, 1)
    (y.transpose([0, 2, 3, 1]) * paddle.to_tensor(x.numpy().transpose(0, 2, 3, 1))).sum().backward()
    expected = with_gradients(lambda *a: F.conv2d(*a, 1, 1, groups=20), arrays((3, 20, 6, 5), (3, 3)), x.numpy())
    np.testing.assert_allclose(weight.grad.numpy(), expected[2], rtol=1e-5, atol=1e-4)
    assert ours() == 5


@compiled
def test_not_a_number_stays_where_it_belongs():
    x, weight, _ = map(paddle.to_tensor, arrays((1, 16, 9, 9), (3, 3)))
    x[0, 3, 4, 4] = float("nan")
    found = np.isnan(kernels.depthwise_conv2d(x, weight, None, 1, 1).numpy())
    assert found[0, 3, 3:6, 3:6].all()
    assert found.sum() == 9


def test_paddle_takes_the_rest(ours):
    x, weight, bias = map(paddle.to_tensor, arrays((2, 6, 5, 5), (3, 3)))
    double = [item.astype("float64") for item in (x, weight, bias)]
    assert kernels.depthwise_conv2d(*double, 1, 1).dtype == paddle.float64
    np.testing.assert_array_equal(
        kernels.depthwise_conv2d(x, weight, bias, 1, 2, 2).numpy(), F.conv2d(x, weight, bias, 1, 2, 2, groups=6).numpy()
    )
    wide = kernels.depthwise_conv2d(x, weight, bias, 1, 4)  # padding as large as the kernel
    np.testing.assert_array_equal(wide.numpy(), F.conv2d(x, weight, bias, 1, 4, groups=6).numpy())
    assert kernels.depthwise_conv2d(x, weight, bias, (2, 1), 1).shape == [2, 6, 3, 5]
    assert kernels.depthwise_conv2d(x, weight, bias, 1, [[0, 0], [0, 0], [1, 1], [1, 1]]).shape == x.shape
    assert kernels.depthwise_conv2d(x[:0], weight, bias, 1, 1).shape == [0, 6, 5, 5]
    with pytest.raises(ValueError, match="groups"):
        kernels.depthwise_conv2d(x[:, :5], weight, bias, 1, 1)

    def function(item):
        return kernels.depthwise_conv2d(item, weight, bias, 1, 1)

    static = paddle.jit.to_static(function, full_graph=True)
    np.testing.assert_allclose(
        static(x).numpy(), F.conv2d(x, weight, bias, 1, 1, groups=6).numpy(), rtol=1e-5, atol=1e-5
    )
    assert ours() == 0


@compiled
def test_kernel_larger_than_the_map_is_refused():
    x, weight, bias = map(paddle.to_tensor, arrays((2, 6, 5, 5), (7, 7)))
    with pytest.raises(UserError, match=r"5×5 map.*7×7 kernel"):
        kernels.depthwise_conv2d(x, weight, bias)


def test_stock_mode(ours):
    x, weight, bias = map(paddle.to_tensor, arrays((2, 6, 5, 5), (3, 3)))
    kernels.configure("stock")
    assert kernels.status() == {"mode": "stock", "in_use": False, "reason": "stock operators were asked for"}
    expected = F.conv2d(x, weight, bias, 1, 1, groups=6)
    np.testing.assert_array_equal(kernels.depthwise_conv2d(x, weight, bias, 1, 1).numpy(), expected.numpy())
    assert ours() == 0
    with pytest.raises(UserError, match=r"RUNTIME.KERNELS is 'stok', expected one of auto, stock \(nearest: stock"):
        kernels.configure("stok")
