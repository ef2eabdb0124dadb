"""iFormer's token mixers (section 3.1 and figure 3), see ``models/iformer.py``."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import nn

import kernels
from models.layers import DepthwiseConv2D, Linear, PointwiseConv2D, channels_first, channels_last


class HighMixer(nn.Layer):
    """High-frequency mixer (section 3.1, equations 2 and 3): channels-last ``[B, H, W, C]`` to ``[B, 2C, H, W]``.

    The first half of the channels goes through a 1×1, then a depthwise convolution, the second through a
    max-pool, then a 1×1 convolution; each path doubles its width.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.half = half = dim // 2
        self.conv1 = PointwiseConv2D(half, 2 * half, bias_attr=False)
        self.proj1 = DepthwiseConv2D(2 * half, 3, padding=1, bias_attr=False)
        self.max_pool = nn.MaxPool2D(3, stride=1, padding=1)
        self.proj2 = PointwiseConv2D(half, 2 * half)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        conv, pool = x.split([self.half, self.half], axis=-1)
        conv = kernels.gelu(self.proj1(channels_first(self.conv1(conv))))
        pool = channels_last(self.max_pool(channels_first(pool)))
        return paddle.concat([conv, channels_first(kernels.gelu(self.proj2(pool)))], axis=1)


class LowMixer(nn.Layer):
    """Low-frequency mixer (section 3.1, equation 4): attention between average pooling and upsampling.

    Channels-last ``[B, H, W, C]`` to ``[B, C, H, W]``. An odd side is pooled with a last window of one row or column,
    so that upsampling by ``pool_size`` covers the map, and cropped.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, attn_drop_rate: float, pool_size: int) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.pool_size = pool_size
        self.attn_drop_rate = attn_drop_rate
        self.qkv = Linear(dim, 3 * dim, bias_attr=None if qkv_bias else False)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        height, width = x.shape[1:3]
        if self.pool_size > 1:
            x = channels_last(F.avg_pool2d(channels_first(x), self.pool_size, stride=self.pool_size, ceil_mode=True))
        h, w = x.shape[1:3]
        qkv = self.qkv(x).reshape([-1, h * w, 3, self.num_heads, self.dim // self.num_heads])
        x = kernels.self_attention(qkv, dropout=self.attn_drop_rate if self.training else 0.0)  # [B, N, heads, d]
        x = x.reshape([-1, h, w, self.dim])
        if self.pool_size > 1:
            x = upsample(x, self.pool_size)[:, :height, :width]
        return channels_first(x)


def upsample(x: paddle.Tensor, factor: int) -> paddle.Tensor:
    """Repeat rows and columns: ``[B, H, W, C]`` to ``[B, factor·H, factor·W, C]``.

    Nearest interpolation by concatenation, of static shape when exported.
    """
    height, width, dim = x.shape[1:]
    x = paddle.concat([x.reshape([-1, height, width, 1, dim])] * factor, axis=3)  # [B, H, W, factor, C]
    x = paddle.concat([x.reshape([-1, height, 1, factor * width, dim])] * factor, axis=2)
    return x.reshape([-1, factor * height, factor * width, dim])


class Mixer(nn.Layer):
    """Inception token mixer (figure 3): the first channels high, the last ``attention_heads`` heads low.

    Channels-last ``[B, H, W, C]`` to the same.
    """

    def __init__(self, dim: int, num_heads: int, attention_heads: int, qkv_bias: bool, attn_drop_rate: float,
                 drop_rate: float, pool_size: int) -> None:
        super().__init__()
        low_dim = attention_heads * (dim // num_heads)
        high_dim = dim - low_dim
        self.split_sizes = [high_dim, low_dim]
        fused_dim = 2 * high_dim + low_dim
        self.high_mixer = HighMixer(high_dim)
        self.low_mixer = LowMixer(low_dim, attention_heads, qkv_bias, attn_drop_rate, pool_size)
        self.conv_fuse = DepthwiseConv2D(fused_dim, 3, padding=1, bias_attr=False)
        self.proj = PointwiseConv2D(fused_dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        high, low = x.split(self.split_sizes, axis=-1)
        x = paddle.concat([self.high_mixer(high), self.low_mixer(low)], axis=1)
        x = kernels.residual(x, self.conv_fuse(x))  # equation 6
        return self.proj_drop(self.proj(channels_last(x)))
