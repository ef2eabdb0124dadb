"""Filters in the frequency domain: ``filter.cc``."""

from __future__ import annotations

import paddle
from paddle import fft
from paddle.nn import functional as F

from kernels.dispatch import compiled, run


def filter_spectrum(
    x: paddle.Tensor, real: paddle.Tensor, imag: paddle.Tensor, scores: paddle.Tensor | None = None
) -> paddle.Tensor:
    """Multiply the spectrum of each channel by a filter: ``irfft2(rfft2(x) · filter)``.

    Args:
        x: ``[B, H, W, C]``.
        real: real parts of K planes on the half spectrum, ``[H · (W // 2 + 1), K]``.
        imag: imaginary parts.
        scores: ``[B, K, C]``; the softmax over the K planes mixes them for each image and channel. None: each channel
            has its own plane, K = C.

    Returns:
        ``[B, H, W, C]``.
    """
    if compiled(x, real, imag, scores):
        return run("filter_spectrum", x, real, imag, scores)
    if scores is not None:
        real, imag = mix_planes(real, imag, F.softmax(scores, axis=1))
    height, width = x.shape[1:3]
    weight = paddle.complex(real, imag).reshape([-1, height, width // 2 + 1, x.shape[3]])
    spectrum = fft.rfft2(x, axes=(1, 2), norm="ortho") * weight
    return fft.irfft2(spectrum, s=(height, width), axes=(1, 2), norm="ortho")


def mix_planes(real: paddle.Tensor, imag: paddle.Tensor, weights: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Mix complex planes, in parts ``[M, K]``, by weights ``[B, K, C]``; returns the mix in parts, ``[B, M, C]``."""
    return paddle.matmul(real, weights), paddle.matmul(imag, weights)
