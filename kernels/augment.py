"""Transforms of batches of images: ``augment.cc``. No Paddle operator; numpy arrays in and out."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p

import numpy as np

from kernels import build


def transform(images: np.ndarray, rows: np.ndarray, indices: np.ndarray, key: np.ndarray, program: np.ndarray,
              output: np.ndarray) -> None:
    """Write ``images[rows]``, transformed, into ``output``. Releases the interpreter's lock.

    Args:
        images: uint8 ``[N, H, W, 3]``.
        rows: int64 ``[B]``.
        indices: int64 ``[B]``; with ``key`` the seeds of the draws of each image.
        key: int64 ``[P]``.
        program: float64 ``[L]``, the steps (see ``datasets/batch.py``): code, number of arguments, arguments.
        output: float32 ``[B, 3, H', W']``.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images[:1].size:
        raise ValueError(f"images are {images.dtype} {images.shape}, expected uint8 [N, H, W, 3]")
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(images):
        raise IndexError(f"images {rows.min()} to {rows.max()} were asked for, there are {len(images)}")
    if not images.flags.c_contiguous:
        images, rows = np.ascontiguousarray(images[rows]), np.arange(len(rows))
    _check("indices", indices, np.int64, rows.shape)
    _check("key", key, np.int64, key.shape)
    _check("program", program, np.float64, (program.size,))
    _check("output", output, np.float32, (len(rows), 3, *output.shape[2:4]))
    pointers = images.ctypes.data + rows.astype(np.uintp) * np.uintp(images.strides[0])
    function = build.library().handle.augment_batch
    function.restype, function.argtypes = c_int, [
        c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_void_p]
    if function(len(rows), pointers.ctypes.data, *images.shape[1:3], indices.ctypes.data, key.ctypes.data, key.size,
                program.ctypes.data, program.size, *output.shape[2:], output.ctypes.data):
        raise MemoryError("the compiled pipeline found no memory for an image")


def _check(name: str, array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(f"{name} is {array.dtype} {array.shape}, expected contiguous {dtype.__name__} {shape}")
