"""Pieces that two papers share; what one paper alone needs stands in that paper's file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce

import paddle
import paddle.nn.functional as F
from paddle import nn

import kernels
from errors import UserError, nearest

trunc_normal_ = nn.initializer.TruncatedNormal(std=0.02)
zeros_ = nn.initializer.Constant(0.0)
ones_ = nn.initializer.Constant(1.0)


class Linear(nn.Linear):
    """Paddle's fully connected layer, ``[..., C]`` to ``[..., C']``, on the CPU by the compiled operator."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return kernels.linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """Paddle's layer normalisation of the last axis, ``[..., C]``, on the CPU by the compiled operator."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        bias = paddle.zeros_like(self.weight) if self.bias is None else self.bias
        return kernels.layer_norm(x, self.weight, bias, self._epsilon)


class GELU(nn.Layer):
    """The exact Gaussian error linear unit, any shape, on the CPU by the compiled operator."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return kernels.gelu(x)


ACTIVATIONS: Mapping[str, type[nn.Layer]] = {"gelu": GELU, "relu": nn.ReLU}


class BatchNorm2D(nn.BatchNorm2D):
    """Paddle's batch norm, ``[B, C, H, W]``, on the CPU by the compiled operator; see ``run_in_sequence`` too."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.with_neighbours(x)

    def with_neighbours(self, x: paddle.Tensor, **neighbours: str | paddle.Tensor | None) -> paddle.Tensor:
        """Return the norm of ``x`` and what stands around it: ``before`` to ``share`` of ``kernels.batch_norm``."""
        return kernels.batch_norm(x, self._mean, self._variance, self.weight, self.bias, self.training,
                                  self._momentum, self._epsilon, **neighbours)


