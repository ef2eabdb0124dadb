"""The parts of Mobile-Former, in the authors' form: two bridges, dynamic ReLU, the blocks, and the head.

Section numbers and equations are those of Chen et al., CVPR 2022 (https://arxiv.org/abs/2108.05895); names and
numbers follow AAboys/MobileFormer at f44731062abb (``dna_blocks.py``), on whose differences see
``models/mobileformer.py``. Maps are ``[B, C, H, W]``, tokens ``[B, T, D]``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import paddle
import paddle.nn.functional as F
from paddle import nn

import kernels
from errors import UserError
from models.layers import (
    GELU,
    BatchNorm2D,
    Conv2D,
    DepthwiseConv2D,
    DropPath,
    LayerNorm,
    Linear,
    Sequential,
    run_in_sequence,
)


class BlockRow(NamedTuple):
    """One line of table 1, after the width that enters: inner width, width that leaves, stride, kernel's side."""

    in_channels: int
    exp_size: int
    channels: int
    stride: int
    kernel_size: int = 3


def hard_sigmoid(x: paddle.Tensor) -> paddle.Tensor:
    """Return relu6(x + 3) / 6, of any shape; exact in float64 too, where Paddle's operator ends at 1e-8."""
    return paddle.scale(x, 1 / 6, 0.5).clip(0.0, 1.0)


def greater(a: paddle.Tensor, b: paddle.Tensor) -> paddle.Tensor:
    """Return the elementwise maximum; the backward pass of Paddle's operator is several times as long on a CPU."""
    return b + F.relu(a - b)


