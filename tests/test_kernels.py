"""The compiled operators against Paddle's own: values, gradients, and every way of falling back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle.nn.functional import conv2d

import kernels
from errors import UserError
from kernels import build, depthwise

ROOT = Path(__file__).parents[1]
COMPILER = any(map(shutil.which, build.COMPILERS))
compiled = pytest.mark.skipif(not COMPILER, reason="no C++ compiler on this machine")

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


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """One cache for this file, apart from the user's; and the mode back to `auto` after each test."""
    monkeypatch.setenv("PADDLE_HYBRID_CACHE", str(tmp_path_factory.getbasetemp() / "kernel-cache"))
    yield
    kernels.configure("auto")


@pytest.fixture
def ours(monkeypatch):
    """A counter of calls that reached the compiled operator: ``ours()``."""
    calls = []
    convolve = depthwise.convolve
    monkeypatch.setattr(depthwise, "convolve", lambda *args: calls.append(1) or convolve(*args))
    return lambda: len(calls)


def tensors(shape, kernel, seed=0, dtype="float32"):
    draw = np.random.default_rng(seed).standard_normal
    sizes = shape, (shape[1], 1, *kernel), shape[1:2]
    return [paddle.to_tensor(draw(size).astype("float32")).astype(dtype) for size in sizes]


def with_gradients(function, arguments, bias, grad=None):
    """Return the output and the gradients of x, weight (and bias) as arrays."""
    x, weight, offset = (item.detach() for item in arguments)
    inputs = [x, weight, offset] if bias else [x, weight]
    for item in inputs:
        item.stop_gradient = False
    y = function(x, weight, offset if bias else None)
    if grad is None:
        grad = np.random.default_rng(1).standard_normal(y.shape)
    y.backward(paddle.to_tensor(grad).astype(y.dtype))
    return [y.numpy(), *(item.grad.numpy() for item in inputs)]


@compiled
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), GRID)
def test_parity_with_paddle(shape, kernel, stride, padding, bias, ours):
    def stock(x, weight, offset):
        return conv2d(x, weight, offset, stride, padding, groups=shape[1])

    def own(x, weight, offset):
        return kernels.depthwise_conv2d(x, weight, offset, stride, padding)

    exact = with_gradients(stock, tensors(shape, kernel, dtype="float64"), bias)
    paddles = with_gradients(stock, tensors(shape, kernel), bias)
    found = with_gradients(own, tensors(shape, kernel), bias)
    assert ours() == 1
    for name, want, theirs, got in zip(("y", "x", "weight", "bias"), exact, paddles, found, strict=False):
        assert got.shape == want.shape
        scale = np.abs(want).max()
        error, stock_error = np.abs(got - want).max() / scale, np.abs(theirs - want).max() / scale
        print(f"{name}: error {error:.1e}, Paddle's {stock_error:.1e}")
        assert error < max(2e-6, 2 * stock_error)


