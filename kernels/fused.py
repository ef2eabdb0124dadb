"""Blocks and branches that are one operator, or two, within :func:`kernels.bfloat16_products`, else their parts.

``feed_forward.cc``, ``inception.cc``, ``pooling.cc``, ``mbconv.cc`` and ``convmixer_block.cc``.
"""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle.nn import functional as F

from kernels.convolution import conv2d
from kernels.dispatch import compiled, compiled_bfloat16, run
from kernels.maps import batch_norm, channels_last, group_norm, residual, star_relu
from kernels.multihead_attention import self_attention
from kernels.rows import gelu, layer_norm, linear, mean

Layer = tuple[paddle.Tensor, paddle.Tensor | None]
"""Weight and bias of a fully connected layer or convolution."""
Norm = tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor, paddle.Tensor]
"""Running mean, running variance, weight and bias of a batch norm, as :func:`kernels.batch_norm` takes them."""


def feed_forward(
    x: paddle.Tensor,
    norm: tuple[paddle.Tensor, paddle.Tensor],
    first: Layer,
    second: Layer,
    epsilon: float = 1e-5,
    transposed: bool = False,
    kept: paddle.Tensor | None = None,
    scale: paddle.Tensor | None = None,
    keep_scale: paddle.Tensor | None = None,
    star: tuple[paddle.Tensor, paddle.Tensor] | None = None,
    of_images: bool = False,
) -> paddle.Tensor:
    """Return ``x · kept + keep_scale · scale · second(act(first(norm(x))))``; None counts as 1.

    One operator within :func:`kernels.bfloat16_products`, with a hidden layer rounded to bfloat16.

    Args:
        x: ``[B, ..., C]``.
        norm: weight and bias of a layer norm, or of :func:`kernels.group_norm` where ``of_images``, ``[C]`` each.
        first: weight ``[C, D]`` (``[D, C]`` where ``transposed``) and bias ``[D]`` or None.
        second: weight ``[D, C]`` (``[C, D]`` where ``transposed``) and bias ``[C]`` or None.
        epsilon: is added to the variance.
        transposed: as in :func:`kernels.linear`.
        kept: factors of channels, ``[C]``.
        scale: factors of channels, ``[C]``.
        keep_scale: factors of images, ``[B, 1, ...]``, without a gradient.
        star: scale and bias of :func:`kernels.star_relu` as the activation, ``[1]`` each; None for GELU.
        of_images: whether the norm is that of each image as a whole.
    """
    tensors = x, *norm, *first, *second, kept, scale, keep_scale, *(star or (None, None))
    if compiled_bfloat16(*tensors):
        return run("feed_forward", *tensors, transposed, of_images, epsilon)
    hidden = linear((group_norm if of_images else layer_norm)(x, *norm, epsilon), *first, transposed)
    hidden = star_relu(hidden, *star) if star else gelu(hidden)
    return residual(x, linear(hidden, *second, transposed), kept, scale, keep_scale)


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
    if half % 8 == 0 and compiled_bfloat16(*tensors):
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