_BESIDE_NORMS = {GELU: "gelu", nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish"}


def run_in_sequence(layers: Iterable[nn.Layer], x: paddle.Tensor, residual: paddle.Tensor | None = None,
                    share: paddle.Tensor | None = None) -> paddle.Tensor:
    """Return ``share · last(... first(x)) + residual``.

    A ``BatchNorm2D`` does the work of an activation beside it in its own pass, and that of the residual connection if
    it is the last, unless a hook waits for what a layer alone puts out. ``residual`` is like the result, ``[B, ...]``,
    ``share`` gives factors of images, ``[B, 1, ...]``.
    """
    steps: list[list[nn.Layer]] = []
    for layer in layers:
        if steps and _go_together([*steps[-1], layer]):
            steps[-1].append(layer)
        else:
            steps.append([layer])
    for step in steps[:-1]:
        x = _run_step(step, x)
    return _run_step(steps[-1], x, residual, share)


def _go_together(step: list[nn.Layer]) -> bool:
    kinds = {type(layer) for layer in step}
    return (len(step) == 2 and BatchNorm2D in kinds and not kinds.isdisjoint(_BESIDE_NORMS)
            and not any(map(_watched, step)))


def _watched(layer: nn.Layer) -> bool:
    return bool(layer._forward_pre_hooks or layer._forward_post_hooks)


def _run_step(step: list[nn.Layer], x: paddle.Tensor, residual: paddle.Tensor | None = None,
              share: paddle.Tensor | None = None) -> paddle.Tensor:
    """Run a layer, or a norm and the activation beside it, and connect the result."""
    norms = [layer for layer in step if type(layer) is BatchNorm2D and not _watched(layer)]
    if norms:
        before, after = _BESIDE_NORMS.get(type(step[0])), _BESIDE_NORMS.get(type(step[-1]))
        return norms[0].with_neighbours(x, before=before, after=after, residual=residual, share=share)
    if type(step[0]) is Sequential and not _watched(step[0]):
        return step[0](x, residual, share)
    x = step[0](x)
    if residual is None:
        return x if share is None else x * share
    return kernels.residual(residual, x, share=share)


class Sequential(nn.Sequential):
    """Paddle's sequence of layers, run by ``run_in_sequence``."""

    def forward(self, x: paddle.Tensor, residual: paddle.Tensor | None = None,
                share: paddle.Tensor | None = None) -> paddle.Tensor:
        return run_in_sequence(self.children(), x, residual, share)


def pair(value: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """Return (height, width) of a side or of a pair."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def check_image_size(family: str, image_size: int | tuple[int, int] | list[int], smallest: int) -> None:
    """Raise UserError where a side of ``image_size`` is below the smallest that a network takes."""
    if min(pair(image_size)) < smallest:
        raise UserError(f"image_size is {image_size}, expected {smallest} or more a side for {family}")


def check_strides(family: str, strides: Sequence[int], choices: Sequence[Sequence[int]]) -> None:
    """Raise UserError where ``strides`` has not one of the ``choices`` for each stage."""
    if len(strides) != len(choices) or any(s not in known for s, known in zip(strides, choices, strict=True)):
        expected = ", ".join(" or ".join(map(str, known)) for known in choices)
        raise UserError(f"strides of {family} is {list(strides)}, expected [{expected}]")


def drop_path_rates(drop_path_rate: float, depths: list[int] | tuple[int, ...]) -> list[list[float]]:
    """Return per stage and block the rates that rise linearly from 0 to ``drop_path_rate`` over all blocks."""
    total = sum(depths)
    flat = [drop_path_rate * i / max(total - 1, 1) for i in range(total)]
    ends = [sum(depths[: stage + 1]) for stage in range(len(depths))]
    return [flat[end - depth : end] for end, depth in zip(ends, depths, strict=True)]


def activation(name: str, choices: Mapping[str, type[nn.Layer]] = ACTIVATIONS) -> type[nn.Layer]:
    """Return the activation layer of a name; raises UserError for an unknown one, naming the nearest."""
    if name not in choices:
        raise UserError(f"unknown activation {name!r}{nearest(name, choices)}; known: {', '.join(choices)}")
    return choices[name]


def pytorch_default_(layer: nn.Layer) -> None:
    """Initialise a convolution or a linear layer as PyTorch does: weight and bias uniform in ±1/√fan_in."""
    weight = layer.weight
    fan_in = weight.shape[0] if isinstance(layer, nn.Linear) else weight[0].size
    bound = 1 / math.sqrt(fan_in)
    nn.initializer.Uniform(-bound, bound)(weight)
    if layer.bias is not None:
        nn.initializer.Uniform(-bound, bound)(layer.bias)


def channels_last(x: paddle.Tensor) -> paddle.Tensor:
    """Return ``[B, C, H, W]`` as ``[B, H, W, C]``."""
    return x.transpose([0, 2, 3, 1])


def channels_first(x: paddle.Tensor) -> paddle.Tensor:
    """Return ``[B, H, W, C]`` as ``[B, C, H, W]``."""
    return x.transpose([0, 3, 1, 2])


class DropPath(nn.Layer):
    """Stochastic depth: in training, drop a sample's branch with probability ``rate`` and scale the others.

    Huang et al., "Deep Networks with Stochastic Depth", 2016. Any shape ``[B, ...]``.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise UserError(f"drop_path_rate is {rate}, expected 0 <= rate < 1")
        self.rate = rate

    def share(self, x: paddle.Tensor) -> paddle.Tensor | None:
        """Draw the factor of each sample's branch, ``[B, 1, ...]``: 0 or ``1 / (1 - rate)``; None where all are 1."""
        if not self.training or self.rate == 0.0:
            return None
        keep = 1.0 - self.rate
        return paddle.bernoulli(paddle.full([x.shape[0]] + [1] * (x.ndim - 1), keep, dtype=x.dtype)) / keep

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        share = self.share(x)
        return x if share is None else x * share


class Mlp(nn.Layer):
    """Two fully connected layers over the last axis, through ``hidden_features``.

    ``[..., C]`` to ``[..., C]``, or to ``[..., out_features]`` where that is given.
    """

    def __init__(self, dim: int, hidden_features: int, act_layer: Callable[[], nn.Layer] = GELU,
                 drop_rate: float = 0.0, out_features: int | None = None, bias_attr: bool | None = None) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_features, bias_attr=bias_attr)
        self.act = act_layer()
        self.fc2 = Linear(hidden_features, out_features or dim, bias_attr=bias_attr)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Conv2D(nn.Conv2D):
    """Paddle's convolution, ``[B, C, H, W]`` to ``[B, C', H', W']``, on the CPU by the compiled operators."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return kernels.conv2d(x, self.weight, self.bias, self._stride, self._padding, self._dilation, self._groups)


class PointwiseConv2D(nn.Conv2D):
    """1×1 convolution over the last axis, ``[..., C]`` to ``[..., C']``; weights ``[C', C, 1, 1]`` as in Conv2D.

    One matrix product for the whole batch: on maps of a few pixels several times as fast as one for each image.
    """

    def __init__(self, in_channels: int, out_channels: int, bias_attr: bool | None = None) -> None:
        super().__init__(in_channels, out_channels, 1, bias_attr=bias_attr)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return kernels.linear(x, self.weight.flatten(1), self.bias, transposed=True)


class DepthwiseConv2D(Conv2D):
    """Depthwise convolution, ``[B, C, H, W]`` to ``[B, mC, H', W']``; weights ``[mC, 1, k, k]`` as in Conv2D.

    Each channel gives ``multiplier`` (m) channels, which stand next to each other.
    """

    def __init__(self, channels: int, kernel_size: int | Sequence[int], stride: int | Sequence[int] = 1,
                 padding: int | str | Sequence[int] = 0, bias_attr: bool | None = None, multiplier: int = 1) -> None:
        super().__init__(channels, multiplier * channels, kernel_size, stride=stride, padding=padding,
                         groups=channels, bias_attr=bias_attr)


class Classifier(nn.Layer):
    """What every network of the suite is: features ``[B, num_features]``, then a head to ``[B, num_classes]``.

    A network sets ``num_features`` before ``reset_classifier`` and defines ``forward_features``; it overrides
    ``build_head`` where its head is more than a linear layer, and ``head_name`` where its reference calls the
    head otherwise (a dotted name is that of a layer inside another: ``classifier.fc``). ``block_pattern`` is a regular
    expression of the names of its blocks, ``map_layout`` (NCHW or NHWC) that of the maps between them.
    """

    head_name = "head"
    block_pattern = ""
    map_layout = "NCHW"
    num_features: int

    def forward_features(self, x: paddle.Tensor) -> paddle.Tensor:
        """Return what stands before the head: ``[B, in_chans, H, W]`` to ``[B, num_features]``."""
        raise NotImplementedError

    def build_head(self, num_classes: int) -> nn.Layer:
        """Return a fresh head for ``num_classes`` > 0."""
        return Linear(self.num_features, num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one for ``num_classes``; 0 removes it."""
        self.num_classes = num_classes
        *owners, name = self.head_name.split(".")
        setattr(reduce(getattr, owners, self), name, self.build_head(num_classes) if num_classes else nn.Identity())

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return reduce(getattr, self.head_name.split("."), self)(self.forward_features(x))


def resize_position_embedding(table: paddle.Tensor, height: int, width: int) -> paddle.Tensor:
    """Resample a channels-last table ``[1, H, W, C]`` to ``[1, height, width, C]`` (bilinear, half-pixel centres)."""
    if table.shape[1:3] == [height, width]:
        return table
    table = F.interpolate(channels_first(table), size=(height, width), mode="bilinear")
    return channels_last(table)
