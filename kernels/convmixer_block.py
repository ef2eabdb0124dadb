"""The ConvMixer block: ``convmixer_block.cc``."""

from __future__ import annotations

import paddle

from kernels import build, settings
from kernels.batchnorm import batch_norm
from kernels.convolution import conv2d
from kernels.dispatch import compiled, run
from kernels.mbconv import Norm

Convolution = tuple[paddle.Tensor, paddle.Tensor | None]
"""Weight and bias, ``[C]`` or None."""


def convmixer_block(x: paddle.Tensor, depthwise: Convolution, norm1: Norm, pointwise: Convolution, norm2: Norm,
                    keep_scale: paddle.Tensor | None = None, training: bool = False, momentum: float = 0.9,
                    epsilon: float = 1e-5) -> paddle.Tensor:
    """Return ``norm2(gelu(pointwise(x + keep_scale · norm1(gelu(depthwise(x))))))``.

    One operator within :func:`kernels.bfloat16_products`, which keeps maps in bfloat16 between its steps; for ``C`` a
    multiple of 32.

    Args:
        x: ``[B, C, H, W]``.
        depthwise: of weight ``[C, 1, k, k]``, k odd, with padding k // 2.
        norm1: ``[C]`` each.
        pointwise: of weight ``[C, C, 1, 1]``.
        norm2: ``[C]`` each.
        keep_scale: factors of images, ``[B, 1, 1, 1]``, or None; it has no gradient.
        training: whether mean and variance are those of the batch, as in :func:`kernels.batch_norm`.
        momentum: weight of the old running mean and variance.
        epsilon: is added to the variance.
    """
    tensors = x, *depthwise, *norm1, *pointwise, *norm2, keep_scale
    fits = x.shape[1] % 32 == 0 and all(each.is_contiguous() for each in (*norm1[:2], *norm2[:2]))
    if settings.rounds_to_bfloat16() and fits and compiled(*tensors) and build.library().bfloat16:
        return run("convmixer_block", *tensors, training, momentum, epsilon)
    side = depthwise[0].shape[-1]
    hidden = conv2d(x, *depthwise, 1, side // 2, 1, x.shape[1])
    hidden = batch_norm(hidden, *norm1, training, momentum, epsilon, before="gelu", residual=x, keep_scale=keep_scale)
    return batch_norm(conv2d(hidden, *pointwise), *norm2, training, momentum, epsilon, before="gelu")
