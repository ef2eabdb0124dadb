"""The compiled operators over rows, and attention, against Paddle's own."""

# ruff: noqa: F811 (fixtures are imported, then asked for by name)
from __future__ import annotations

import math

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from kernel_checks import compare, compiled, ours, own_cache, with_gradients  # noqa: F401

import kernels
from kernels import rows


@compiled
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1,), (16,), (70, 100), (3, 4097)])
def test_gelu(shape, ours):
    compare(F.gelu, kernels.gelu, {"x": 3 * np.random.default_rng(0).standard_normal(shape).astype("float32")})
    assert ours() == 1


@compiled
def test_gelu_far_out():
    x = paddle.to_tensor([-1e30, -100.0, -14.0, -9.0, -5.0, 0.0, 5.0, 14.0, 1e30, float("inf"), float("nan")])
    x.stop_gradient = False
    y = kernels.gelu(x)
    y.sum().backward()
    exact = [v * math.erfc(-v / math.sqrt(2)) / 2 for v in x.numpy()[:8].astype("float64").tolist()]
    np.testing.assert_allclose(y.numpy()[2:8], exact[2:], rtol=1e-5, atol=1e-37)  # relative: the tail is exact
    np.testing.assert_array_equal(y.numpy()[:2], 0)
    np.testing.assert_array_equal(y.numpy()[8:], x.numpy()[8:])
    np.testing.assert_allclose(x.grad.numpy()[[0, 1, 5, 7, 8]], [0, 0, 0.5, 1, 1], atol=1e-7)


@pytest.fixture
def every_size(monkeypatch):
    """Take the compiled fully connected layer however small it is."""
    monkeypatch.setattr(rows, "SMALL", 0)


@compiled
@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("shape", "out"), [((5, 7), 3), ((2, 3, 4, 16), 48), ((128, 9, 33), 65), ((1, 4), 5000)])
def test_linear(shape, out, bias, transposed, monkeypatch):
    products = []
    product = rows.product
    monkeypatch.setattr(rows, "product", lambda *args, **kw: products.append(1) or product(*args, **kw))
    draw = np.random.default_rng(0).standard_normal
    sizes = {"x": shape, "weight": (out, shape[-1]) if transposed else (shape[-1], out), "bias": (out,)}
    compare(
        lambda x, weight, bias=None: F.linear(x, weight.t() if transposed else weight, bias),
        lambda x, weight, bias=None: kernels.linear(x, weight, bias, transposed),
        {name: draw(size).astype("float32") for name, size in sizes.items() if bias or name != "bias"},
        small=max(1e-6, 4 * 2**-24 * out**0.5),  # the rounding of a sum of n products grows as √n
    )
    assert len(products) == 3


@compiled
def test_small_layers_are_left_to_paddle(monkeypatch):
    """Where a Python function with a gradient costs more than it gains; not in mixed precision."""
    layers = []
    monkeypatch.setattr(rows.Linear, "apply", lambda *args, **kw: layers.append(args[0].shape))
    weight = paddle.ones([128, 512])
    for images in (24, 25):
        kernels.linear(paddle.ones([images, 128]), weight)
    assert layers == [[25, 128]]
    with kernels.bfloat16_products():
        kernels.linear(paddle.ones([1, 128]), weight)
    assert layers[1:] == [[1, 128]]


@compiled
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4, 96), (128, 33, 50), (1, 5000), (4, 2)])
def test_layer_norm(shape, ours):
    draw = np.random.default_rng(0).standard_normal
    values = {"x": 2 + draw(shape), "weight": draw(shape[-1]), "bias": draw(shape[-1])}
    compare(
        lambda x, weight, bias: F.layer_norm(x, shape[-1:], weight, bias, 1e-6),
        lambda x, weight, bias: kernels.layer_norm(x, weight, bias, 1e-6),
        {name: value.astype("float32") for name, value in values.items()},
    )
    assert ours() == 1


@compiled
@pytest.mark.usefixtures("every_size")
def test_rows_only_wanted_gradients(ours):
    draw = np.random.default_rng(0).standard_normal
    linear = [draw(size).astype("float32") for size in ((6, 8), (8, 8), (8,))]
    norm = [draw(size).astype("float32") for size in ((6, 8), (8,), (8,))]
    grad = draw((6, 8)).astype("float32")
    for function, values in ((kernels.linear, linear), (kernels.layer_norm, norm)):
        everything = with_gradients(function, values, grad)[1:]
        for wanted in range(3):
            inputs = [paddle.to_tensor(item, stop_gradient=number != wanted) for number, item in enumerate(values)]
            function(*inputs).backward(paddle.to_tensor(grad))
            assert [item.grad is not None for item in inputs] == [number == wanted for number in range(3)]
            np.testing.assert_array_equal(inputs[wanted].grad.numpy(), everything[wanted])
    assert ours() == 8


@compiled
@pytest.mark.usefixtures("every_size")
def test_rows_of_views(ours):
    base = paddle.to_tensor(np.random.default_rng(0).standard_normal((7, 4, 6)).astype("float32"))
    weight, bias = paddle.rand([7]), paddle.rand([7])
    view = base.transpose([1, 2, 0])
    assert not view.is_contiguous()
    for function in (kernels.gelu, lambda x: kernels.layer_norm(x, weight, bias),
                     lambda x: kernels.linear(x, paddle.diag(weight), bias)):
        np.testing.assert_array_equal(function(view).numpy(), function(view.contiguous()).numpy())
    assert ours() == 6


