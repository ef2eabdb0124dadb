"""Layers that several papers share; what one paper alone needs is in that paper's file."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import reduce
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn

import kernels
from errors import UserError, nearest
from kernels.maps import AFTER

trunc_normal_ = nn.initializer.TruncatedNormal(std=0.02)
zeros_ = nn.initializer.Constant(0.0)
ones_ = nn.initializer.Constant(1.0)


def init_trunc_normal(layer: nn.Layer) -> None:
    """Initialise a linear layer or convolution: weights normal of 0.02, cut at ±2 as in the references."""
    if isinstance(layer, (nn.Linear, nn.Conv2D)):
        trunc_normal_(layer.weight)


def init_pytorch(layer: nn.Layer) -> None:
    """Initialise a linear layer or convolution as PyTorch does: weights and biases uniform in ±1/√fan_in."""
    if isinstance(layer, (nn.Linear, nn.Conv2D)):
        bound = 1 / math.sqrt(layer.weight.shape[0] if isinstance(layer, nn.Linear) else layer.weight[0].size)
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                nn.initializer.Uniform(-bound, bound)(parameter)


def layer_scale(block: nn.Layer, dim: int, value: float | None) -> paddle.Tensor | None:
    """Return a parameter ``[dim]`` for ``block`` that starts as ``value``; None for None."""
    if value is None:
        return None
    return block.create_parameter([dim], default_initializer=nn.initializer.Constant(value))


class Linear(nn.Linear):
    """Fully connected layer over the last axis, ``[..., C]`` to ``[..., C']``."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return kernels.linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis, ``[..., C]``."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        bias = paddle.zeros_like(self.weight) if self.bias is None else self.bias
        return kernels.layer_norm(x, self.weight, bias, self._epsilon)


class GELU(nn.Layer):
    """The exact GELU, any shape."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return kernels.gelu(x)


class NormAct(nn.BatchNorm2D):
    """Batch norm of a map ``[B, C, H, W]`` with an activation ``before`` or ``after`` it, in one pass on the CPU.

    An activation is "gelu", "relu", "relu6", "hardswish" or None; UserError for another. ``forward`` also closes a
    residual connection: ``keep_scale · after(norm(before(x))) + residual``, with ``residual`` like ``x`` and
    ``keep_scale`` of ``DropPath``. As timm's ``BatchNormAct2d``, so that no activation has a name among the weights.
    """

    def __init__(self, num_features: int, before: str | None = None, after: str | None = None) -> None:
        super().__init__(num_features)
        for act in (before, after):
            check_choice("an activation", act, AFTER)
        self.before, self.after = before, after

    @property
    def tensors(self) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        """Return running mean, running variance, weight and bias, ``[num_features]`` each."""
        return self._mean, self._variance, self.weight, self.bias

    def forward(self, x: paddle.Tensor, residual: paddle.Tensor | None = None,
                keep_scale: paddle.Tensor | None = None) -> paddle.Tensor:
        return kernels.batch_norm(x, *self.tensors, self.training, self._momentum, self._epsilon, self.before,
                                  self.after, residual, keep_scale)


class Conv2D(nn.Conv2D):
    """Convolution, ``[B, C, H, W]`` to ``[B, C', H', W']``."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return kernels.conv2d(x, self.weight, self.bias, self._stride, self._padding, self._dilation, self._groups)


class DepthwiseConv2D(Conv2D):
    """Depthwise convolution, ``[B, C, H, W]`` to ``[B, mC, H', W']``; weights ``[mC, 1, k, k]``.

    Each channel gives ``multiplier`` (m) neighbouring channels.
    """

    def __init__(self, channels: int, kernel_size: int | Sequence[int], stride: int | Sequence[int] = 1,
                 padding: int | str | Sequence[int] = 0, bias_attr: bool | None = None, multiplier: int = 1) -> None:
        super().__init__(channels, multiplier * channels, kernel_size, stride=stride, padding=padding,
                         groups=channels, bias_attr=bias_attr)


class PointwiseConv2D(nn.Conv2D):
    """1×1 convolution over the last axis, ``[..., C]`` to ``[..., C']``; weights ``[C', C, 1, 1]`` as in Conv2D.

    One matrix product for the whole batch: on small maps several times as fast as one for each image.
    """

    def __init__(self, in_channels: int, out_channels: int, bias_attr: bool | None = None) -> None:
        super().__init__(in_channels, out_channels, 1, bias_attr=bias_attr)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return kernels.linear(x, self.weight.flatten(1), self.bias, transposed=True)


class Mlp(nn.Layer):
    """Two layers over the last axis with an activation between: ``[..., C]`` to ``[..., out_features or C]``."""

    def __init__(self, dim: int, hidden_features: int, act_layer: Callable[[], nn.Layer] = GELU,
                 drop_rate: float = 0.0, out_features: int | None = None, bias_attr: bool | None = None,
                 layer: Callable[..., nn.Layer] = Linear) -> None:
        super().__init__()
        self.fc1 = layer(dim, hidden_features, bias_attr=bias_attr)
        self.act = act_layer()
        self.fc2 = layer(hidden_features, out_features or dim, bias_attr=bias_attr)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))

    def add(self, x: paddle.Tensor, norm: LayerNorm | nn.GroupNorm, drop_path: DropPath,
            kept: paddle.Tensor | None = None, scale: paddle.Tensor | None = None) -> paddle.Tensor:
        """Return ``x · kept + drop_path(self(norm(x)) · scale)``: one operator in mixed precision on the CPU.

        A group norm has one group and takes channels-last maps.
        """
        star = (self.act.scale, self.act.bias) if hasattr(self.act, "scale") else None  # StarReLU
        fits = (star or isinstance(self.act, GELU)) and not (self.training and self.drop.p)
        if not (kernels.rounds_to_bfloat16() and fits):
            return drop_path.add(x, self(norm(x)), kept, scale)
        transposed = isinstance(self.fc1, PointwiseConv2D)
        first, second = ((layer.weight.flatten(1) if transposed else layer.weight, layer.bias)
                         for layer in (self.fc1, self.fc2))
        bias = paddle.zeros_like(norm.weight) if norm.bias is None else norm.bias
        return kernels.feed_forward(x, (norm.weight, bias), first, second, norm._epsilon, transposed, kept, scale,
                                    drop_path.keep_scale(x), star, isinstance(norm, nn.GroupNorm))


