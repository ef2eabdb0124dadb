"""What this machine can do at most: bytes to and from memory."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

ARRAY_BYTES = 128 << 20  # of each array: several times any cache
PIECE = 16_384  # float32 values: a piece of a triad stays in the first-level caches


def bandwidth(threads: int, rounds: int = 5) -> dict[str, float]:
    """Return the best GB/s of ``copy`` (b = a) and ``triad`` (c = a + 3 b), as STREAM counts: two and three arrays.

    Source: McCalpin, Memory bandwidth and machine balance, 1995. What a write reads first is not counted.
    """
    count = ARRAY_BYTES // 4
    a, b, c = (np.full(count, value, np.float32) for value in (1, 2, 3))
    shares = [slice(count * i // threads, count * (i + 1) // threads) for i in range(threads)]
    scratch = [np.empty(PIECE, np.float32) for _ in shares]

    def copy(thread: int) -> None:
        np.copyto(b[shares[thread]], a[shares[thread]])

    def triad(thread: int) -> None:
        share = shares[thread]
        for start in range(share.start, share.stop, PIECE):
            piece = slice(start, min(start + PIECE, share.stop))
            product = scratch[thread][: piece.stop - start]
            np.multiply(b[piece], np.float32(3), out=product)
            np.add(a[piece], product, out=c[piece])

    best = {}
    with ThreadPoolExecutor(threads) as pool:
        for function, arrays in ((copy, 2), (triad, 3)):
            seconds = []
            for _ in range(rounds):
                started = time.perf_counter()
                list(pool.map(function, range(threads)))
                seconds.append(time.perf_counter() - started)
            best[function.__name__] = arrays * ARRAY_BYTES / min(seconds) / 1e9
    return best
