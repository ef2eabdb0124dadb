"""Matrix products by oneDNN, which Paddle's wheel carries for its inference engine.

Paddle's own products on the CPU are those of MKLML (2019), which has no AVX-512 path for processors that are not
Intel's: oneDNN is twice as fast there, and nowhere slower that we have seen. Within :func:`bfloat16`, fully connected
layers and dense convolutions take an operator of ours (``bfloat16.cc``) that rounds its operands to bfloat16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import paddle

from kernels.tensors import empty

_rounding = False  # whether operands are rounded to bfloat16


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


@contextmanager
def bfloat16() -> Iterator[None]:
    """Round the operands of :func:`current` to bfloat16 until the end of the block."""
    global _rounding
    before, _rounding = _rounding, True
    try:
        yield
    finally:
        _rounding = before


def rounding() -> bool:
    """Tell whether this is within :func:`bfloat16`."""
    return _rounding


def current() -> ctypes._CFuncPtr | None:
    """Return the product that layers built now take, forward and backward; None where this Paddle has no oneDNN."""
    if not _rounding:
        return _sgemm()
    from kernels import build

    return build.library().bfloat16_product


def address(function: ctypes._CFuncPtr | None = None) -> int:
    """Return where a product is, oneDNN's unless told (it must be available), for the C++ operators."""
    return ctypes.cast(function or _sgemm(), ctypes.c_void_p).value


def product(
    a: paddle.Tensor,
    b: paddle.Tensor,
    transpose_a: bool = False,
    transpose_b: bool = False,
    *,
    function: ctypes._CFuncPtr | None,
) -> paddle.Tensor:
    """Multiply two contiguous float32 matrices of the CPU, either of them transposed first; no gradients.

    ``function`` is one that :func:`current` has returned; Paddle's own product where it is None.
    """
    if function is None:
        return paddle.matmul(a, b, transpose_a, transpose_b)
    rows, inner = a.shape[::-1] if transpose_a else a.shape
    columns = b.shape[0] if transpose_b else b.shape[1]
    out = empty(rows, columns)
    flags = (b"T" if transpose_a else b"N", b"T" if transpose_b else b"N")
    operands = (a.data_ptr(), a.shape[1], b.data_ptr(), b.shape[1])
    if function(*flags, rows, columns, inner, 1.0, *operands, 0.0, out.data_ptr(), columns):
        raise RuntimeError(f"A matrix product of {a.shape} and {b.shape} was refused.")
    return out


def multiply(a: paddle.Tensor, b: paddle.Tensor, transpose_b: bool) -> paddle.Tensor | None:
    """Return the product of :func:`kernels.product`; None where neither oneDNN nor our operator takes it."""
    from kernels import build
    from kernels.dispatch import usable

    if not usable(a, b) or not available():
        return None
    function = current() if not rounding() or build.library().bfloat16 else _sgemm()
    return product(a, b, transpose_b=transpose_b, function=function)
