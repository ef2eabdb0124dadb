"""The compiled operators over channels-last maps against Paddle's own."""

# ruff: noqa: F811 (fixtures are imported, then asked for by name)
from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from kernel_checks import compare, compiled, ours, own_cache, with_gradients  # noqa: F401

import kernels


def stock(function):
    """The operator as Paddle has it."""
    def call(*arguments):
        with kernels.using("stock"):
            return function(*arguments)

    return call


def draw(sizes):
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(size).astype("float32") for name, size in sizes.items()}


@compiled
@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "own planes"])
@pytest.mark.parametrize(("shape", "planes"), [
    ((2, 1, 1, 16), 4), ((3, 2, 2, 48), 4), ((2, 8, 8, 33), 4), ((9, 4, 4, 32), 4), ((1, 56, 56, 16), 4),
    ((2, 3, 5, 3), 2), ((1, 11, 26, 5), 3), ((1, 1, 6, 4), 4), ((2, 5, 1, 4), 4), ((1, 30, 16, 17), 1),
])
def test_filter(shape, planes, mixed, ours):
    batch, height, width, channels = shape
    planes = planes if mixed else channels
    bins = height * (width // 2 + 1)
    sizes = {"x": shape, "real": (bins, planes), "imag": (bins, planes), "scores": (batch, planes, channels)}
    values = draw({name: size for name, size in sizes.items() if mixed or name != "scores"})
    compare(stock(kernels.filter_spectrum), kernels.filter_spectrum, values, small=2e-6)
    assert ours() == 1


def test_filter_is_a_product_of_spectra():
    for mode, dtype, tolerance in (("stock", "float64", 1e-12), ("auto", "float32", 2e-6)):
        for size in ((1, 1), (2, 2), (3, 5), (8, 8), (9, 10), (22, 21)):
            bins = size[1] // 2 + 1
            plane = (size[0] * bins, 3)
            x, real, imag = draw({"x": (2, *size, 3), "real": plane, "imag": plane}).values()
            weight = (real + 1j * imag).reshape(size[0], bins, 3).astype("complex128")
            spectrum = np.fft.rfft2(x.astype("float64"), axes=(1, 2)) * weight
            expected = np.fft.irfft2(spectrum, s=size, axes=(1, 2))
            with kernels.using(mode):
                found = kernels.filter_spectrum(*(paddle.to_tensor(item, dtype=dtype) for item in (x, real, imag)))
            np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@compiled
@pytest.mark.parametrize("share", [True, False], ids=["share", "all"])
@pytest.mark.parametrize("factors", [(), ("kept",), ("scale",), ("kept", "scale")], ids="-".join)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 40, 30, 50), (4, 16)])
def test_residual(shape, factors, share, ours):
    shares = np.linspace(0, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    values = draw({"x": shape, "branch": shape, **dict.fromkeys(factors, shape[-1:])})

    def call(x, branch, *given):
        drawn = paddle.to_tensor(shares, dtype=x.dtype) if share else None
        return kernels.residual(x, branch, **dict(zip(factors, given, strict=True)), share=drawn)

    compare(stock(call), call, values)
    assert ours() == 1


@compiled
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1,), (70, 1000)])
def test_star_relu(shape, ours):
    compare(stock(kernels.star_relu), kernels.star_relu, draw({"x": shape, "scale": 1, "bias": 1}))
    assert ours() == 1


@compiled
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (5, 8, 9, 70)])
def test_group_norm(shape, ours):
    values = draw({"x": shape, "weight": shape[-1:], "bias": shape[-1:]})
    values["x"] += 3
    reference = lambda x, weight, bias: F.group_norm(  # noqa: E731
        x.transpose([0, 3, 1, 2]), 1, 1e-5, weight, bias).transpose([0, 2, 3, 1])
    compare(reference, kernels.group_norm, values)
    compare(stock(kernels.group_norm), kernels.group_norm, values)
    assert ours() == 2


@compiled
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 1, 1, 16), (2, 14, 13, 50)])
def test_pool_difference(shape, size, ours):
    reference = lambda x: F.avg_pool2d(  # noqa: E731
        x.transpose([0, 3, 1, 2]), size, 1, size // 2, exclusive=True).transpose([0, 2, 3, 1]) - x
    compare(reference, lambda x: kernels.pool_difference(x, size), draw({"x": shape}))
    compare(stock(lambda x: kernels.pool_difference(x, size)), lambda x: kernels.pool_difference(x, size),
            draw({"x": shape}))


def pool(x):
    return kernels.pool_difference(x, 3)


CALLS = {
    "filter": (kernels.filter_spectrum, {"x": (9, 6, 6, 40), "real": (24, 4), "imag": (24, 4), "scores": (9, 4, 40)}),
    "residual": (kernels.residual, {"x": (9, 30, 60), "branch": (9, 30, 60), "kept": (60,), "scale": (60,)}),
    "star_relu": (kernels.star_relu, {"x": (90, 1000), "scale": 1, "bias": 1}),
    "group_norm": (kernels.group_norm, {"x": (5, 6, 9, 50), "weight": 50, "bias": 50}),
    "pool_difference": (pool, {"x": (5, 20, 20, 50)}),
}


@compiled
@pytest.mark.parametrize("name", CALLS)
def test_only_wanted_gradients_views_and_repeats(name, ours):
    function, sizes = CALLS[name]
    values = list(draw(sizes).values())
    everything = with_gradients(function, values)
    again = with_gradients(function, values)
    for one, other in zip(everything, again, strict=True):
        np.testing.assert_array_equal(one, other)
    grad = np.random.default_rng(1).standard_normal(everything[0].shape).astype("float32")
    for wanted in range(len(values)):
        inputs = [paddle.to_tensor(item, stop_gradient=number != wanted) for number, item in enumerate(values)]
        function(*inputs).backward(paddle.to_tensor(grad))
        assert [item.grad is not None for item in inputs] == [number == wanted for number in range(len(values))]
        np.testing.assert_array_equal(inputs[wanted].grad.numpy(), everything[wanted + 1])
    order = list(range(values[0].ndim))[::-1]
    view = paddle.to_tensor(values[0].transpose(order)).transpose(order)
    np.testing.assert_array_equal(function(view, *map(paddle.to_tensor, values[1:])).numpy(), everything[0])


@pytest.mark.parametrize("name", CALLS)
def test_paddle_takes_the_others(name, ours):
    function, sizes = CALLS[name]
    arguments = [paddle.to_tensor(item) for item in draw(sizes).values()]
    double = function(*(item.astype("float64") for item in arguments))
    assert double.dtype == paddle.float64
    with kernels.using("stock"):
        single = function(*arguments)
    static = paddle.jit.to_static(function, full_graph=True)(*arguments)
    assert ours() == 0
    np.testing.assert_allclose(static.numpy(), double.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(single.numpy(), double.numpy(), rtol=1e-4, atol=1e-4)
