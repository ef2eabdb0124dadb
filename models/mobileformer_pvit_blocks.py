"""The parts of Mobile-Former in PaddleViT's form: bridges, Former, dynamic ReLU, blocks, and the lite bottleneck.

Names and numbers follow BR-IDL/PaddleViT at 5ac7d89d4fd0 (``image_classification/MobileFormer``), on whose errors
see ``models/mobileformer_pvit.py``. Maps are ``[B, C, H, W]``, tokens ``[B, T, D]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import paddle
import paddle.nn.functional as F
from paddle import nn

import kernels
from models.layers import (
    BatchNorm2D,
    Conv2D,
    DepthwiseConv2D,
    DropPath,
    LayerNorm,
    Linear,
    Mlp,
    Sequential,
    activation,
    run_in_sequence,
)
from models.mobileformer_blocks import BlockRow, greater


class TokenSettings(NamedTuple):
    """What all parts that see tokens have in common; ``drop_path`` is that of each branch of bridges and Formers."""

    token_dim: int
    num_heads: int
    mlp_ratio: float
    qkv_bias: bool
    drop_rate: float
    attn_drop_rate: float
    mlp_drop_rate: float
    drop_path: float


class DynamicSettings(NamedTuple):
    """Dynamic ReLU: ``k`` linear functions, the inverse of the hidden layer's ratio, and what its outputs scale."""

    k: int
    reduction: float
    coefs: Sequence[float]
    consts: Sequence[float]


class HeadProjections(nn.LayerList):
    """Small linear layers, one for each head, on that head's slice: ``[B, T, D]`` to ``[B, T, channels]``.

    Named ``0``, ``1``, ... as in the source.
    """

    def __init__(self, channels: int, settings: TokenSettings) -> None:
        heads = settings.num_heads
        super().__init__([Linear(settings.token_dim // heads, channels // heads,
                                    bias_attr=None if settings.qkv_bias else False) for _ in range(heads)])

    def forward(self, tokens: paddle.Tensor) -> paddle.Tensor:
        return paddle.concat([self[i](part) for i, part in enumerate(tokens.chunk(len(self), axis=2))], axis=2)


class MobileToFormer(nn.Layer):
    """The bridge from the map to the tokens: ``[B, C, H, W]`` and ``[B, T, D]`` to ``[B, T, D]``."""

    def __init__(self, channels: int, settings: TokenSettings) -> None:
        super().__init__()
        self.input_norm = LayerNorm(settings.token_dim)
        self.heads_q_proj = HeadProjections(channels, settings)
        self.output = Linear(channels, settings.token_dim)
        self.dropout = nn.Dropout(settings.drop_rate)
        self.attn_dropout = nn.Dropout(settings.attn_drop_rate)
        self.droppath = DropPath(settings.drop_path)

    def forward(self, x: paddle.Tensor, tokens: paddle.Tensor) -> paddle.Tensor:
        query, dropout = self.heads_q_proj(self.input_norm(tokens)), rate(self.attn_dropout)
        gathered = kernels.attend_map(query, x, len(self.heads_q_proj), dropout)
        return tokens + self.droppath(self.dropout(self.output(gathered)))


class FormerToMobile(nn.Layer):
    """The bridge from the tokens to the map: ``[B, C, H, W]`` and ``[B, T, D]`` to ``[B, C, H, W]``."""

    def __init__(self, channels: int, settings: TokenSettings) -> None:
        super().__init__()
        self.input_token_norm = LayerNorm(settings.token_dim)
        self.heads_k_proj = HeadProjections(channels, settings)
        self.heads_v_proj = HeadProjections(channels, settings)
        self.dropout = nn.Dropout(settings.drop_rate)
        self.attn_dropout = nn.Dropout(settings.attn_drop_rate)
        self.droppath = DropPath(settings.drop_path)

    def forward(self, x: paddle.Tensor, tokens: paddle.Tensor) -> paddle.Tensor:
        tokens = self.input_token_norm(tokens)
        key, value = self.heads_k_proj(tokens), self.heads_v_proj(tokens)
        spread = kernels.attend_tokens(x, key, value, len(self.heads_k_proj), rate(self.attn_dropout))
        return x + self.droppath(self.dropout(spread))


