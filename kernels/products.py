"""Matrix products by oneDNN, which Paddle's wheel carries for its inference engine.

Paddle's own products on the CPU are those of MKLML (2019), which has no AVX-512 path for processors that are not
Intel's: oneDNN is twice as fast there, and nowhere slower that we have seen.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import paddle


@lru_cache(maxsize=1)
def _sgemm() -> ctypes._CFuncPtr | None:
    """Return oneDNN's ``dnnl_sgemm`` (row-major, as in its ``dnnl.h``), None where this Paddle has none."""
    for path in sorted(Path(paddle.__file__).parent.glob("libs/libdnnl.so*")):
        try:
            function = ctypes.CDLL(str(path)).dnnl_sgemm
        except (OSError, AttributeError):
            continue
        letter, size, number, pointer = ctypes.c_char, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
        function.argtypes = [letter] * 2 + [size] * 3 + [number] + [pointer, size] * 2 + [number, pointer, size]
        return function
    return None


def available() -> bool:
    """Tell whether this Paddle carries oneDNN."""
    return _sgemm() is not None


def address() -> int:
    """Return where oneDNN's product is, for the C++ operators; it must be available."""
    return ctypes.cast(_sgemm(), ctypes.c_void_p).value


def product(
    a: paddle.Tensor, b: paddle.Tensor, transpose_a: bool = False, transpose_b: bool = False
) -> paddle.Tensor:
    """Multiply two contiguous float32 matrices of the CPU, either of them transposed first; no gradients."""
    function = _sgemm()
    if function is None:
        return paddle.matmul(a, b, transpose_a, transpose_b)
    rows, inner = a.shape[::-1] if transpose_a else a.shape
    columns = b.shape[0] if transpose_b else b.shape[1]
    out = paddle.empty([rows, columns], dtype="float32")
    flags = (b"T" if transpose_a else b"N", b"T" if transpose_b else b"N")
    operands = (a.data_ptr(), a.shape[1], b.data_ptr(), b.shape[1])
    if function(*flags, rows, columns, inner, 1.0, *operands, 0.0, out.data_ptr(), columns):
        raise RuntimeError(f"oneDNN refused a matrix product of {a.shape} and {b.shape}.")
    return out
