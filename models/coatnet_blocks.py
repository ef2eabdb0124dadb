"""CoAtNet's two kinds of blocks (section 2 and appendix A.1), and one of another paper; see ``models/coatnet.py``."""

from __future__ import annotations

import math

import paddle
import paddle.nn.functional as F
from paddle import nn

import kernels
from models.layers import (
    GELU,
    BatchNorm2D,
    Conv2D,
    DepthwiseConv2D,
    DropPath,
    LayerNorm,
    PointwiseConv2D,
    channels_first,
    channels_last,
    pytorch_default_,
    run_in_sequence,
    zeros_,
)
from models.relative_position import RelativePositionBias


class Attention(nn.Layer):
    """Relative attention (equation 3, pre-softmax form), channels-last ``[B, H, W, C]`` to ``[B, H, W, C']``."""

    def __init__(self, dim: int, out_dim: int, head_dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads, self.head_dim = out_dim // head_dim, head_dim
        self.qkv = PointwiseConv2D(dim, 3 * out_dim)
        self.rel_pos = RelativePositionBias(size, self.num_heads)
        self.proj = PointwiseConv2D(out_dim, out_dim)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        height, width = x.shape[1:3]
        qkv = self.qkv(x).reshape([-1, height * width, self.num_heads, 3 * self.head_dim])
        q, k, v = qkv.split([self.head_dim] * 3, axis=-1)  # each [B, N, heads, head_dim]
        x = kernels.attention(q, k, v, self.rel_pos(height, width))
        return self.proj(x.reshape([-1, height, width, self.num_heads * self.head_dim]))


class LayerNorm2D(LayerNorm):
    """Layer norm over the channels of a map, ``[B, C, H, W]`` to the same."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return channels_first(super().forward(channels_last(x)))


class Downsample(nn.Layer):
    """Average pooling 2×2 for stride 2, then a 1×1 convolution where the width changes: ``[B, C', ⌈H/2⌉, ⌈W/2⌉]``."""

    def __init__(self, dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.expand = Conv2D(dim, out_dim, 1) if dim != out_dim else nn.Identity()

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.expand(F.avg_pool2d(x, 2, ceil_mode=True) if self.stride == 2 else x)


class FeedForward(nn.Layer):
    """Two 1×1 convolutions over the last axis: ``[..., C]`` to the same."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = PointwiseConv2D(dim, hidden_dim)
        self.fc2 = PointwiseConv2D(hidden_dim, dim)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.fc2(kernels.gelu(self.fc1(x)))


class TransformerBlock(nn.Layer):
    """Attention and feed-forward, each after a norm and beside a shortcut: ``[B, C, H, W]`` to ``[B, C', H', W']``."""

    def __init__(self, dim: int, out_dim: int, stride: int, drop_path: float, expand_ratio: float, head_dim: int,
                 size: tuple[int, int]) -> None:
        super().__init__()
        self.reshapes = stride == 2 or dim != out_dim
        if self.reshapes:
            self.shortcut = Downsample(dim, out_dim, stride)
            self.norm1 = nn.Sequential(("norm", LayerNorm2D(dim, epsilon=1e-6)),
                                       ("down", Downsample(dim, dim, stride)))
        else:
            self.norm1 = LayerNorm(dim, epsilon=1e-6)
        self.attn = Attention(dim, out_dim, head_dim, size)
        self.norm2 = LayerNorm(out_dim, epsilon=1e-6)
        self.mlp = FeedForward(out_dim, int(out_dim * expand_ratio))
        self.drop_path = DropPath(drop_path)
        self.apply(init_transformer)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if self.reshapes:  # equation 4
            x, branch = channels_last(self.shortcut(x)), channels_last(self.norm1(x))
        else:
            x = channels_last(x)
            branch = self.norm1(x)
        x = kernels.residual(x, self.attn(branch), share=self.drop_path.share(x))
        x = kernels.residual(x, self.mlp(self.norm2(x)), share=self.drop_path.share(x))
        return channels_first(x)


class SqueezeExcite(nn.Layer):
    """Squeeze-and-excitation (Hu et al., 2018), ``[B, C, H, W]`` to the same."""

    def __init__(self, dim: int, squeeze_dim: int) -> None:
        super().__init__()
        self.fc1 = PointwiseConv2D(dim, squeeze_dim)
        self.fc2 = PointwiseConv2D(squeeze_dim, dim)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return x * F.sigmoid(self.fc2(F.silu(self.fc1(x.flatten(2).mean(-1))))).unsqueeze([2, 3])


class MBConvBlock(nn.Layer):
    """Inverted bottleneck with squeeze-and-excitation (equation 5): ``[B, C, H, W]`` to ``[B, C', H', W']``."""

    def __init__(self, dim: int, out_dim: int, stride: int, drop_path: float, expand_ratio: float,
                 se_ratio: float) -> None:
        super().__init__()
        hidden_dim = int(out_dim * expand_ratio)
        self.shortcut = Downsample(dim, out_dim, stride) if stride == 2 or dim != out_dim else nn.Identity()
        self.pre_norm = BatchNorm2D(dim)
        self.conv1_1x1 = Conv2D(dim, hidden_dim, 1, bias_attr=False)
        self.norm1 = BatchNorm2D(hidden_dim)
        self.conv2_kxk = DepthwiseConv2D(hidden_dim, 3, stride=stride, padding=1, bias_attr=False)
        self.norm2 = BatchNorm2D(hidden_dim)
        self.act = GELU()
        self.se = SqueezeExcite(hidden_dim, max(int(out_dim * se_ratio), 1))
        self.conv3_1x1 = Conv2D(hidden_dim, out_dim, 1)
        self.drop_path = DropPath(drop_path)
        self.apply(init_conv)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        branch = run_in_sequence([self.pre_norm, self.conv1_1x1, self.norm1, self.act, self.conv2_kxk, self.norm2,
                                  self.act, self.se, self.conv3_1x1], x)
        return self.shortcut(x) + self.drop_path(branch)


class PlainBlock(nn.Layer):
    """Two 3×3 convolutions with norms and GELU: ``[B, C, H, W]`` to ``[B, C', ⌈H/2⌉, ⌈W/2⌉]`` for stride 2.

    Not CoAtNet's: ``ConvGroup`` of KellerJordan/cifar10-airbench at f1c599c (``airbench94_muon.py``; Jordan, "94% on
    CIFAR-10 in 3.29 Seconds on a Single GPU", 2024, https://arxiv.org/abs/2404.00498). There is no shortcut, stride 2
    is max-pooling after the first convolution, and the first filters begin as the identity. Where we are not that code:
    the norms learn scales, and their momentum is Paddle's 0.9, not 0.6.
    """

    def __init__(self, dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = Conv2D(dim, out_dim, 3, padding=1, bias_attr=False)
        self.norm1 = BatchNorm2D(out_dim)
        self.act = GELU()
        self.conv2 = Conv2D(out_dim, out_dim, 3, padding=1, bias_attr=False)
        self.norm2 = BatchNorm2D(out_dim)
        for conv in (self.conv1, self.conv2):
            init_identity(conv)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.conv1(x)
        if self.stride == 2:
            x = F.max_pool2d(x, 2, ceil_mode=True)
        return run_in_sequence([self.norm1, self.act, self.conv2, self.norm2, self.act], x)


def init_identity(conv: nn.Conv2D) -> None:
    """Initialise a 3×3 convolution so that its first filters hand on one channel each, the rest as PyTorch does."""
    pytorch_default_(conv)
    weight = conv.weight.numpy()
    channels = range(min(weight.shape[:2]))
    weight[channels] = 0
    weight[channels, channels, 1, 1] = 1
    conv.weight.set_value(weight)


def init_conv(layer: nn.Layer) -> None:
    """Initialise as EfficientNet does: normal with variance 2 / fan_out, no bias."""
    if isinstance(layer, nn.Conv2D):
        fan_out = layer.weight.shape[0] * math.prod(layer.weight.shape[2:]) // layer._groups
        nn.initializer.Normal(std=math.sqrt(2 / fan_out))(layer.weight)
        if layer.bias is not None:
            zeros_(layer.bias)


def init_transformer(layer: nn.Layer) -> None:
    """Initialise as the vision transformer does: Xavier uniform, biases next to 0 or 0."""
    if isinstance(layer, nn.Conv2D):
        nn.initializer.XavierUniform()(layer.weight)
        zeros_(layer.bias)
    elif isinstance(layer, FeedForward):
        for linear in (layer.fc1, layer.fc2):
            nn.initializer.Normal(std=1e-6)(linear.bias)