class Attention(nn.Layer):
    """Self-attention among tokens, ``[B, T, D]`` to the same."""

    def __init__(self, settings: TokenSettings) -> None:
        super().__init__()
        dim = settings.token_dim
        self.num_heads = settings.num_heads
        self.qkv_proj = Linear(dim, 3 * dim, bias_attr=None if settings.qkv_bias else False)
        self.output = Linear(dim, dim)
        self.dropout = nn.Dropout(settings.drop_rate)
        self.attn_dropout = nn.Dropout(settings.attn_drop_rate)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        qkv = self.qkv_proj(x).reshape([0, 0, 3, self.num_heads, -1])
        x = kernels.self_attention(qkv, dropout=rate(self.attn_dropout)).flatten(2)
        return self.dropout(self.output(x))


class Former(nn.Layer):
    """Attention among tokens, then two fully connected layers, norms first: ``[B, T, D]`` to the same."""

    def __init__(self, settings: TokenSettings) -> None:
        super().__init__()
        dim = settings.token_dim
        self.attn_ln = LayerNorm(dim)
        self.attn = Attention(settings)
        self.attn_droppath = DropPath(settings.drop_path)
        self.mlp_ln = LayerNorm(dim)
        self.mlp = Mlp(dim, int(settings.mlp_ratio * dim), drop_rate=settings.mlp_drop_rate)
        self.mlp_droppath = DropPath(settings.drop_path)

    def forward(self, tokens: paddle.Tensor) -> paddle.Tensor:
        tokens = tokens + self.attn_droppath(self.attn(self.attn_ln(tokens)))
        return tokens + self.mlp_droppath(self.mlp(self.mlp_ln(tokens)))


class DynamicReLU(nn.Layer):
    """The greatest of ``k`` linear functions for each channel: ``[B, C, H, W]`` and ``[B, D]`` to the first shape.

    Dynamic ReLU B (Chen et al., ECCV 2020); slopes and offsets come from the first token ``[B, D]``.
    """

    def __init__(self, channels: int, token_dim: int, settings: DynamicSettings) -> None:
        super().__init__()
        self.k, coefs, consts = settings.k, settings.coefs, settings.consts
        outputs = 2 * self.k * channels
        self.project = nn.Sequential(Mlp(token_dim, int(token_dim / settings.reduction), out_features=outputs),
                                     LayerNorm(outputs))
        self.coefs = [coefs[0]] * self.k + [coefs[1]] * self.k
        self.consts = [consts[0]] + [consts[1]] * (2 * self.k - 1)

    def forward(self, x: paddle.Tensor, token: paddle.Tensor) -> paddle.Tensor:
        outputs = self.project(token).reshape([0, -1, 2 * self.k, 1, 1]).unbind(2)  # each [B, C, 1, 1]
        values = [out * self.coefs[i] + self.consts[i] for i, out in enumerate(outputs)]  # slopes, then offsets
        return reduce(greater, [x * values[i] + values[self.k + i] for i in range(self.k)])


