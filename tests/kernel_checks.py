"""What the tests of the compiled operators share."""

import ctypes
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

import kernels
from kernels import build

compiled = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="no C++ compiler on this machine")


def stock(function):
    def call(*arguments):
        with kernels.using("stock"):
            return function(*arguments)

    return call


def openmp():
    """Return the library whose threads Paddle's operators use."""
    return ctypes.CDLL(str(Path(paddle.__file__).parent / "libs" / "libiomp5.so"))


def assert_threads_change_no_bit(function):
    """Compare the arrays that a function returns on one, two and three threads."""
    before, results = openmp().omp_get_max_threads(), []
    try:
        for threads in (1, 2, 3):
            openmp().omp_set_num_threads(threads)
            results.append(function())
    finally:
        openmp().omp_set_num_threads(before)
    for other in results[1:]:
        np.testing.assert_equal(other, results[0])


def with_gradients(function, values, grad=None, dtype="float32"):
    """Return the output and the gradients of all inputs as arrays."""
    inputs = [paddle.to_tensor(item, dtype=dtype, stop_gradient=False) for item in values]
    y = function(*inputs)
    if grad is None:
        grad = np.random.default_rng(1).standard_normal(y.shape)
    y.backward(paddle.to_tensor(grad, dtype=dtype))
    return [y.numpy(), *(item.grad.numpy() for item in inputs)]


def compare(reference, own, values, small=1e-6):
    """Compare output and gradients with Paddle's in float64: the errors are Paddle's own in float32, or small."""
    exact = with_gradients(reference, values.values(), dtype="float64")
    paddles = with_gradients(reference, values.values())
    found = with_gradients(own, values.values())
    small *= 16 / build.library().lanes  # sums in fewer lanes are longer
    for name, want, theirs, got in zip(("y", *values), exact, paddles, found, strict=True):
        assert got.shape == want.shape
        scale = np.abs(want).max() or 1.0
        error, stock_error = np.abs(got - want).max() / scale, np.abs(theirs - want).max() / scale
        assert error < max(small, 2 * stock_error), f"{name}: error {error:.1e}, Paddle's {stock_error:.1e}"
