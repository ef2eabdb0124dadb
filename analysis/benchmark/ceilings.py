"""Memory bandwidth of this machine, as STREAM counts it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

ARRAY_BYTES = 128 << 20  # of each array: several times any cache
PIECE = 16_384  # float32 values: a piece of a triad stays in the first-level caches


def bandwidth(threads: int, rounds: int = 5) -> dict[str, float]:
    """Return the best GB/s of ``copy`` (b = a) and ``triad`` (c = a + 3 b): two and three arrays.

    Source: McCalpin, Memory bandwidth and machine balance, 1995. What a write reads first is not counted.
    """
    count = ARRAY_BYTES // 4
    a, b, c = (np.full(count, value, np.float32) for value in (1, 2, 3))
    spans = [range(count * i // threads, count * (i + 1) // threads) for i in range(threads)]

    def copy(span: range) -> None:
        np.copyto(b[span.start : span.stop], a[span.start : span.stop])

    def triad(span: range) -> None:
        product = np.empty(PIECE, np.float32)
        for start in range(span.start, span.stop, PIECE):
            piece = slice(start, min(start + PIECE, span.stop))
            scaled = np.multiply(b[piece], np.float32(3), out=product[: piece.stop - start])
            np.add(a[piece], scaled, out=c[piece])

    best = {}
    with ThreadPoolExecutor(threads) as pool:
        for function, arrays in ((copy, 2), (triad, 3)):
            seconds = []
            for _ in range(rounds):
                started = time.perf_counter()
                list(pool.map(function, spans))
                seconds.append(time.perf_counter() - started)
            best[function.__name__] = arrays * ARRAY_BYTES / min(seconds) / 1e9
    return best