class Bottleneck(nn.Layer):
    """Pointwise, depthwise, pointwise, ``[B, C, H, W]`` and ``[B, D]`` to ``[B, C', H, W]``, without a skip.

    One dynamic ReLU, steered by the first token, serves both places; where ``dynamic`` is None, they have ReLU.
    """

    def __init__(self, row: BlockRow, groups: int, token_dim: int, dynamic: DynamicSettings | None) -> None:
        super().__init__()
        self.in_pw = inner_conv(Conv2D(row.in_channels, row.exp_size, 1, groups=groups))
        self.in_pw_bn = BatchNorm2D(row.exp_size)
        self.dw = inner_conv(DepthwiseConv2D(row.exp_size, row.kernel_size, padding=row.kernel_size // 2))
        self.dw_bn = BatchNorm2D(row.exp_size)
        self.out_pw = inner_conv(Conv2D(row.exp_size, row.channels, 1, groups=groups))
        self.out_pw_bn = BatchNorm2D(row.channels)
        self.act = DynamicReLU(row.exp_size, token_dim, dynamic) if dynamic else None

    def forward(self, x: paddle.Tensor, token: paddle.Tensor) -> paddle.Tensor:
        for conv, norm in ((self.in_pw, self.in_pw_bn), (self.dw, self.dw_bn)):
            x = norm(conv(x))
            x = F.relu(x) if self.act is None else self.act(x, token)
        return self.out_pw_bn(self.out_pw(x))


class Mobile(nn.Layer):
    """The map's side of a block: where the stride is 2, a strided depthwise convolution, then the bottleneck."""

    def __init__(self, row: BlockRow, groups: int, token_dim: int, dynamic: DynamicSettings | None) -> None:
        super().__init__()
        self.bneck = Bottleneck(row, groups, token_dim, dynamic)
        self.downsample_dw = nn.Identity()
        if row.stride == 2:
            strided = DepthwiseConv2D(row.in_channels, row.kernel_size, row.stride, padding=row.kernel_size // 2)
            self.downsample_dw = Sequential(inner_conv(strided), BatchNorm2D(row.in_channels), nn.ReLU())

    def forward(self, x: paddle.Tensor, token: paddle.Tensor) -> paddle.Tensor:
        return self.bneck(self.downsample_dw(x), token)


class Block(nn.Layer):
    """Mobile-Former block (figure 3): ``[B, C, H, W]`` and ``[B, T, D]`` to ``[B, C', H', W']`` and ``[B, T, D]``."""

    def __init__(self, row: BlockRow, groups: int, settings: TokenSettings, dynamic: DynamicSettings | None) -> None:
        super().__init__()
        self.toformer_bridge = MobileToFormer(row.in_channels, settings)
        self.former = Former(settings)
        self.mobile = Mobile(row, groups, settings.token_dim, dynamic)
        self.tomobile_bridge = FormerToMobile(row.channels, settings)

    def forward(self, x: paddle.Tensor, tokens: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        tokens = self.former(self.toformer_bridge(x, tokens))
        return self.tomobile_bridge(self.mobile(x, tokens[:, 0]), tokens), tokens


class LiteBottleneck(nn.Layer):
    """The first block, without tokens: pointwise, a column's and a row's depthwise convolution, pointwise.

    ``[B, C, H, W]`` to ``[B, C', H', W']``; ``act`` follows the first two batch norms, where the source has nothing.
    """

    def __init__(self, row: BlockRow, groups: int, act: str | None) -> None:
        super().__init__()
        hidden, stride, side, pad = row.exp_size, row.stride, row.kernel_size, row.kernel_size // 2
        self.in_pw = inner_conv(Conv2D(row.in_channels, hidden, 1, groups=groups))
        self.in_pw_bn = BatchNorm2D(hidden)
        self.dw = inner_conv(nn.Sequential(
            DepthwiseConv2D(hidden, [side, 1], stride=[stride, 1], padding=[pad, 0]), BatchNorm2D(hidden),
            DepthwiseConv2D(hidden, [1, side], stride=[1, stride], padding=[0, pad])))
        self.dw_bn = BatchNorm2D(hidden)
        self.out_pw = inner_conv(Conv2D(hidden, row.channels, 1, groups=groups))
        self.out_pw_bn = BatchNorm2D(row.channels)
        self.act = nn.Identity() if act is None else activation(act)()

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return run_in_sequence([self.in_pw, self.in_pw_bn, self.act, self.dw, self.dw_bn, self.act, self.out_pw,
                                self.out_pw_bn], x)


def rate(dropout: nn.Dropout) -> float:
    """Return the rate of a dropout as things are: 0 outside training."""
    return dropout.p if dropout.training else 0.0


def inner_conv(conv: nn.Layer) -> nn.Sequential:
    """Return ``conv`` below the name ``conv``, where the source's weights have it."""
    return nn.Sequential(("conv", conv))