class DropPath(nn.Layer):
    """Stochastic depth: in training, drop a sample's branch with probability ``rate`` and scale the others.

    Huang et al., "Deep Networks with Stochastic Depth", 2016. Any shape ``[B, ...]``.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise UserError(f"drop_path_rate is {rate}, expected 0 <= rate < 1")
        self.rate = rate

    def keep_scale(self, x: paddle.Tensor) -> paddle.Tensor | None:
        """Draw each sample's factor, ``[B, 1, ...]``: 0 or ``1 / (1 - rate)``; None where all are 1."""
        if not self.training or self.rate == 0.0:
            return None
        keep = 1.0 - self.rate
        return paddle.bernoulli(paddle.full([x.shape[0]] + [1] * (x.ndim - 1), keep, dtype=x.dtype)) / keep

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        scale = self.keep_scale(x)
        return x if scale is None else x * scale

    def add(self, x: paddle.Tensor, branch: paddle.Tensor, kept: paddle.Tensor | None = None,
            scale: paddle.Tensor | None = None) -> paddle.Tensor:
        """Return ``x · kept + drop(branch · scale)`` in one pass; the factors are ``[C]``, None for 1."""
        return kernels.residual(x, branch, kept=kept, scale=scale, keep_scale=self.keep_scale(x))


def mbconv(x: paddle.Tensor, expand: Conv2D, norm1: nn.Layer, depthwise: DepthwiseConv2D, norm2: nn.Layer,
           squeeze_excite: nn.Layer, project: Conv2D) -> paddle.Tensor:
    """Return ``project(h · squeeze_excite(mean of h))`` with ``h = norm2(depthwise(norm1(expand(x))))``.

    The norms have GELU after them; ``squeeze_excite`` maps means to factors of channels, both ``[B, C]``. In mixed
    precision on the CPU it is ``kernels.mbconv``, unless the norms have been replaced.
    """
    if not (kernels.rounds_to_bfloat16() and type(norm1) is type(norm2) is NormAct):
        hidden = norm2(depthwise(norm1(expand(x))))
        return project(hidden * squeeze_excite(kernels.mean(hidden.flatten(2), -1)).unsqueeze([2, 3]))
    stride = expand._stride[0]  # of a 1×1 convolution: the pixels that it sees
    x = x if stride == 1 else x[:, :, ::stride, ::stride]
    return kernels.mbconv(x, expand.weight, norm1.tensors, depthwise.weight, norm2.tensors, squeeze_excite,
                          (project.weight, project.bias), depthwise._stride[0], norm1.training, norm1._momentum,
                          norm1._epsilon)


