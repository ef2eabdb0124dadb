"""The library of compiled operators: building, the cache, threads, and running without it."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import paddle
import pytest
from kernel_checks import compiled

import kernels
from kernels import build

ROOT = Path(__file__).parents[1]

# An operator, and the shapes of its inputs.
CASES = [
    (partial(kernels.depthwise_conv2d, stride=1, padding=1), (3, 20, 4, 4), (20, 1, 3, 3), (20,)),
    (partial(kernels.depthwise_conv2d, stride=2, padding=(2, 1)), (2, 33, 9, 30), (33, 1, 5, 3), (33,)),
    (partial(kernels.depthwise_conv2d, stride=1, padding="SAME"), (1, 9, 90, 120), (9, 1, 7, 7)),
    (partial(kernels.conv2d, stride=2, padding=1), (3, 5, 9, 8), (7, 5, 3, 3), (7,)),
    (kernels.conv2d, (30, 5, 3, 4), (7, 5, 1, 1), (7,)),
    (kernels.attention, (2, 9, 3, 20), (2, 50, 3, 20), (2, 50, 3, 20), (3, 9, 50)),
    (kernels.self_attention, (2, 70, 3, 2, 32)),
    (kernels.gelu, (3, 1000)),
    (kernels.linear, (9, 5, 20), (20, 37), (37,)),
    (kernels.layer_norm, (9, 5, 37), (37,), (37,)),
]


@pytest.fixture(autouse=True)
def back_to_auto():
    yield
    kernels.configure("auto")


@compiled
@pytest.mark.parametrize("lanes", ["avx512f", "avx2", "sse2"])
def test_every_vector_width(lanes, monkeypatch, tmp_path):
    if lanes not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {lanes}")
    monkeypatch.setenv("PADDLE_HYBRID_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-std=c++17", "-O2", f"-m{lanes}", "-fPIC", "-fopenmp"))
    monkeypatch.setattr(build, "_library", None)
    assert kernels.status()["reason"] is None
    draw = np.random.default_rng(0).standard_normal
    for function, *sizes in CASES:
        values = [draw(size).astype("float32") for size in sizes]
        found = {}
        for mode in ("stock", "auto"):
            kernels.configure(mode)
            inputs = [paddle.to_tensor(item, stop_gradient=False) for item in values]
            y = function(*inputs)
            y.backward(y)
            found[mode] = [y.numpy(), *(item.grad.numpy() for item in inputs)]
        for want, got in zip(*found.values(), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)
# What a process of its own prints: its status, then a digest of an output and its gradients.
PROGRAM = """
import hashlib, sys
import numpy as np
import paddle
import kernels
status = kernels.status()
digest = hashlib.sha256()

def add(function, *sizes, matrix_product=False):
    draw = np.random.default_rng(0).standard_normal
    inputs = [paddle.to_tensor(draw(size).astype("float32"), stop_gradient=False) for size in sizes]
    y = function(*inputs)
    y.backward(paddle.to_tensor(draw(y.shape).astype("float32")))
    for item in inputs[-1:] if matrix_product else [y, *inputs]:  # Paddle's matrix product may depend on threads
        digest.update((item if item is y else item.grad).numpy().tobytes())

for repeat in range(2):
    add(lambda *a: kernels.depthwise_conv2d(*a, 1, 1), (21, 100, 12, 10), (100, 1, 3, 3), (100,))
    add(lambda *a: kernels.depthwise_conv2d(*a, 2, 3), (3, 9, 130, 110), (9, 1, 7, 7), (9,))
    add(kernels.dynamic_relu, (21, 45, 12, 11), (21, 45), (21, 45))
    add(lambda *a: kernels.conv2d(*a, 1, 1, 1, 30), (21, 30, 12, 11), (90, 1, 3, 3), (90,))
    add(kernels.gelu, (210, 1000))
    add(kernels.self_attention, (20, 50, 3, 3, 24), (3, 50, 50))
    add(kernels.attention, (3, 90, 3, 32), (3, 500, 3, 32), (3, 500, 3, 32))
    add(kernels.layer_norm, (21, 90, 77), (77,), (77,))
    add(kernels.linear, (21, 900, 5), (5, 77), (77,), matrix_product=True)
    add(lambda x: kernels.channel_shuffle(x, 5), (21, 45, 12, 11))
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
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))  # it is built four times
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
def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "kernels").write_text("a file where the folder should be")
    monkeypatch.setenv("PADDLE_HYBRID_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_library", None)
    assert kernels.status()["in_use"]
    np.testing.assert_allclose(kernels.gelu(paddle.to_tensor([1.0])).numpy(), [0.84134475], rtol=1e-6)


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
