"""The token mixer of an iFormer block: ``inception.cc``."""

from __future__ import annotations

import paddle
from paddle.nn import functional as F

from kernels import build, settings
from kernels.convolution import conv2d
from kernels.dispatch import compiled, run
from kernels.maps import residual
from kernels.multihead_attention import self_attention
from kernels.rows import gelu, layer_norm, linear


def inception_mixer(
    x: paddle.Tensor,
    norm: tuple[paddle.Tensor, paddle.Tensor],
    conv: tuple[paddle.Tensor, paddle.Tensor],
    pool: tuple[paddle.Tensor, paddle.Tensor],
    qkv: tuple[paddle.Tensor, paddle.Tensor | None],
    fuse: paddle.Tensor,
    out: tuple[paddle.Tensor, paddle.Tensor],
    heads: int,
    pool_size: int = 1,
    epsilon: float = 1e-6,
    scale: paddle.Tensor | None = None,
    keep_scale: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """Return ``x + keep_scale · scale · mixer(norm(x))`` with the mixer of Si et al., "Inception Transformer", 2022.

    One operator within :func:`kernels.bfloat16_products`, which keeps tensors between its steps in bfloat16; for ``h``
    a multiple of 8.

    Args:
        x: ``[B, H, W, C]``; ``C = 2h + l``, of which the last ``l`` channels attend.
        norm: weight and bias of a layer norm, ``[C]`` each.
        conv: weights of a 1×1 convolution, ``[2h, h]``, and of the depthwise one after it, ``[2h, 1, 3, 3]``.
        pool: weight of the 1×1 convolution after 3×3 maxima, ``[2h, h]``, and its bias, ``[2h]``.
        qkv: weight ``[l, 3l]`` and bias ``[3l]`` or None of queries, keys and values.
        fuse: weight of the depthwise convolution of all branches, ``[4h + l, 1, 3, 3]``.
        out: weight ``[C, 4h + l]`` and bias ``[C]`` of the last 1×1 convolution.
        heads: of the attention.
        pool_size: size of the average pooling around the attention.
        epsilon: is added to the variance.
        scale: factors of channels, ``[C]``.
        keep_scale: factors of images, ``[B, 1, 1, 1]``, without a gradient.
    """
    half, low = conv[0].shape[1], qkv[0].shape[0]
    tensors = x, *norm, *conv, *pool, *qkv, fuse, *out, scale, keep_scale
    if settings.rounds_to_bfloat16() and half % 8 == 0 and compiled(*tensors) and build.library().bfloat16:
        return run("inception_mixer", *tensors, heads, pool_size, epsilon)
    height, width = x.shape[1:3]
    first, second, third = layer_norm(x, *norm, epsilon).split([half, half, low], axis=-1)

    def depthwise(maps: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
        maps = conv2d(maps.transpose([0, 3, 1, 2]), weight, padding=1, groups=weight.shape[0])
        return maps.transpose([0, 2, 3, 1])

    first = depthwise(linear(first, conv[0], transposed=True), conv[1])
    second = linear(F.max_pool2d(second.transpose([0, 3, 1, 2]), 3, 1, 1).transpose([0, 2, 3, 1]), *pool, True)
    third = F.avg_pool2d(third.transpose([0, 3, 1, 2]), pool_size, ceil_mode=True).transpose([0, 2, 3, 1])
    h, w = third.shape[1:3]
    third = self_attention(linear(third, *qkv).reshape([-1, h * w, 3, heads, low // heads])).reshape([-1, h, w, low])
    third = third.repeat_interleave(pool_size, 1).repeat_interleave(pool_size, 2)[:, :height, :width]
    mixed = paddle.concat([gelu(first), gelu(second), third], axis=-1)
    return residual(x, linear(mixed + depthwise(mixed, fuse), *out, True), scale=scale, keep_scale=keep_scale)
