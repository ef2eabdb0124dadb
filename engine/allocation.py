"""Freed memory that stays in the process: Paddle takes each tensor from the C library and gives it back.

The GNU C library in turn takes every block above 32 MB from the operating system and returns it at once, so that the
pages of every big tensor are mapped, cleared one fault at a time and unmapped: half of a training step of
ConvMixer-256/8. Kept, they are used again. Blocks of different sizes leave gaps, so that the peak may be higher: 2.0 GB
for 1.5 with 128 images of ConvMixer-256/8.
"""

from __future__ import annotations

import ctypes
import os

# The environment variables that mean the same to a process that starts, and mallopt's numbers of them (malloc.h).
SETTINGS = {"MALLOC_MMAP_MAX_": ("0", -4), "MALLOC_TRIM_THRESHOLD_": ("-1", -1)}
CHOSEN_BY = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> dict[str, str]:
    """Let this process keep the memory that it frees; returns the settings as the environment would have them.

    Nothing is done, and nothing returned, where the environment holds settings of the C library's allocator already
    (any of ``MALLOC_MMAP_MAX_=65536`` and the like, or ``glibc.malloc`` in ``GLIBC_TUNABLES``), or where the C
    library is another.
    """
    if any(name in os.environ for name in CHOSEN_BY) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return {}
    try:
        if not os.confstr("CS_GNU_LIBC_VERSION"):
            return {}
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, ValueError):
        return {}
    return {name: value for name, (value, number) in SETTINGS.items() if mallopt(number, int(value))}
