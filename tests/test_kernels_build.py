"""The library of compiled operators: building, the cache, vectors of other widths, and running without it."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle
import pytest
from kernel_checks import compiled

import kernels
from kernels import build
from processes import python


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, two small sources, and a library that is not loaded over the one in use."""
    monkeypatch.setenv("PADDLE_HYBRID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SOURCES", tuple(path for path in build.SOURCES if path.stem in {"library", "matmul"}))
    monkeypatch.setattr(build, "FLAGS", ("-std=c++17", "-O0", "-march=native", "-fPIC", "-fopenmp"))
    monkeypatch.setattr(build, "Library", lambda path, compiler: (path, path.read_bytes()))
    monkeypatch.setattr(build, "_library", None)
    return tmp_path / "cache"


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("vectors", ["avx2", "sse2"])
def test_narrower_vectors(vectors, tmp_path, monkeypatch):
    if vectors not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {vectors}")
    monkeypatch.setenv("PADDLE_HYBRID_CACHE", str(tmp_path))
    code = (f"import sys, pytest; from kernels import build\n"
            f"build.FLAGS = ('-std=c++17', '-O2', '-m{vectors}', '-fPIC', '-fopenmp')\n"
            f"sys.exit(pytest.main(['-q', '-x', 'tests/test_kernels.py', '-k', 'parity or threads']))")
    python(code, timeout=None)


@compiled
def test_builds_at_once_make_one_library_and_damaged_ones_are_built_again(cache, monkeypatch):
    built, original = [], build._build
    monkeypatch.setattr(build, "_build", lambda *arguments: built.append(1) or time.sleep(0.5) or original(*arguments))
    with ThreadPoolExecutor(2) as pool:
        (path, content), other = pool.map(lambda _: build._load(), range(2))
    assert other == (path, content) and len(built) == 1
    assert path.parent.parent == cache / "kernels"
    assert sorted(item.name for item in path.parent.iterdir()) == [path.name, "lock"]
    for damaged in (content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1])):
        path.unlink()
        path.write_bytes(damaged)
        path, content = build._load()
        assert [*cache.rglob("*.so")] == [path] and content != damaged
        assert path.name == build._name(build._digest(path))
    assert len(built) == 3 and build._load() == (path, content) and len(built) == 3


@compiled
def test_cache_that_cannot_be_written(cache):
    cache.write_text("a file where the folder should be")
    path, content = build._load()
    assert content.startswith(b"\x7fELF") and not path.exists()


def refused(monkeypatch, **environment):
    """Return why there is no library in this environment, where the stock operators go on."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(build, "_library", None)
    status = kernels.status()
    np.testing.assert_allclose(kernels.gelu(paddle.to_tensor([1.0])).numpy(), [0.84134475], rtol=1e-6)
    assert not status["in_use"]
    return status["reason"]


def test_without_a_compiler(cache, monkeypatch):
    assert "no C++ compiler found" in refused(monkeypatch, PATH="", CXX="")
    assert not cache.exists()


def test_compiler_that_fails(cache, tmp_path, monkeypatch):
    fake = tmp_path / "g++"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo fake 1.0 && exit 0\necho "no such option" >&2\nexit 1\n')
    fake.chmod(0o755)
    assert "failed: no such option" in refused(monkeypatch, CXX=str(fake))


@compiled
def test_missing_symbols_are_found_when_building(cache, tmp_path, monkeypatch):
    """A library that Paddle's would end the process at a call is not built."""
    broken = tmp_path / "broken.cc"
    broken.write_text("void missing();\nvoid call() { missing(); }\n")
    monkeypatch.setattr(build, "SOURCES", (broken,))
    assert "missing" in refused(monkeypatch)


def test_import_does_no_work():
    printed = python("import sys, kernels; print('paddle' in sys.modules, 'subprocess' in sys.modules)")
    assert printed.split() == ["False", "False"]
