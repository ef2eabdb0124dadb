"""Memory that is freed stays in the process, unless the user has chosen otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from processes import ROOT

# Takes and frees 64 MB three times, and counts the page faults of the last two.
PROGRAM = """
import ctypes, json, resource, sys
from engine.runtime import keep_freed_memory
settings = keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def touch():
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch(), touch()
print(json.dumps([settings, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def run(**environment: str) -> tuple[dict[str, str], int]:
    """Return the settings taken and the page faults."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env={**given, **environment}, check=True,
                          capture_output=True, text=True, timeout=60)
    return tuple(json.loads(done.stdout))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the GNU C library")
def test_freed_pages_are_used_again() -> None:
    settings, faults = run()
    assert settings == {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
    assert faults < 100


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the GNU C library")
@pytest.mark.parametrize("chosen", [{"MALLOC_MMAP_MAX_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}])
def test_what_the_user_has_chosen_stays(chosen: dict[str, str]) -> None:
    settings, faults = run(**chosen)
    assert settings == {}
    assert faults > 1000 or "MALLOC_MMAP_MAX_" not in chosen  # pages of 4 KB, unless the kernel gives bigger ones


def test_settings_mean_the_same_in_the_environment() -> None:
    settings, _ = run()
    _, faults = run(**settings)
    assert faults < 100
