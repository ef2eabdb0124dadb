"""Count a network's trainable parameters, and the multiply-accumulates and activations of one image.

Counted are convolutions, fully connected layers and matrix products (matmul, bmm, einsum), without biases; not norms,
activation functions, pooling, element-wise products and FFTs. A complex product counts as one. Activations are the
outputs of the counted operations, as in fvcore's ``ActivationCountAnalysis``.

The counts come from one forward pass in which the functions that enter Paddle's C++ operators are wrapped, so that
layers, ``paddle.nn.functional`` and operators like ``@`` are all seen.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import _C_ops, nn

import kernels
from kernels import filter
from utils import pair


@dataclass(frozen=True)
class Complexity:
    """The cost of one image in evaluation mode."""

    parameters: int
    macs: int
    activations: int


def count(model: nn.Layer, image_size: int | tuple[int, int], in_chans: int = 3) -> Complexity:
    """Count ``model`` for one image ``[1, in_chans, H, W]``; ``image_size`` is a side or (height, width).

    Runs one forward pass in evaluation mode and leaves the model as it was. Running statistics are not parameters.
    """
    height, width = pair(image_size)
    trainable = [parameter for parameter in model.parameters() if parameter.trainable]
    dtype = trainable[0].dtype if trainable else "float32"
    modes = {layer: layer.training for layer in model.sublayers(include_self=True)}
    model.eval()
    try:
        with _recording() as tally, paddle.no_grad(), kernels.using("stock"):  # compiled operators hide their products
            model(paddle.zeros([1, in_chans, height, width], dtype=dtype))
    finally:
        for layer, training in modes.items():
            layer.training = training
    return Complexity(sum(parameter.size for parameter in trainable), tally.macs, tally.activations)


@dataclass
class _Tally:
    macs: int = 0
    activations: int = 0
    inside: bool = False


Rule = Callable[..., int]
"""From an operator's result and arguments to its multiply-accumulates."""


def _matmul(out: paddle.Tensor, x: paddle.Tensor, y: paddle.Tensor, transpose_x: bool = False, *_: Any,
            **__: Any) -> int:
    return out.size * x.shape[-2 if transpose_x and x.ndim > 1 else -1]


def _einsum(out: paddle.Tensor, operands: list[paddle.Tensor], equation: str) -> int:
    """Count one product for every combination of labels; an ellipsis means labels from the right."""
    if len(operands) < 2:
        return 0
    sizes: dict[str | int, int] = {}
    for term, operand in zip(equation.split("->")[0].replace(" ", "").split(","), operands, strict=True):
        before, dots, after = term.partition("...")
        hidden = range(len(before) + len(after) - operand.ndim, 0) if dots else ()
        for label, size in zip([*before, *hidden, *after], operand.shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
    return math.prod(sizes.values())


_RULES: dict[str, Rule] = {  # of Paddle's C++ operators; a version may lack some
    **dict.fromkeys(("conv2d", "conv3d", "depthwise_conv2d", "depthwise_conv2d_bias", "depthwise_conv3d_bias"),
                    lambda out, x, weight, *_, **__: out.size * math.prod(weight.shape[1:])),  # [out, in / groups, ...]
    **dict.fromkeys(("conv2d_transpose", "conv3d_transpose", "conv2d_transpose_bias", "depthwise_conv2d_transpose"),
                    lambda out, x, weight, *_, **__: x.size * math.prod(weight.shape[1:])),  # [in, out / groups, ...]
    **dict.fromkeys(("linear", "linear_v2", "bmm", "mv", "dot"), lambda out, x, *_, **__: out.size * x.shape[-1]),
    **dict.fromkeys(("addmm", "baddbmm"), lambda out, addend, x, *_, **__: out.size * x.shape[-1]),
    "matmul": _matmul,
    "einsum": _einsum,
}
_ENTRIES: list[tuple[Any, str, Rule]] = [  # all functions that enter C++: owner, attribute, rule
    *((_C_ops, name, rule) for name, rule in _RULES.items()),
    (paddle.linalg, "matmul", _matmul),
    (paddle.Tensor, "__matmul__", _matmul),
    (paddle.Tensor, "__rmatmul__", lambda out, y, x: out.size * x.shape[-1]),
    (F, "scaled_dot_product_attention",
     lambda out, query, key, *_, **__: (query.size + out.size) * key.shape[1]),  # [B, N, heads, channels]
    (filter, "mix_planes", lambda out, real, *_: out.size * real.shape[-1]),  # a complex product in parts
]
_alone = threading.Lock()


@contextmanager
def _recording() -> Iterator[_Tally]:
    """Count what this thread computes until the end of the block; other threads are not counted."""
    tally = _Tally()
    thread = threading.get_ident()

    def wrap(function: Callable[..., Any], rule: Rule) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread or tally.inside:
                return function(*args, **kwargs)
            tally.inside = True  # calls inside a counted function are not counted again
            try:
                result = function(*args, **kwargs)
            finally:
                tally.inside = False
            out = result[0] if isinstance(result, (tuple, list)) else result
            macs = rule(out, *args, **kwargs)
            tally.macs += macs
            tally.activations += out.size if macs else 0
            return result

        return counted

    with _alone:
        entries = [(owner, name, getattr(owner, name), rule) for owner, name, rule in _ENTRIES if hasattr(owner, name)]
        try:
            for owner, name, function, rule in entries:
                setattr(owner, name, wrap(function, rule))
            yield tally
        finally:
            for owner, name, function, _ in entries:
                setattr(owner, name, function)