class Classifier(nn.Layer):
    """Base of all networks: features ``[B, num_features]``, then a head to ``[B, num_classes]``.

    A network sets ``num_features`` before ``reset_classifier`` and defines ``forward_features``. It overrides
    ``build_head`` or ``init_head`` where its head differs, and ``head_name`` where the reference names it otherwise
    (``classifier.fc`` is the layer ``fc`` of ``classifier``). ``smallest_image`` is the smallest side in pixels,
    ``block_pattern`` a regular expression of the names of its blocks, ``map_layout`` (NCHW or NHWC) the layout of the
    maps between them.
    """

    smallest_image = 1
    head_name = "head"
    block_pattern = ""
    map_layout = "NCHW"
    init_head = staticmethod(init_trunc_normal)
    num_features: int

    def forward_features(self, x: paddle.Tensor) -> paddle.Tensor:
        """Return the input of the head: ``[B, in_chans, H, W]`` to ``[B, num_features]``."""
        raise NotImplementedError

    def build_head(self, num_classes: int) -> nn.Layer:
        """Return a head for ``num_classes`` > 0."""
        return Linear(self.num_features, num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one for ``num_classes``; 0 removes it."""
        self.num_classes = num_classes
        *owners, name = self.head_name.split(".")
        head = self.build_head(num_classes).apply(self.init_head) if num_classes else nn.Identity()
        setattr(reduce(getattr, owners, self), name, head)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return reduce(getattr, self.head_name.split("."), self)(self.forward_features(x))


# Arguments


def check_choice(what: str, value: Any, choices: Collection[Any]) -> None:
    """Raise UserError unless ``value`` is one of ``choices``."""
    if value not in choices:
        known = [str(choice) for choice in choices]
        raise UserError(f"{what} is {value!r}, expected one of {', '.join(known)}{nearest(str(value), known)}")


def each_stage(depths: Sequence[int], **lists: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Zip lists that have an entry for each stage; raises UserError unless they are as long as ``depths``."""
    for name, values in lists.items():
        if len(values) != len(depths):
            raise UserError(f"{name} is {list(values)}, expected {len(depths)} entries, as depths is {list(depths)}")
    return zip(*lists.values(), strict=True)


def check_strides(family: str, strides: Sequence[int], choices: Sequence[Sequence[int]]) -> None:
    """Raise UserError unless ``strides`` has one of the ``choices`` for each stage."""
    if len(strides) != len(choices) or any(s not in known for s, known in zip(strides, choices, strict=True)):
        expected = ", ".join(" or ".join(map(str, known)) for known in choices)
        raise UserError(f"strides of {family} is {list(strides)}, expected [{expected}]")


def divide(what: str, value: int, divisor_name: str, divisor: int) -> int:
    """Return ``value`` / ``divisor``; raises UserError for a remainder, with which no forward pass would succeed."""
    if value % divisor:
        raise UserError(f"{what} is {value}, expected a multiple of {divisor_name}, {divisor}")
    return value // divisor


def drop_path_rates(drop_path_rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the rates of each stage's blocks, which rise linearly from 0 to ``drop_path_rate`` over all blocks."""
    last = max(sum(depths) - 1, 1)
    return [[drop_path_rate * (sum(depths[:stage]) + block) / last for block in range(depth)]
            for stage, depth in enumerate(depths)]


# Maps


def resize_position_embedding(table: paddle.Tensor, height: int, width: int) -> paddle.Tensor:
    """Resample a channels-last table ``[1, H, W, C]`` to ``[1, height, width, C]`` (bilinear, half-pixel centres)."""
    if table.shape[1:3] == [height, width]:
        return table
    return kernels.channels_last(F.interpolate(kernels.channels_first(table), size=(height, width), mode="bilinear"))
