"""Operators over channels-last maps, ``[B, H, W, C]``, each with Paddle's own behind it; ``kernels`` exports them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import kernels

if TYPE_CHECKING:
    import paddle


def filter_spectrum(
    x: paddle.Tensor, real: paddle.Tensor, imag: paddle.Tensor, scores: paddle.Tensor | None = None
) -> paddle.Tensor:
    """Multiply the spectrum of each channel by a filter: ``irfft2(rfft2(x) · filter)``.

    Args:
        x: ``[B, H, W, C]``.
        real: real parts of K planes on the half spectrum, ``[H · (W // 2 + 1), K]``.
        imag: imaginary parts.
        scores: ``[B, K, C]``; the softmax over the K planes mixes them for each image and channel. Where None, every
            channel has its plane, K = C.

    Returns:
        ``[B, H, W, C]``.
    """
    if kernels.mode() == "auto":
        from kernels.spectral import filtered

        y = filtered(x, real, imag, scores)
        if y is not None:
            return y
    from paddle import complex as to_complex
    from paddle import fft
    from paddle.nn import functional as F

    if scores is not None:
        real, imag = mix_planes(real, imag, F.softmax(scores, axis=1))
    height, width = x.shape[1:3]
    weight = to_complex(real, imag).reshape([-1, height, width // 2 + 1, x.shape[3]])
    spectrum = fft.rfft2(x, axes=(1, 2), norm="ortho") * weight
    return fft.irfft2(spectrum, s=(height, width), axes=(1, 2), norm="ortho")


def mix_planes(real: paddle.Tensor, imag: paddle.Tensor, weights: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Mix complex planes, in parts ``[M, K]``, by weights ``[B, K, C]``; returns the mix in parts, ``[B, M, C]``."""
    from paddle import matmul

    return matmul(real, weights), matmul(imag, weights)


def residual(
    x: paddle.Tensor,
    branch: paddle.Tensor,
    kept: paddle.Tensor | None = None,
    scale: paddle.Tensor | None = None,
    share: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """Return ``x · kept + share · branch · scale``; what is None counts as 1.

    Args:
        x: ``[B, ..., C]``.
        branch: like ``x``.
        kept: factors of channels, ``[C]``.
        scale: factors of channels, ``[C]``.
        share: factors of images, ``[B, 1, ...]``; it has no gradient.
    """
    if kernels.mode() == "auto":
        from kernels.maps import connected

        y = connected(x, branch, kept, scale, share)
        if y is not None:
            return y
    branch = branch if scale is None else branch * scale
    return (x if kept is None else x * kept) + (branch if share is None else branch * share)


def star_relu(x: paddle.Tensor, scale: paddle.Tensor, bias: paddle.Tensor) -> paddle.Tensor:
    """Return ``scale · relu(x)² + bias``: any shape, with ``[1]`` and ``[1]``."""
    if kernels.mode() == "auto":
        from kernels.maps import activated

        y = activated(x, scale, bias)
        if y is not None:
            return y
    from paddle.nn import functional as F

    return scale * F.relu(x).square() + bias


def group_norm(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor, epsilon: float = 1e-5) -> paddle.Tensor:
    """Normalise each image as a whole, ``[B, H, W, C]``, as ``paddle.nn.functional.group_norm`` with one group."""
    if kernels.mode() == "auto":
        from kernels.maps import normalised

        y = normalised(x, weight, bias, epsilon)
        if y is not None:
            return y
    from paddle.nn import functional as F

    return F.group_norm(x, 1, epsilon, weight, bias, data_format="NHWC")


def pool_difference(x: paddle.Tensor, size: int) -> paddle.Tensor:
    """Return the mean over ``size`` × ``size`` positions around each, without padding, minus the position itself.

    Args:
        x: ``[B, H, W, C]``.
        size: odd.
    """
    if kernels.mode() == "auto":
        from kernels.maps import pooled

        y = pooled(x, size)
        if y is not None:
            return y
    from paddle.nn import functional as F

    return F.avg_pool2d(x, size, stride=1, padding=size // 2, exclusive=True, data_format="NHWC") - x
