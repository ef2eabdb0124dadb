"""Compiled CPU operators, each with the stock Paddle operator of the same meaning behind it.

Nothing happens at import: Paddle is imported and the C++ source compiled (once, into a cache) when an operator
is first called. Wherever the compiled operator does not apply (GPU and its mixed precision, tensors other than float32,
static graphs, dilation, no compiler) Paddle's own runs instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from errors import UserError, nearest
from kernels.channels_first import batch_norm, channel_shuffle, dynamic_relu
from kernels.channels_last import filter_spectrum, group_norm, pool_difference, residual, star_relu
from kernels.tokens import attend_map, attend_tokens

if TYPE_CHECKING:
    import paddle

__all__ = [
    "MODES", "attend_map", "attend_tokens", "attention", "batch_norm", "bfloat16_products", "channel_shuffle",
    "configure", "conv2d", "depthwise_conv2d", "dynamic_relu", "filter_spectrum", "gelu", "group_norm", "layer_norm",
    "linear", "mode", "pool_difference", "product", "residual", "self_attention", "star_relu", "status", "using",
]
MODES = ("auto", "stock")

_mode = "auto"


def configure(mode: str) -> None:
    """Choose the operators: ``auto`` (compiled where they apply) or ``stock`` (Paddle's everywhere).

    Raises:
        UserError: for any other mode.
    """
    global _mode
    if mode not in MODES:
        raise UserError(f"RUNTIME.KERNELS is {mode!r}, expected one of {', '.join(MODES)}{nearest(str(mode), MODES)}.")
    _mode = mode


def mode() -> str:
    """Return what :func:`configure` has chosen."""
    return _mode


@contextmanager
def using(mode: str) -> Iterator[None]:
    """Choose the operators until the end of the block (see :func:`configure`)."""
    before = _mode
    configure(mode)
    try:
        yield
    finally:
        configure(before)


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Mixed precision of the CPU, until the end of the block; backward passes follow what their forward pass did.

    :func:`linear` and dense :func:`conv2d` round their operands to bfloat16 and sum in float32; all tensors, and all
    other operators, stay float32. ``status()["bfloat16"]`` tells whether there is such a product.
    """
    from kernels import products

    with products.bfloat16():
        yield


def status() -> dict[str, Any]:
    """Tell what runs on the CPU, for the log; compiles the operators in ``auto`` mode.

    Returns:
        ``mode``; ``in_use``; ``reason`` (why not, else None); and of the library in use ``library`` (path),
        ``compiler``, ``flags``, ``threads``, ``products`` (whose matrix products) and ``bfloat16`` (whether
        :func:`bfloat16_products` has any).
    """
    if _mode == "stock":
        return {"mode": _mode, "in_use": False, "reason": "stock operators were asked for"}
    from kernels import build

    library = build.library()
    if isinstance(library, build.Unavailable):
        return {"mode": _mode, "in_use": False, "reason": library.reason}
    return {"mode": _mode, "in_use": True, "reason": None, **library.about()}


def conv2d(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> paddle.Tensor:
    """Convolve as ``paddle.nn.functional.conv2d``; compiled are dense, grouped and depthwise convolutions.

    On the CPU it has first derivatives only, like Paddle's own.

    Args:
        x: ``[B, C, H, W]``.
        weight: ``[C', C / groups, kh, kw]``.
        bias: ``[C']`` or None.
        stride: one step, or ``(vertical, horizontal)``; compiled for equal ones, depthwise for 1 and 2.
        padding: zeros around the map: one number, ``(vertical, horizontal)``, ``(top, bottom, left, right)``,
            ``"VALID"`` or ``"SAME"``.
        dilation: distance of the taps; other than 1 is left to Paddle.
        groups: groups of channels.

    Returns:
        ``[B, C', H', W']``, in the precision of ``x``.

    Raises:
        UserError: when the kernel is larger than the padded map (compiled operator; Paddle's returns a size of -1).
    """
    if _mode == "auto":
        from kernels.convolution import convolve

        y = convolve(x, weight, bias, stride, padding, dilation, groups)
        if y is not None:
            return y
    from paddle.nn.functional import conv2d as stock

    y = stock(x, weight, None, stride, padding, dilation, groups)
    # Paddle adds a bias as [1, C', 1, 1], which its broadcast on the CPU takes up to ten times as long for.
    return y if bias is None else y + bias.reshape([-1, 1, 1])


def depthwise_conv2d(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> paddle.Tensor:
    """Convolve every channel with its own filter, ``[C, 1, kh, kw]``: :func:`conv2d` with ``groups=C``."""
    return conv2d(x, weight, bias, stride, padding, dilation, x.shape[1])


def gelu(x: paddle.Tensor) -> paddle.Tensor:
    """Return ``x`` times the normal distribution function of ``x``, as ``paddle.nn.functional.gelu``; any shape."""
    if _mode == "auto":
        from kernels import dispatch, rows

        if dispatch.usable(x):
            return rows.Gelu.apply(x)
    from paddle.nn.functional import gelu as stock

    return stock(x)


def linear(
    x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None = None, transposed: bool = False
) -> paddle.Tensor:
    """Return ``x @ weight + bias`` as ``paddle.nn.functional.linear``, with oneDNN's products on the CPU for all but
    small layers.

    Args:
        x: ``[..., C]``.
        weight: ``[C, D]``; ``[D, C]`` (as 1×1 convolutions have it, flattened) where ``transposed``.
        bias: ``[D]`` or None.
        transposed: whether the outputs are the first axis of ``weight``.

    Returns:
        ``[..., D]``.
    """
    if _mode == "auto":
        from kernels import dispatch, rows

        features, outputs = weight.shape[::-1] if transposed else weight.shape
        fitting = x.shape[-1] == features and (bias is None or bias.shape == [outputs])
        if fitting and x.ndim > 1 and dispatch.usable(x, weight, bias) and rows.worthwhile(x, outputs):
            inputs = (x, weight) if bias is None else (x, weight, bias)
            return rows.Linear.apply(*inputs, transposed=transposed)
    from paddle.nn.functional import linear as stock

    return stock(x, weight.t() if transposed else weight, bias)


def product(a: paddle.Tensor, b: paddle.Tensor, transpose_b: bool = False) -> paddle.Tensor:
    """Multiply two matrices, without gradients.

    Args:
        a: ``[m, k]``, contiguous.
        b: ``[k, n]``, or with ``transpose_b`` ``[n, k]``, contiguous.
        transpose_b: transpose it first.

    Returns:
        ``[m, n]``. Within :func:`bfloat16_products` the operands are rounded where the CPU has such products.
    """
    if _mode == "auto":
        from kernels.products import multiply

        y = multiply(a, b, transpose_b)
        if y is not None:
            return y
    return a.matmul(b, transpose_y=transpose_b)


def layer_norm(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor, epsilon: float = 1e-5) -> paddle.Tensor:
    """Normalise the last axis as ``paddle.nn.functional.layer_norm``: ``[..., C]`` with ``[C]`` and ``[C]``."""
    if _mode == "auto":
        from kernels import dispatch, rows

        if dispatch.usable(x, weight, bias) and x.shape[-1:] == weight.shape == bias.shape:
            return rows.LayerNorm.apply(x, weight, bias, epsilon)
    from paddle.nn.functional import layer_norm as stock

    return stock(x, weight.shape, weight, bias, epsilon)


def attention(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> paddle.Tensor:
    """Return ``softmax(scale · query keyᵀ + bias) value`` for every head.

    Args:
        query: ``[B, N, heads, d]``.
        key: ``[B, M, heads, d]``.
        value: ``[B, M, heads, d]``.
        bias: ``[heads, N, M]`` or None.
        scale: factor of the products, ``1 / √d`` where None.
        dropout: rate at which probabilities are dropped; other than 0 is left to Paddle.

    Returns:
        ``[B, N, heads, d]``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if _mode == "auto" and not dropout:
        from kernels.softmax_attention import attended

        y = attended(query, key, value, bias, scale)
        if y is not None:
            return y
    from paddle import matmul
    from paddle.nn import functional as F

    query, key, value = (x.transpose([0, 2, 1, 3]) for x in (query, key, value))
    logits = matmul(query * scale, key, transpose_y=True)
    attn = F.softmax(logits if bias is None else logits + bias, axis=-1)
    return matmul(F.dropout(attn, dropout) if dropout else attn, value).transpose([0, 2, 1, 3])


def self_attention(
    qkv: paddle.Tensor, bias: paddle.Tensor | None = None, scale: float | None = None, dropout: float = 0.0
) -> paddle.Tensor:
    """Return :func:`attention` of packed queries, keys and values, without taking them apart.

    Args:
        qkv: ``[B, N, 3, heads, d]``.
        bias: ``[heads, N, N]`` or None.
        scale: factor of the products, ``1 / √d`` where None.
        dropout: rate at which probabilities are dropped; other than 0 is left to Paddle.

    Returns:
        ``[B, N, heads, d]``.
    """
    if _mode == "auto" and not dropout:
        from kernels.softmax_attention import self_attended

        y = self_attended(qkv, bias, scale)
        if y is not None:
            return y
    return attention(*qkv.unbind(2), bias, scale, dropout)
