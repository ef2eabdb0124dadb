"""The compiled operators against Paddle's own: values, gradients, threads, and which calls they take."""

import math

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from kernel_checks import assert_threads_change_no_bit, compare, compiled, stock, with_gradients

import kernels
from errors import UserError


def convolution(shape, out, kernel, stride=1, padding=0, groups=1, bias=True):
    sizes = {"x": shape, "weight": (out, shape[1] // groups, *kernel)} | ({"bias": (out,)} if bias else {})
    return lambda x, weight, bias=None: kernels.conv2d(x, weight, bias, stride, padding, 1, groups), sizes


def depthwise(shape, kernel, stride=1, padding=0, multiplier=1, bias=True):
    return convolution(shape, multiplier * shape[1], kernel, stride, padding, shape[1], bias)


def batch_norm(training=True, before=None, after=None, shared=False):
    """The norm as a function of its differentiable tensors, with running statistics of its own each time."""
    def call(x, weight=None, bias=None, residual=None):
        mean, variance = (paddle.linspace(low, 2.0, x.shape[1]).astype(x.dtype) for low in (-1.0, 0.5))
        share = paddle.to_tensor(np.arange(x.shape[0]) % 3, dtype=x.dtype).reshape([-1] + [1] * (x.ndim - 1))
        return kernels.batch_norm(x, mean, variance, weight, bias, training, 0.9, 1e-5, before, after, residual,
                                  share if shared else None)

    return call


def norm(shape, training=True, before=None, after=None, everything=True):
    sizes = {"x": shape, "weight": shape[1:2], "bias": shape[1:2], "residual": shape} if everything else {"x": shape}
    return batch_norm(training, before, after, everything), sizes, 2e-6


def residual(shape, *factors, shared=True):
    def call(x, branch, *given):
        share = np.linspace(0, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        return kernels.residual(x, branch, **dict(zip(factors, given, strict=True)),
                                keep_scale=paddle.to_tensor(share, x.dtype) if shared else None)

    return call, {"x": shape, "branch": shape, **dict.fromkeys(factors, shape[-1:])}


def linear(shape, out, transposed=False, bias=True):
    sizes = {"x": shape, "weight": (out, shape[-1]) if transposed else (shape[-1], out)}
    small = max(1e-6, 4 * 2**-24 * out**0.5)  # the rounding of a sum of n products grows as √n
    return (lambda x, weight, bias=None: kernels.linear(x, weight, bias, transposed),
            sizes | ({"bias": (out,)} if bias else {}), small)


def pool_mixer(shape, size, scaled=True):
    """Of the norm's bias, a gradient of nothing but rounding is left out."""
    def call(x, weight, scale=None):
        share = paddle.to_tensor(np.arange(shape[0]) % 3, dtype=x.dtype).reshape([-1, 1, 1, 1])
        return kernels.pool_mixer(x, (weight, paddle.ones_like(weight)), size, 1e-5, scale, share)

    return call, {"x": shape, **dict.fromkeys(["weight"] + ["scale"] * scaled, shape[-1:])}


def attention(batch, queries, keys, heads, width, bias=True):
    sizes = {"query": (batch, queries, heads, width), "key": (batch, keys, heads, width),
             "value": (batch, keys, heads, width)}
    return kernels.attention, sizes | ({"bias": (heads, queries, keys)} if bias else {})


def self_attention(batch, positions, heads, width, bias=True, axis=2):
    sizes = {"qkv": (batch, positions, *((3, heads) if axis == 2 else (heads, 3)), width)}
    return (lambda qkv, bias=None: kernels.self_attention(qkv, bias, axis=axis),
            sizes | ({"bias": (heads, positions, positions)} if bias else {}))


def attend_map(batch, heads, tokens, width, *sides):
    sizes = {"query": (batch, tokens, heads * width), "x": (batch, heads * width, *sides)}
    return lambda query, x: kernels.attend_map(query, x, heads), sizes, 2e-6


def attend_tokens(batch, heads, tokens, width, *sides):
    token = (batch, tokens, heads * width)
    sizes = {"x": (batch, heads * width, *sides), "key": token, "value": token}
    return lambda x, key, value: kernels.attend_tokens(x, key, value, heads), sizes, 2e-6


def spectral(shape, planes=None):
    bins = shape[1] * (shape[2] // 2 + 1)
    sizes = {"x": shape, "real": (bins, planes or shape[3]), "imag": (bins, planes or shape[3])}
    return kernels.filter_spectrum, sizes | ({"scores": (shape[0], planes, shape[3])} if planes else {}), 2e-6


def simple(name, shape, *others):
    """An operator of ``x``, of parameters of its channels, and of numbers."""
    channels = shape[-1:]
    more = {"star_relu": {"scale": (1,), "bias": (1,)}, "layer_norm": {"weight": channels, "bias": channels},
            "group_norm": {"weight": channels, "bias": channels}, "residual": {"branch": (1, *shape[1:])},
            "dynamic_relu": {"first": shape[:2], "second": shape[:2]}}
    return lambda x, *rest: getattr(kernels, name)(x, *rest, *others), {"x": shape, **more.get(name, {})}


# Shapes with incomplete vectors, several slices and bands, and sides of 1. Each entry: an operator of ``simple`` or
# another function, and its arguments.
TABLE = {
    depthwise: [
        ((2, 3, 4, 4), (3, 3), 1, 1), ((33, 48, 4, 4), (3, 3), 1, 1), ((3, 17, 1, 1), (3, 3), 1, 1, 1, False),
        ((2, 16, 5, 3), (7, 11), 1, (3, 5)), ((2, 20, 7, 9), (3, 5), 2, (1, 2)), ((2, 33, 112, 96), (3, 3), 2, 1),
        ((1, 16, 111, 57), (3, 3), 1, 1, 1, False), ((2, 18, 30, 28), (9, 9), 1, 4), ((1, 18, 56, 56), (11, 11), 2, 5),
        ((2, 18, 20, 16), (5, 5), 2, (1, 2, 2, 1)), ((2, 18, 15, 14), (5, 5), 2, "SAME"),
        ((2, 18, 15, 14), (3, 3), 2, "VALID"), ((2, 5, 70, 300), (3, 3), 1, 2), ((1, 7, 70, 300), (3, 7), 2, 0),
        ((2, 9, 6, 6), (1, 1)), ((2, 8, 9, 7), (3, 3), 1, 1, 3), ((3, 20, 6, 5), (3, 3), 2, 1, 6),
        ((2, 8, 5, 5), (3, 3), 1, 1, 17), ((1, 7, 70, 130), (3, 3), 1, 1, 2),
    ],
    convolution: [
        ((3, 5, 9, 8), 7, (3, 3), 2, 1), ((2, 5, 70, 90), 7, (5, 5), 1, 2), ((70, 12, 4, 4), 20, (3, 3), 2, 1),
        ((2, 3, 33, 35), 8, (7, 7), 7, 0, 1, False), ((2, 3, 30, 31), 6, (3, 5), 2, "SAME"),
        ((1, 4, 9, 9), 6, (3, 3), 1, (0, 5, 4, 1)), ((1, 4, 100, 130), 6, (2, 2), 1, "VALID"),
        ((33, 20, 7, 7), 40, (1, 1)), ((2, 20, 70, 80), 4, (1, 1), 1, 0, 1, False), ((3, 20, 7, 7), 40, (1, 1), 2),
        ((3, 4, 5, 5), 6, (1, 1), 1, 1), ((5, 12, 6, 6), 36, (1, 1), 1, 0, 4), ((3, 16, 20, 20), 16, (1, 1), 1, 0, 4),
        ((9, 16, 9, 8), 16, (1, 1), 1, 0, 4), ((2, 12, 9, 9), 24, (3, 3), 2, 1, 3),
    ],
    norm: [
        *[((4, 37, 2, 2), training, *beside) for training in (True, False) for beside in (
            (None, None), ("gelu", None), ("relu", None), (None, "gelu"), (None, "relu6"), (None, "hardswish"))],
        *[(shape, True, "gelu", None, everything) for everything in (True, False) for shape in (
            (2, 3, 5, 7), (5, 7, 1, 1), (6, 9), (64, 19, 4, 4), (3, 17, 40, 41), (1, 6, 12, 13))],
    ],
    residual: [
        *[((3, 5, 7), *factors) for factors in ((), ("kept",), ("scale",), ("kept", "scale"))],
        ((2, 40, 30, 50), "kept", "scale"), ((4, 16),), ((4, 16), "scale"),
    ],
    linear: [((5, 7), 3), ((2, 3, 4, 16), 48, True), ((128, 9, 33), 65, False, False), ((1, 4), 5000, True, False)],
    attention: [(2, 5, 5, 3, 7), (3, 70, 33, 2, 20), (1, 300, 310, 2, 32, False), (40, 4, 4, 7, 32), (2, 1, 9, 2, 48),
                (3, 1, 1, 1, 1, False)],
    self_attention: [(2, 5, 3, 7), (9, 40, 2, 20, False), (1, 260, 2, 32), (2, 5, 3, 7, True, 3),
                     (9, 40, 2, 20, False, 3)],
    pool_mixer: [((3, 9, 5, 17), 5), ((2, 1, 1, 3), 3, False), ((5, 20, 14, 48), 3), ((2, 3, 5, 7), 1)],
    attend_map: [(3, 2, 3, 6, 8, 8), (2, 4, 6, 10, 7, 7), (2, 1, 1, 5, 1, 1), (2, 3, 9, 17, 4, 5),
                 (2, 2, 6, 6, 28, 28)],
    attend_tokens: [(3, 2, 3, 6, 8, 8), (2, 4, 6, 10, 7, 7), (2, 1, 1, 5, 1, 1), (2, 3, 9, 17, 4, 5),
                    (2, 2, 6, 6, 28, 28)],
    spectral: [((2, 1, 1, 16), 4), ((2, 8, 8, 33), 4), ((9, 4, 4, 32),), ((1, 56, 56, 16), 4), ((2, 3, 5, 3), 2),
               ((1, 11, 26, 5),), ((1, 1, 6, 4), 4), ((1, 30, 16, 17), 1)],
    "star_relu": [((2, 3, 5, 7),), ((1,),), ((70, 1000),)],
    "gelu": [((2, 3, 5, 7),), ((1,),), ((16,),), ((70, 100),), ((3, 4097),)],
    "mean": [((2, 300, 7), 1), ((3, 5, 37), 2), ((2, 3, 4, 33), -2), ((5, 1), 1)],
    "layer_norm": [((5, 7),), ((2, 3, 4, 96),), ((128, 33, 50),), ((1, 5000),), ((4, 2),)],
    "group_norm": [((2, 3, 5, 7),), ((1, 1, 1, 1),), ((5, 8, 9, 70),)],
    "dynamic_relu": [((2, 3, 5, 7),), ((64, 19, 1, 1),), ((3, 17, 40, 41),)],
    "average_pool": [((2, 3, 5, 7), 2), ((3, 5, 8, 1), 2), ((1, 2, 1, 40), 2)],
    "channels_last": [((2, 3, 5, 7),), ((3, 37, 8, 9),), ((2, 48, 1, 1),)],
    "channels_first": [((2, 5, 7, 3),), ((3, 8, 9, 37),), ((2, 1, 1, 48),)],
    "channel_shuffle": [((2, 6, 5, 7), 3), ((64, 20, 1, 1), 4), ((3, 18, 40, 41), 2), ((3, 5, 2, 2), 5)],
}
# One call of each operator with several slices of work.
LARGE = {
    "depthwise": depthwise((21, 100, 12, 10), (3, 3), 1, 1), "bands": depthwise((3, 9, 130, 110), (7, 7), 2, 3),
    "multiplied": depthwise((21, 30, 12, 11), (3, 3), 1, 1, 3), "gelu": simple("gelu", (210, 1000)),
    "batch norm": norm((9, 24, 40, 41), True, "gelu"), "narrow batch norm": norm((70, 300, 2, 2), True, "gelu"),
    "self-attention": self_attention(20, 50, 3, 24), "attention": attention(3, 90, 500, 3, 32, False),
    "mean": simple("mean", (21, 90, 77), 1), "layer norm": simple("layer_norm", (21, 90, 77)),
    "residual": residual((9, 30, 60), "kept", "scale"),
    "residual with a table": simple("residual", (9, 30, 60)),
    "star relu": simple("star_relu", (90, 1000)), "group norm": simple("group_norm", (5, 6, 9, 50)),
    "pooling": pool_mixer((5, 20, 20, 50), 3),
    "filter": spectral((9, 6, 6, 40), 4), "own filters": spectral((9, 6, 6, 40)),
    "dynamic relu": simple("dynamic_relu", (21, 45, 12, 11)),
    "channels last": simple("channels_last", (21, 45, 12, 11)),
    "average pool": simple("average_pool", (21, 45, 12, 11), 2),
    "shuffle": simple("channel_shuffle", (21, 45, 12, 11), 5), "map": attend_map(4, 2, 3, 12, 28, 28),
    "tokens": attend_tokens(4, 2, 3, 12, 28, 28),
}
PRODUCTS = {"dense": convolution((3, 5, 9, 8), 7, (3, 3), 2, 1), "linear": linear((6, 8), 8),
            "transposed": linear((6, 8), 9, True)}


def draw(sizes):
    generator = np.random.default_rng(0)
    values = {name: generator.standard_normal(size).astype("float32") for name, size in sizes.items()}
    if "first" in sizes or len(np.shape(values.get("weight"))) == 1:  # a norm's input with a mean, slopes of both signs
        values["x"] = 2 * values["x"] + 1
    if "qkv" in sizes or len(sizes.get("query", ())) == 4:  # logits further apart
        values = {name: 2 * value for name, value in values.items()}
    return values


@compiled
@pytest.mark.parametrize(("operator", "arguments"), [
    pytest.param(operator, arguments, id=f"{getattr(operator, '__name__', operator)}-{arguments}")
    for operator, calls in TABLE.items() for arguments in calls])
def test_parity_with_paddle(operator, arguments, ours):
    function, sizes, *small = operator(*arguments) if callable(operator) else simple(operator, *arguments)
    compare(stock(function), function, draw(sizes), *small)
    assert len(ours) == 1


@compiled
@pytest.mark.parametrize("name", LARGE)
def test_threads_change_no_bit(name):
    function, sizes = LARGE[name][:2]
    values = list(draw(sizes).values())
    assert_threads_change_no_bit(lambda: with_gradients(function, values))


@compiled
@pytest.mark.parametrize("name", [*LARGE, *PRODUCTS])
def test_needed_gradients_alone_and_views(name, ours):
    function, sizes = (LARGE | PRODUCTS)[name][:2]
    values = list(draw(sizes).values())
    everything = with_gradients(function, values)
    grad = paddle.to_tensor(np.random.default_rng(1).standard_normal(everything[0].shape), "float32")
    for needed in range(len(values)):
        inputs = [paddle.to_tensor(item, stop_gradient=number != needed) for number, item in enumerate(values)]
        function(*inputs).backward(grad)
        assert [item.grad is not None for item in inputs] == [number == needed for number in range(len(values))]
        np.testing.assert_array_equal(inputs[needed].grad.numpy(), everything[needed + 1])
    inputs = [paddle.to_tensor(item) for item in values]
    assert function(*inputs).stop_gradient
    order = list(range(values[0].ndim))[::-1]
    view = paddle.to_tensor(values[0].transpose(order)).transpose(order)
    view.stop_gradient = False
    assert view.is_contiguous() == (values[0].ndim < 2)
    y = function(view, *inputs[1:])
    np.testing.assert_array_equal(y.numpy(), everything[0])
    # a gradient that arrives as a transposed view
    order = list(range(y.ndim))[::-1]
    (y.transpose(order) * grad.transpose(order).contiguous()).sum().backward()
    np.testing.assert_array_equal(view.grad.numpy(), everything[1])
    assert len(ours) == len(values) + 3 - (name == "channels last")  # a view of a transposed tensor is Paddle's


@compiled
@pytest.mark.parametrize("name", [*LARGE, *PRODUCTS])
def test_paddle_takes_other_dtypes_modes_and_empty_tensors(name, ours):
    function, sizes = (LARGE | PRODUCTS)[name][:2]
    arguments = [paddle.to_tensor(item) for item in draw(sizes).values()]
    double = function(*(item.astype("float64") for item in arguments))
    single = stock(function)(*arguments)
    if name not in ("batch norm", "narrow batch norm", "residual"):  # these make tensors of numpy's arrays
        def call(inputs):  # Paddle cannot read the source of a lambda
            return function(*inputs)

        static = paddle.jit.to_static(call, full_graph=True)(arguments)
        np.testing.assert_allclose(static.numpy(), double.numpy(), rtol=1e-4, atol=1e-4)
    assert not ours and double.dtype == paddle.float64
    np.testing.assert_allclose(single.numpy(), double.numpy(), rtol=1e-4, atol=1e-4)


def test_paddle_takes_the_other_convolutions(ours):
    x, weight, bias = map(paddle.to_tensor, draw({"x": (2, 6, 5, 5), "weight": (6, 1, 3, 3), "bias": (6,)}).values())
    for settings in ((1, 2, 2), (1, 4, 1)):  # a dilation; padding larger than the kernel
        np.testing.assert_array_equal(kernels.conv2d(x, weight, bias, *settings, groups=6).numpy(),
                                      F.conv2d(x, weight, bias, *settings, groups=6).numpy())
    assert kernels.conv2d(x, weight, bias, (2, 1), 1, groups=6).shape == [2, 6, 3, 5]
    assert kernels.conv2d(x, weight, bias, 1, [[0, 0], [0, 0], [1, 1], [1, 1]], groups=6).shape == x.shape
    assert kernels.conv2d(x[:0], weight, bias, 1, 1, groups=6).shape == [0, 6, 5, 5]
    assert kernels.gelu(x[:0]).shape == [0, 6, 5, 5]
    both = kernels.batch_norm(x, paddle.zeros([6]), paddle.ones([6]), before="relu6", after="relu")
    np.testing.assert_allclose(both.numpy(), x.numpy().clip(0, 6), rtol=1e-5)
    assert not ours


@compiled
@pytest.mark.parametrize("name", [*LARGE, *PRODUCTS])
def test_wrong_shapes_raise(name):
    """Each tensor in turn has one number more along each of its axes."""
    function, sizes = (LARGE | PRODUCTS)[name][:2]
    free = {"depthwise": {"x": (0, 2, 3), "weight": (2, 3)}, "linear": {"x": (0,)}, "shuffle": {"x": (0, 2, 3)},
            "gelu": {"x": (0, 1)}, "mean": {"x": (0, 1, 2)}, "pooling": {"x": (0, 1, 2, 3)},
            "self-attention": {"qkv": (0, 1, 3, 4)},
            "layer norm": {"x": (0, 1)}, "star relu": {"x": (0, 1)}, "group norm": {"x": (0, 1, 2)},
            "attention": {"query": (1,)}, "filter": {"x": (2,)}, "dynamic relu": {"x": (2, 3)},
            "map": {"query": (1,), "x": (2, 3)}, "tokens": {"x": (2, 3)}, "channels last": {"x": (0, 1, 2, 3)},
            "average pool": {"x": (0, 1, 2, 3)}, "residual with a table": {"x": (0,)}}
    free |= dict.fromkeys(("bands", "multiplied", "dense"), free["depthwise"])
    free |= {"transposed": free["linear"], "own filters": {"x": (0, 2)}}
    for wrong in sizes:
        for axis in range(len(sizes[wrong])):
            if axis in free.get(name, {}).get(wrong, ()):
                continue  # the other tensors say nothing about it
            shape = [size + (place == axis) for place, size in enumerate(sizes[wrong])]
            arguments = [paddle.rand(shape if key == wrong else sizes[key]) for key in sizes]
            with pytest.raises(ValueError):
                function(*arguments)


@compiled
def test_wrong_arguments_raise():
    from kernels.dispatch import run

    x, weight = paddle.rand([3, 8]), paddle.rand([8])
    for error, arguments in (
        (TypeError, (x, weight, weight)), (TypeError, (x, weight, weight, 1e-5, 1)),
        (TypeError, (x, weight, weight, "a")),
        (ValueError, (x, weight, None, 1e-5)), (ValueError, (None, weight, weight, 1e-5)),
        (ValueError, (x.astype("float64"), weight, weight, 1e-5)), (ValueError, (x, weight, weight[1:], 1e-5)),
        (ValueError, (paddle.rand([]), weight, weight, 1e-5)), (ValueError, (x, 3.0, weight, 1e-5)),
    ):
        with pytest.raises(error):
            run("layer_norm", *arguments)
    with pytest.raises(ValueError, match=r"layer_norm: weight has the shape \[7\], expected \[8\]"):
        kernels.layer_norm(x, weight[1:], weight)
    with pytest.raises(AttributeError):
        run("layer_nrom", x)
    with pytest.raises(ValueError, match="groups"):
        kernels.channel_shuffle(paddle.rand([1, 6, 2, 2]), 4)
    with pytest.raises(UserError, match=r"5×5 map.*7×7 kernel"):
        kernels.conv2d(paddle.rand([2, 6, 5, 5]), paddle.rand([6, 1, 7, 7]), groups=6)


@compiled
def test_checks_for_nan_find_none_in_fresh_memory():
    """FLAGS_check_nan_inf looks at what Paddle's operators put out, which must not be memory to be filled later."""
    poison = [paddle.full([size], float("nan")) for size in (10, 1000, 100_000, 1_000_000) for _ in range(9)]
    del poison
    paddle.set_flags({"FLAGS_check_nan_inf": 1})
    try:
        for function, sizes, *_ in (LARGE | PRODUCTS).values():
            assert all(np.isfinite(item).all() for item in with_gradients(function, draw(sizes).values()))
    finally:
        paddle.set_flags({"FLAGS_check_nan_inf": 0})


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


@compiled
def test_nan_stays_within_its_windows():
    x, weight = map(paddle.to_tensor, draw({"x": (1, 16, 9, 9), "weight": (16, 1, 3, 3)}).values())
    x[0, 3, 4, 4] = float("nan")
    found = np.isnan(kernels.conv2d(x, weight, None, 1, 1, groups=16).numpy())
    assert found[0, 3, 3:6, 3:6].all()
    assert found.sum() == 9


@compiled
def test_running_statistics(ours):
    for shape in ((2, 3, 5, 7), (6, 9), (64, 19, 4, 4)):
        found = []
        for dtype in ("float64", "float32"):
            x = paddle.to_tensor(draw({"x": shape})["x"], dtype)
            mean, variance = (paddle.linspace(low, 2.0, shape[1]).astype(dtype) for low in (-1.0, 0.5))
            kernels.batch_norm(x, mean, variance, training=True, momentum=0.7, before="gelu")
            found.append((mean, variance))
        for exact, own in zip(*found, strict=True):
            np.testing.assert_allclose(own.numpy(), exact.numpy(), rtol=3e-6, atol=1e-6)
    assert len(ours) == 3


@compiled
def test_variance_of_a_large_mean():
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


@compiled
def test_attention_of_large_and_masked_logits(ours):
    sizes = dict.fromkeys(("query", "key", "value"), (1, 6, 2, 8))
    tensors = [paddle.to_tensor(100 * item) for item in draw(sizes).values()]
    bias = np.zeros((2, 6, 6), "float32")
    bias[:, :, 3] = -np.inf
    found, expected = (function(*tensors, paddle.to_tensor(bias)) for function in (
        kernels.attention, stock(kernels.attention)))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5, atol=1e-4)
    for function, sizes, _ in (attend_map(2, 2, 3, 6, 5, 7), attend_tokens(2, 2, 3, 6, 5, 7)):
        results = with_gradients(function, [30 * item for item in draw(sizes).values()])
        assert all(np.isfinite(item).all() for item in results)
    far = draw(dict.fromkeys(("query", "key", "value"), (2, 3, 2, 8)))  # all logits near -89, exp(89) is infinite
    far["query"][:], far["key"] = 8**0.5, -11.1 - far["key"] / 1000
    for own, expected in zip(with_gradients(kernels.attention, far.values()),
                             with_gradients(stock(kernels.attention), far.values()), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-4)
    assert len(ours) == 4


@pytest.mark.parametrize("mode", kernels.MODES)
def test_attention_drops_probabilities(mode, ours):
    qkv = paddle.to_tensor(draw({"qkv": (2, 5, 3, 4, 8)})["qkv"])
    tokens, x = (paddle.to_tensor(item) for item in draw({"q": (2, 3, 12), "x": (2, 12, 4, 4)}).values())
    with kernels.using(mode):
        paddle.seed(3)
        for function in (lambda rate: kernels.self_attention(qkv, dropout=rate),
                         lambda rate: kernels.attend_map(tokens, x, 2, rate),
                         lambda rate: kernels.attend_tokens(x, tokens, tokens, 2, rate)):
            whole = stock(function)(0.0).numpy()
            dropped = np.mean([function(0.5).numpy() for _ in range(400)], axis=0)
            assert 0 < np.abs(dropped - whole).max() < 0.5 * np.abs(whole).max()
    assert not ours


def test_modes(ours):
    with kernels.using("stock"):
        assert kernels.status() == {"mode": "stock", "in_use": False, "reason": "stock operators were asked for"}
        kernels.gelu(paddle.ones([3]))
    assert not ours
    with pytest.raises(UserError, match=r"RUNTIME.KERNELS is 'stok', expected one of auto, stock \(nearest: stock"):
        kernels.configure("stok")
