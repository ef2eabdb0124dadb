"""The feed-forward branch of a Transformer block: ``feed_forward.cc``."""

from __future__ import annotations

import paddle

from kernels import build, settings
from kernels.dispatch import compiled, run
from kernels.maps import group_norm, residual, star_relu
from kernels.rows import gelu, layer_norm, linear

Layer = tuple[paddle.Tensor, paddle.Tensor | None]
"""Weight and bias."""


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
    if settings.rounds_to_bfloat16() and compiled(*tensors) and build.library().bfloat16:
        return run("feed_forward", *tensors, transposed, of_images, epsilon)
    hidden = linear((group_norm if of_images else layer_norm)(x, *norm, epsilon), *first, transposed)
    hidden = star_relu(hidden, *star) if star else gelu(hidden)
    return residual(x, linear(hidden, *second, transposed), kept, scale, keep_scale)