@pytest.mark.usefixtures("every_size")
def test_paddle_takes_the_other_rows(ours):
    x, weight, bias = paddle.rand([3, 4]), paddle.rand([4]), paddle.rand([4])
    for function, arguments in (
        (kernels.gelu, (x,)),
        (kernels.layer_norm, (x, weight, bias)),
        (kernels.linear, (x, paddle.diag(weight), bias)),
    ):
        double = [item.astype("float64") for item in arguments]
        assert function(*double).dtype == paddle.float64
        static = paddle.jit.to_static(function, full_graph=True)(*arguments)
        np.testing.assert_allclose(static.numpy(), function(*double).numpy(), rtol=1e-5, atol=1e-6)
        kernels.configure("stock")
        np.testing.assert_allclose(function(*arguments).numpy(), function(*double).numpy(), rtol=1e-5, atol=1e-6)
        kernels.configure("auto")
    assert kernels.linear(x, paddle.diag(weight)).shape == [3, 4]
    assert kernels.gelu(x[:0]).shape == [0, 4]
    assert ours() == 0


def manual_attention(query, key, value, bias=None, scale=0.3):
    query, key, value = (item.transpose([0, 2, 1, 3]) for item in (query, key, value))
    logits = paddle.matmul(scale * query, key, transpose_y=True)
    weights = F.softmax(logits if bias is None else logits + bias, axis=-1)
    return paddle.matmul(weights, value).transpose([0, 2, 1, 3])


@compiled
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("batch", "queries", "keys", "heads", "width"), [
    (2, 5, 5, 3, 7), (3, 70, 33, 2, 20), (1, 300, 310, 2, 32), (40, 4, 4, 7, 32), (2, 1, 9, 2, 48), (3, 1, 1, 1, 1),
])
def test_attention(batch, queries, keys, heads, width, biased, ours):
    draw = np.random.default_rng(0).standard_normal
    sizes = {"query": (batch, queries, heads, width), "key": (batch, keys, heads, width),
             "value": (batch, keys, heads, width), "bias": (heads, queries, keys)}
    values = {name: 2 * draw(size).astype("float32") for name, size in sizes.items() if biased or name != "bias"}
    compare(manual_attention, lambda q, k, v, bias=None: kernels.attention(q, k, v, bias, 0.3), values)
    assert ours() == 1


@compiled
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("batch", "positions", "heads", "width"), [(2, 5, 3, 7), (9, 40, 2, 20), (1, 260, 2, 32)])
def test_self_attention(batch, positions, heads, width, biased, ours):
    draw = np.random.default_rng(0).standard_normal
    sizes = {"qkv": (batch, positions, 3, heads, width), "bias": (heads, positions, positions)}
    values = {name: 2 * draw(size).astype("float32") for name, size in sizes.items() if biased or name != "bias"}
    compare(
        lambda qkv, bias=None: manual_attention(*qkv.unbind(2), bias),
        lambda qkv, bias=None: kernels.self_attention(qkv, bias, 0.3),
        values,
    )
    assert ours() == 1


@compiled
def test_attention_to_few(ours):
    """Logits far apart, a masked key, and keys that everybody sees."""
    draw = np.random.default_rng(0).standard_normal
    query, key, value = (paddle.to_tensor(100 * draw((1, 6, 2, 8)).astype("float32")) for _ in range(3))
    bias = np.zeros((2, 6, 6), "float32")
    bias[:, :, 3] = -np.inf
    found = kernels.attention(query, key, value, paddle.to_tensor(bias))
    expected = manual_attention(query, key, value, paddle.to_tensor(bias), 8**-0.5)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5, atol=1e-4)
    assert ours() == 1


@compiled
def test_attention_only_wanted_gradients(ours):
    draw = np.random.default_rng(0).standard_normal
    values = [draw(size).astype("float32") for size in [(2, 6, 2, 8)] * 3 + [(2, 6, 6)]]
    grad = draw((2, 6, 2, 8)).astype("float32")
    everything = with_gradients(kernels.attention, values, grad)[1:]
    for wanted in range(4):
        inputs = [paddle.to_tensor(item, stop_gradient=number != wanted) for number, item in enumerate(values)]
        kernels.attention(*inputs).backward(paddle.to_tensor(grad))
        assert [item.grad is not None for item in inputs] == [number == wanted for number in range(4)]
        np.testing.assert_array_equal(inputs[wanted].grad.numpy(), everything[wanted])
    assert ours() == 5


def test_stock_attention(ours):
    draw = np.random.default_rng(0).standard_normal
    qkv, bias = draw((2, 6, 3, 2, 8)).astype("float32"), draw((2, 6, 6)).astype("float32")
    kernels.configure("stock")
    found = kernels.self_attention(paddle.to_tensor(qkv), paddle.to_tensor(bias), 0.3).numpy()
    plain = kernels.self_attention(paddle.to_tensor(qkv)).numpy()
    assert ours() == 0
    parts = paddle.to_tensor(qkv).unbind(2)
    np.testing.assert_allclose(found, manual_attention(*parts, paddle.to_tensor(bias)).numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(plain, manual_attention(*parts, scale=8**-0.5).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", kernels.MODES)
def test_attention_drops_probabilities(mode):
    draw = np.random.default_rng(0).standard_normal
    qkv = paddle.to_tensor(draw((2, 5, 3, 4, 8)).astype("float32"))
    with kernels.using(mode):
        whole = kernels.self_attention(qkv).numpy()
        paddle.seed(3)
        dropped = np.mean([kernels.self_attention(qkv, dropout=0.5).numpy() for _ in range(2000)], axis=0)
    assert np.abs(dropped - whole).max() < 0.25 * np.abs(whole).max()
    assert np.abs(dropped - whole).max() > 0