class MobileToFormer(nn.Layer):
    """The bridge from the map to the tokens: ``[B, C, H, W]`` and ``[B, T, D]`` to ``[B, T, D]``.

    Tokens ask, the raw map is key and value. What is gathered is multiplied by 2 · hard-sigmoid of a projection of
    the tokens.
    """

    def __init__(self, channels: int, token_dim: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.alpha = nn.Sequential(Linear(token_dim, channels))
        self.q = Linear(token_dim, channels)
        self.proj = Linear(channels, token_dim)
        self.layer_norm = LayerNorm(token_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: paddle.Tensor, tokens: paddle.Tensor) -> paddle.Tensor:
        gathered = kernels.attend_map(self.q(tokens), x, self.num_heads)  # equation 1
        gathered = gathered * (2.0 * hard_sigmoid(self.alpha(tokens)))
        return self.layer_norm(tokens + self.drop_path(self.proj(gathered)))


class Former(nn.Layer):
    """Attention among tokens, then two fully connected layers: ``[B, T, D]`` to the same.

    Keys and values are the raw tokens; the norms come after the residuals, and the second branch has no drop path.
    """

    def __init__(self, token_dim: int, num_heads: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(token_dim, token_dim)
        self.channel_mlp = Linear(token_dim, token_dim)
        self.layer_norm = LayerNorm(token_dim)
        self.ffn = nn.Sequential(Linear(token_dim, mlp_ratio * token_dim), GELU(),
                                 Linear(mlp_ratio * token_dim, token_dim))
        self.ffn_norm = LayerNorm(token_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: paddle.Tensor) -> paddle.Tensor:
        query, keys = (x.reshape([0, 0, self.num_heads, -1]) for x in (self.q(tokens), tokens))
        mixed = kernels.attention(query, keys, keys).flatten(2)
        tokens = self.layer_norm(tokens + self.drop_path(self.channel_mlp(mixed)))
        return self.ffn_norm(tokens + self.ffn(tokens))


class FormerToMobile(nn.Layer):
    """The bridge from the tokens to the map: ``[B, C, H, W]`` and ``[B, T, D]`` to ``[B, C, H, W]``.

    The raw map asks, tokens are keys and values.
    """

    def __init__(self, channels: int, token_dim: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.k = Linear(token_dim, channels)
        self.proj = Linear(token_dim, channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: paddle.Tensor, tokens: paddle.Tensor) -> paddle.Tensor:
        spread = kernels.attend_tokens(x, self.k(tokens), self.proj(tokens), self.num_heads)  # equation 2
        return x + self.drop_path(spread)


class DynamicReLU(nn.Layer):
    """max(a₁x, a₂x) with slopes for each channel from the first token: ``[B, C, H, W]`` and ``[B, D]`` to the first.

    Dynamic ReLU B (Chen et al., ECCV 2020) without offsets: a₁ lies in [0, 2], a₂ in [-1, 1].
    """

    def __init__(self, channels: int, token_dim: int, dyrelu_reduction: int) -> None:
        super().__init__()
        self.hyper = nn.Sequential(Linear(token_dim, token_dim // dyrelu_reduction), nn.ReLU(),
                                   Linear(token_dim // dyrelu_reduction, 2 * channels))

    def forward(self, x: paddle.Tensor, token: paddle.Tensor) -> paddle.Tensor:
        first, second = (2.0 * hard_sigmoid(self.hyper(token))).chunk(2, axis=1)  # [B, C]
        return kernels.dynamic_relu(x, first, second - 1.0)


class Block(nn.Layer):
    """Mobile-Former block (figure 3): ``[B, C, H, W]`` and ``[B, T, D]`` to ``[B, C', H', W']`` and ``[B, T, D]``.

    Map to tokens, tokens among themselves, then ``mobile``, whose activations the updated first token steers, and
    tokens to map.
    """

    def __init__(self, row: BlockRow, token_dim: int, num_heads: int, token_heads: int, mlp_ratio: int,
                 drop_path: float) -> None:
        super().__init__()
        self.local_global = MobileToFormer(row.in_channels, token_dim, num_heads, drop_path)
        self.global_block = Former(token_dim, token_heads, mlp_ratio, drop_path)
        self.global_local = FormerToMobile(row.channels, token_dim, num_heads, drop_path)
        self.drop_path = DropPath(drop_path)

    def mobile(self, x: paddle.Tensor, token: paddle.Tensor) -> paddle.Tensor:
        """Transform the map: ``[B, C, H, W]`` and the first token ``[B, D]`` to ``[B, C', H', W']``."""
        raise NotImplementedError

    def forward(self, x: paddle.Tensor, tokens: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        tokens = self.global_block(self.local_global(x, tokens))
        return self.global_local(self.mobile(x, tokens[:, 0]), tokens), tokens


class InvertedBottleneckBlock(Block):
    """The block of stride 1: pointwise, depthwise, pointwise, with a skip where the width stays."""

    def __init__(self, row: BlockRow, groups: int, dyrelu_reduction: int, **tokens: Any) -> None:
        super().__init__(row, **tokens)
        exp_size, token_dim, side = row.exp_size, tokens["token_dim"], row.kernel_size
        self.skip = row.in_channels == row.channels
        self.conv1 = Sequential(*pointwise(row.in_channels, exp_size, groups), *shuffle(groups, groups))
        self.hyper1 = DynamicReLU(exp_size, token_dim, dyrelu_reduction)
        self.conv2 = Sequential(DepthwiseConv2D(exp_size, side, padding=side // 2, bias_attr=False),
                                BatchNorm2D(exp_size))
        self.hyper2 = DynamicReLU(exp_size, token_dim, dyrelu_reduction)
        self.conv3 = Sequential(*pointwise(exp_size, row.channels, groups), *shuffle(groups, groups))

    def mobile(self, x: paddle.Tensor, token: paddle.Tensor) -> paddle.Tensor:
        out = self.hyper1(self.conv1(x), token)
        out = self.hyper2(self.conv2(out), token)
        return self.conv3(out, residual=x, share=self.drop_path.share(x)) if self.skip else self.conv3(out)


class DownsampleBlock(Block):
    """The block of stride 2: depthwise and pointwise to the new width, then the same two again around a skip.

    Both depthwise convolutions widen the map, the first to the row's ``exp_size``, the second by ``expand_ratio``.
    """

    def __init__(self, row: BlockRow, groups: int, dyrelu_reduction: int, expand_ratio: int, **tokens: Any) -> None:
        super().__init__(row, **tokens)
        channels, token_dim, side = row.channels, tokens["token_dim"], row.kernel_size
        self.conv1 = Sequential(*widening(row.in_channels, row.exp_size, side, row.stride),
                                *shuffle(row.in_channels, groups))
        self.hyper1 = DynamicReLU(row.exp_size, token_dim, dyrelu_reduction)
        self.conv2 = Sequential(*pointwise(row.exp_size, channels, groups))
        self.conv3 = Sequential(*widening(channels, expand_ratio * channels, side, 1), *shuffle(channels, groups))
        self.hyper3 = DynamicReLU(expand_ratio * channels, token_dim, dyrelu_reduction)
        self.conv4 = Sequential(*pointwise(expand_ratio * channels, channels, groups))

    def mobile(self, x: paddle.Tensor, token: paddle.Tensor) -> paddle.Tensor:
        x = self.conv2(self.hyper1(self.conv1(x), token))
        return self.conv4(self.hyper3(self.conv3(x), token), residual=x, share=self.drop_path.share(x))


class LiteBottleneck(nn.Layer):
    """The first block, without tokens: depthwise (widening), ReLU6, pointwise, ``[B, C, H, W]`` to ``[B, C', H', W']``.

    Its input is added where neither width nor size changes.
    """

    def __init__(self, row: BlockRow, groups: int) -> None:
        super().__init__()
        self.skip = row.stride == 1 and row.in_channels == row.channels
        shuffled = shuffle(row.in_channels, groups) or [nn.Identity()]  # the reference numbers the empty place too
        self.conv = Sequential(*widening(row.in_channels, row.exp_size, row.kernel_size, row.stride), nn.ReLU6(),
                               *shuffled, *pointwise(row.exp_size, row.channels, groups))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.conv(x, residual=x if self.skip else None)


class Head(nn.Layer):
    """Map and first token to features: ``[B, C, H, W]`` and ``[B, D]`` to ``[B, num_features]``.

    The network hangs its last layer, ``classifier``, below this one, where the reference has it.
    """

    def __init__(self, channels: int, token_dim: int, hidden: int, num_features: int, groups: int) -> None:
        super().__init__()
        shuffled = shuffle(groups, groups) or [nn.Identity()]
        self.conv = Sequential(*shuffled, *pointwise(channels, hidden, groups))
        self.act = nn.ReLU6()
        self.fc = nn.Sequential(Linear(hidden + token_dim, num_features), nn.BatchNorm1D(num_features),
                                nn.Hardswish())

    def forward(self, x: paddle.Tensor, token: paddle.Tensor) -> paddle.Tensor:
        if self.fc[1].training and x.shape[0] == 1:
            raise UserError("Mobile-Former was given a training batch of 1 image, expected 2 or more: the batch norm "
                            "of its head sees one value for each image")
        pooled = F.hardswish(run_in_sequence([*self.conv, self.act], x).flatten(2).mean(2))
        return self.fc(paddle.concat([pooled, token], axis=1))


def pointwise(in_channels: int, channels: int, groups: int) -> list[nn.Layer]:
    """Return a 1×1 convolution and its batch norm."""
    return [Conv2D(in_channels, channels, 1, groups=groups, bias_attr=False), BatchNorm2D(channels)]


def widening(in_channels: int, channels: int, kernel_size: int, stride: int) -> list[nn.Layer]:
    """Return a depthwise convolution that makes ``channels`` of ``in_channels``, and its batch norm."""
    return [DepthwiseConv2D(in_channels, kernel_size, stride, padding=kernel_size // 2, bias_attr=False,
                            multiplier=channels // in_channels), BatchNorm2D(channels)]


class ChannelShuffle(nn.Layer):
    """Interleave the channels of ``groups`` groups: ``[B, C, H, W]`` to the same.

    Zhang et al., "ShuffleNet", CVPR 2018, figure 1.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return kernels.channel_shuffle(x, self.groups)


def shuffle(parts: int, groups: int) -> list[nn.Layer]:
    """Return what follows a convolution: a channel shuffle where pointwise convolutions have groups, else nothing."""
    return [ChannelShuffle(parts)] if groups > 1 else []