def pool_mixer(
    x: paddle.Tensor,
    norm: tuple[paddle.Tensor, paddle.Tensor],
    size: int,
    epsilon: float = 1e-5,
    scale: paddle.Tensor | None = None,
    keep_scale: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """Return ``x + keep_scale · scale · (pool(norm(x)) - norm(x))``; None counts as 1.

    Args:
        x: ``[B, H, W, C]``.
        norm: weight and bias of the group norm, ``[C]`` each. The bias has no effect.
        size: of the window, odd. Positions outside of the map do not count.
        epsilon: is added to the variance.
        scale: factors of channels, ``[C]``.
        keep_scale: factors of images, ``[B, 1, 1, 1]``, without a gradient.
    """
    if compiled(x, *norm, scale, keep_scale):
        return run("pool_mixer", x, *norm, scale, keep_scale, size // 2, epsilon)
    normed = group_norm(x, *norm, epsilon)
    pooled = F.avg_pool2d(normed, size, stride=1, padding=size // 2, exclusive=True, data_format="NHWC")
    return residual(x, pooled - normed, scale=scale, keep_scale=keep_scale)


def mbconv(
    x: paddle.Tensor,
    expand: paddle.Tensor,
    norm1: Norm,
    depthwise: paddle.Tensor,
    norm2: Norm,
    gate: Callable[[paddle.Tensor], paddle.Tensor],
    project: tuple[paddle.Tensor, paddle.Tensor | None],
    stride: int = 1,
    training: bool = False,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
) -> paddle.Tensor:
    """Return ``project(h · gate(mean of h))`` with ``h = gelu(norm2(depthwise(gelu(norm1(expand(x))))))``.

    Two operators within :func:`kernels.bfloat16_products`, which keep maps of the hidden layer in bfloat16; for ``D`` a
    multiple of 32.

    Args:
        x: ``[B, C, H, W]``.
        expand: weight of a 1×1 convolution, ``[D, C, 1, 1]``.
        norm1: ``[D]`` each.
        depthwise: weight of a convolution with padding 1, ``[D, 1, 3, 3]``.
        norm2: ``[D]`` each.
        gate: takes means of maps and returns factors of channels, both ``[B, D]``.
        project: weight of a 1×1 convolution, ``[C', D, 1, 1]``, and its bias, ``[C']`` or None.
        stride: of the depthwise convolution, 1 or 2.
        training: whether mean and variance are those of the batch, as in :func:`kernels.batch_norm`.
        momentum: weight of the old running mean and variance.
        epsilon: is added to the variance.

    Returns:
        ``[B, C', ⌈H / stride⌉, ⌈W / stride⌉]``.
    """
    tensors = x, expand, *norm1, depthwise, *norm2
    fits = expand.shape[0] % 32 == 0 and all(each.is_contiguous() for each in (*norm1[:2], *norm2[:2]))
    if fits and compiled_bfloat16(*tensors, *project):
        maps, norm, means = run("mbconv_expand", *tensors, stride, training, momentum, epsilon, results=3)
        return run("mbconv_project", maps, norm, gate(means), *project)
    hidden = conv2d(x, expand)
    hidden = batch_norm(hidden, *norm1, training, momentum, epsilon, after="gelu")
    hidden = conv2d(hidden, depthwise, None, stride, 1, 1, depthwise.shape[0])
    hidden = batch_norm(hidden, *norm2, training, momentum, epsilon, after="gelu")
    return conv2d(hidden * gate(mean(hidden.flatten(2), -1)).unsqueeze([2, 3]), *project)


def convmixer_block(x: paddle.Tensor, depthwise: Layer, norm1: Norm, pointwise: Layer, norm2: Norm,
                    keep_scale: paddle.Tensor | None = None, training: bool = False, momentum: float = 0.9,
                    epsilon: float = 1e-5) -> paddle.Tensor:
    """Return ``norm2(gelu(pointwise(x + keep_scale · norm1(gelu(depthwise(x))))))``.

    One operator within :func:`kernels.bfloat16_products`, which keeps maps in bfloat16 between its steps; for ``C`` a
    multiple of 32. Its result is a view of a channels-last map, which the next block takes as it is.

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
    if fits and compiled_bfloat16(*tensors):
        y = run("convmixer_block", channels_last(x), *tensors[1:], training, momentum, epsilon)
        return y.transpose([0, 3, 1, 2])
    side = depthwise[0].shape[-1]
    hidden = conv2d(x, *depthwise, 1, side // 2, 1, x.shape[1])
    hidden = batch_norm(hidden, *norm1, training, momentum, epsilon, before="gelu", residual=x, keep_scale=keep_scale)
    return batch_norm(conv2d(hidden, *pointwise), *norm2, training, momentum, epsilon, before="gelu")
