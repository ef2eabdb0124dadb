"""The inverted bottleneck with squeeze-and-excitation: ``mbconv.cc``."""

from __future__ import annotations

from collections.abc import Callable

import paddle

from kernels import build, settings
from kernels.batchnorm import batch_norm
from kernels.convolution import conv2d
from kernels.dispatch import compiled, run

Norm = tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor, paddle.Tensor]
"""Running mean, running variance, weight and bias of a batch norm, as :func:`kernels.batch_norm` takes them."""


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
    if settings.rounds_to_bfloat16() and fits and compiled(*tensors, *project) and build.library().bfloat16:
        maps, norm, means = run("mbconv_expand", *tensors, stride, training, momentum, epsilon, results=3)
        return run("mbconv_project", maps, norm, gate(means), *project)
    hidden = conv2d(x, expand)
    hidden = batch_norm(hidden, *norm1, training, momentum, epsilon, after="gelu")
    hidden = conv2d(hidden, depthwise, None, stride, 1, 1, depthwise.shape[0])
    hidden = batch_norm(hidden, *norm2, training, momentum, epsilon, after="gelu")
    return conv2d(hidden * gate(hidden.flatten(2).mean(-1)).unsqueeze([2, 3]), *project)