@compiled
@pytest.mark.parametrize("lanes", ["-mavx512f", "-mavx2", "-msse2"])
def test_every_vector_width(lanes, monkeypatch, tmp_path):
    wanted = {"-mavx512f": "avx512f", "-mavx2": "avx2", "-msse2": "sse2"}[lanes]
    if wanted not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {wanted}")
    monkeypatch.setenv("PADDLE_HYBRID_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-std=c++17", "-O2", lanes, "-fPIC", "-fopenmp"))
    monkeypatch.setattr(build, "_library", None)
    assert kernels.status()["reason"] is None
    for shape, kernel, stride, padding in GRID[1:7]:
        arguments = tensors(shape, kernel)
        expected = with_gradients(lambda *a: conv2d(*a, stride, padding, groups=shape[1]), arguments, True)  # noqa: B023
        found = with_gradients(lambda *a: kernels.depthwise_conv2d(*a, stride, padding), arguments, True)  # noqa: B023
        for want, got in zip(expected, found, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


@compiled
def test_only_wanted_gradients(ours):
    x, weight, bias = tensors((2, 20, 6, 6), (3, 3))
    with paddle.no_grad():
        assert kernels.depthwise_conv2d(x, weight, bias, 1, 1).stop_gradient
    assert kernels.depthwise_conv2d(x, weight, bias, 1, 1).stop_gradient
    everything = with_gradients(lambda *a: kernels.depthwise_conv2d(*a, 1, 1), (x, weight, bias), True)[1:]
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
    x, weight, bias = tensors((3, 20, 6, 5), (3, 3))
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
    expected = with_gradients(lambda *a: conv2d(*a, 1, 1, groups=20), (x, weight, bias), True, x.numpy())
    np.testing.assert_allclose(weight.grad.numpy(), expected[2], rtol=1e-5, atol=1e-4)
    assert ours() == 5


@compiled
def test_not_a_number_stays_where_it_belongs():
    x, weight, _ = tensors((1, 16, 9, 9), (3, 3))
    x[0, 3, 4, 4] = float("nan")
    found = np.isnan(kernels.depthwise_conv2d(x, weight, None, 1, 1).numpy())
    assert found[0, 3, 3:6, 3:6].all()
    assert found.sum() == 9


def test_paddle_takes_the_rest(ours):
    x, weight, bias = tensors((2, 6, 5, 5), (3, 3))
    double = [item.astype("float64") for item in (x, weight, bias)]
    assert kernels.depthwise_conv2d(*double, 1, 1).dtype == paddle.float64
    np.testing.assert_array_equal(
        kernels.depthwise_conv2d(x, weight, bias, 1, 2, 2).numpy(), conv2d(x, weight, bias, 1, 2, 2, groups=6).numpy()
    )
    wide = kernels.depthwise_conv2d(x, weight, bias, 1, 4)  # padding as large as the kernel
    np.testing.assert_array_equal(wide.numpy(), conv2d(x, weight, bias, 1, 4, groups=6).numpy())
    assert kernels.depthwise_conv2d(x, weight, bias, (2, 1), 1).shape == [2, 6, 3, 5]
    assert kernels.depthwise_conv2d(x, weight, bias, 1, [[0, 0], [0, 0], [1, 1], [1, 1]]).shape == x.shape
    assert kernels.depthwise_conv2d(x[:0], weight, bias, 1, 1).shape == [0, 6, 5, 5]
    with pytest.raises(ValueError, match="groups"):
        kernels.depthwise_conv2d(x[:, :5], weight, bias, 1, 1)

    def function(item):
        return kernels.depthwise_conv2d(item, weight, bias, 1, 1)

    static = paddle.jit.to_static(function, full_graph=True)
    np.testing.assert_allclose(
        static(x).numpy(), conv2d(x, weight, bias, 1, 1, groups=6).numpy(), rtol=1e-5, atol=1e-5
    )
    assert ours() == 0


@compiled
def test_kernel_larger_than_the_map_is_refused():
    x, weight, bias = tensors((2, 6, 5, 5), (7, 7))
    with pytest.raises(UserError, match=r"5×5 map.*7×7 kernel"):
        kernels.depthwise_conv2d(x, weight, bias)


def test_stock_mode(ours):
    x, weight, bias = tensors((2, 6, 5, 5), (3, 3))
    kernels.configure("stock")
    assert kernels.status() == {"mode": "stock", "in_use": False, "reason": "stock operators were asked for"}
    expected = conv2d(x, weight, bias, 1, 1, groups=6)
    np.testing.assert_array_equal(kernels.depthwise_conv2d(x, weight, bias, 1, 1).numpy(), expected.numpy())
    assert ours() == 0
    with pytest.raises(UserError, match=r"RUNTIME.KERNELS is 'stok', expected one of auto, stock \(nearest: stock"):
        kernels.configure("stok")


# What a process of its own prints: its status, then a digest of an output and its gradients.
PROGRAM = """
import hashlib, sys
import numpy as np
import paddle
import kernels
status = kernels.status()
draw = np.random.default_rng(0).standard_normal
x, weight, bias, grad = (
    paddle.to_tensor(draw(size).astype("float32"), stop_gradient=False)
    for size in ((21, 100, 12, 10), (100, 1, 3, 3), (100,), (21, 100, 12, 10))
)
digest = hashlib.sha256()
for repeat in range(2):
    y = kernels.depthwise_conv2d(x, weight, bias, 1, 1)
    y.backward(grad)
    for item in (y, x.grad, weight.grad, bias.grad):
        digest.update(item.numpy().tobytes())
    for item in (x, weight, bias):
        item.clear_gradient()
print(status["in_use"], status["reason"], status.get("library"), status.get("threads"), digest.hexdigest(), sep="|")
"""


def process(cache, **environment):
    """Run PROGRAM and return in_use, reason, library, threads, digest as it printed them."""
    environment = {**os.environ, "PADDLE_HYBRID_CACHE": str(cache), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1].split("|")


@compiled
def test_processes_build_at_once_and_threads_change_no_bit(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda threads: process(tmp_path, OMP_NUM_THREADS=threads), "123"))
    assert [item[3] for item in found] == ["1", "2", "3"]
    assert len({item[4] for item in found}) == 1
    libraries = list(tmp_path.rglob("*.so"))
    assert {item[2] for item in found} == {str(path) for path in libraries}
    assert len(libraries) == 1
    assert sorted(path.name for path in libraries[0].parent.iterdir()) == [libraries[0].name, "lock"]


@compiled
def test_broken_cache_is_rebuilt(tmp_path, monkeypatch):
    monkeypatch.setenv("PADDLE_HYBRID_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_library", None)
    whole = Path(kernels.status()["library"])
    content = whole.read_bytes()
    for broken in (content[: len(content) // 2], b"", content[:-1] + bytes([content[-1] ^ 1])):
        whole.unlink()
        whole.write_bytes(broken)
        monkeypatch.setattr(build, "_library", None)
        status = kernels.status()
        assert status["in_use"], status
        found = list(tmp_path.rglob("*.so"))
        assert [str(path) for path in found] == [status["library"]]
        assert found[0].read_bytes() != broken
        assert found[0].name == build._name(build._digest(found[0]))
        whole = found[0]


@compiled
def test_cache_that_cannot_be_written(tmp_path, monkeypatch, ours):
    (tmp_path / "kernels").write_text("a file where the folder should be")
    monkeypatch.setenv("PADDLE_HYBRID_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_library", None)
    assert kernels.status()["in_use"]
    x, weight, bias = tensors((2, 6, 5, 5), (3, 3))
    kernels.depthwise_conv2d(x, weight, bias, 1, 1)
    assert ours() == 1


def test_without_a_compiler(tmp_path):
    used, reason, library, _, _ = process(tmp_path, PATH="", CXX="")
    assert (used, library) == ("False", "None")
    assert "no C++ compiler found" in reason
    assert not list(tmp_path.iterdir())


def test_compiler_that_fails(tmp_path):
    fake = tmp_path / "g++"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo fake 1.0 && exit 0\necho "no such option" >&2\nexit 1\n')
    fake.chmod(0o755)
    used, reason, *_ = process(tmp_path / "cache", CXX=str(fake))
    assert used == "False"
    assert "failed: no such option" in reason


def test_import_does_no_work():
    code = "import sys, kernels; print('paddle' in sys.modules, 'subprocess' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
