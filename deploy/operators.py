"""Forms of operators that inference engines and ONNX know, used while a network is exported."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import paddle
import paddle.nn.functional as F

import kernels

_attend_map = kernels.attend_map


@contextmanager
def exportable() -> Iterator[None]:
    """Replace the operators of ``kernels`` that engines lack, or compute differently, until the end of the block.

    Paddle 3.3.1 with oneDNN fails on channels-last group norms, and gives wrong results for products over one
    element; paddle2onnx 2.1.0 has no FFT, channel shuffle or channels-last pooling.
    """
    forms = {form.__name__: form for form in (filter_spectrum, channel_shuffle, group_norm, pool_mixer, attend_map)}
    with patch.multiple(kernels, **forms):
        yield


def filter_spectrum(x: paddle.Tensor, real: paddle.Tensor, imag: paddle.Tensor,
                    scores: paddle.Tensor | None = None) -> paddle.Tensor:
    """``kernels.filter_spectrum`` by products with DFT matrices."""
    height, width, channels = x.shape[1:]
    bins = width // 2 + 1
    if scores is not None:
        weights = F.softmax(scores, axis=1)  # [B, K, C]
        real, imag = paddle.matmul(real, weights), paddle.matmul(imag, weights)  # [B, H · bins, C]
    real, imag = (part.reshape([-1, height, bins, channels]) for part in (real, imag))

    cos_h, sin_h = _waves(height, height)
    forward = paddle.to_tensor(np.concatenate([cos_h, -sin_h]))  # [2H, H], the columns' transform: real, imaginary
    columns = paddle.matmul(forward, x.reshape([-1, height, width * channels]))
    re, im = columns.reshape([-1, 2 * height, width, channels]).split([height, height], axis=1)
    cos, sin = (paddle.to_tensor(part) for part in _waves(bins, width))  # [bins, W]
    re, im = (paddle.matmul(cos, re) + paddle.matmul(sin, im),
              paddle.matmul(cos, im) - paddle.matmul(sin, re))  # [B, H, bins, C]

    re, im = re * real - im * imag, re * imag + im * real

    inverse = paddle.to_tensor(np.block([[cos_h, -sin_h], [sin_h, cos_h]]))  # [2H, 2H]
    columns = paddle.matmul(inverse, paddle.concat([re, im], axis=1).reshape([-1, 2 * height, bins * channels]))
    re, im = columns.reshape([-1, 2 * height, bins, channels]).split([height, height], axis=1)
    twice = np.full([bins, 1], 2, np.float32)  # bins that stand for their mirror image too
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    cos, sin = (paddle.to_tensor(np.ascontiguousarray((part * twice).T)) for part in _waves(bins, width))  # [W, bins]
    return paddle.matmul(cos, re) - paddle.matmul(sin, im)


def _waves(bins: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and sines ``[bins, length]`` of an orthonormal DFT, float32."""
    angles = 2 * np.pi / length * (np.outer(np.arange(bins), np.arange(length)) % length)
    return (np.cos(angles) / length**0.5).astype(np.float32), (np.sin(angles) / length**0.5).astype(np.float32)


def channel_shuffle(x: paddle.Tensor, groups: int) -> paddle.Tensor:
    """``kernels.channel_shuffle`` by transposition."""
    channels, height, width = x.shape[1:]
    x = x.reshape([-1, groups, channels // groups, height * width]).transpose([0, 2, 1, 3])
    return x.reshape([-1, channels, height, width])


def group_norm(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor, epsilon: float = 1e-5) -> paddle.Tensor:
    """``kernels.group_norm`` by a layer norm of flattened images."""
    shape = x.shape[1:]
    y = F.layer_norm(x.reshape([-1, math.prod(shape)]), math.prod(shape), epsilon=epsilon)
    return y.reshape([-1, *shape]) * weight + bias


def pool_mixer(x: paddle.Tensor, norm: tuple[paddle.Tensor, paddle.Tensor], size: int, epsilon: float = 1e-5,
               scale: paddle.Tensor | None = None, keep_scale: paddle.Tensor | None = None) -> paddle.Tensor:
    """``kernels.pool_mixer`` by channels-first pooling."""
    normed = group_norm(x, *norm, epsilon)
    pooled = F.avg_pool2d(normed.transpose([0, 3, 1, 2]), size, stride=1, padding=size // 2, exclusive=True)
    return kernels.residual(x, pooled.transpose([0, 2, 3, 1]) - normed, scale=scale, keep_scale=keep_scale)


def attend_map(query: paddle.Tensor, x: paddle.Tensor, heads: int, dropout: float = 0.0) -> paddle.Tensor:
    """``kernels.attend_map``; a map of one position is all that there is to attend to."""
    if x.shape[2] * x.shape[3] > 1:
        return _attend_map(query, x, heads, dropout)
    return paddle.concat([x.reshape([-1, 1, x.shape[1]])] * query.shape[1], axis=1)
