"""iFormer: Inception Transformer (Si et al., NeurIPS 2022, https://arxiv.org/abs/2205.12956).

Names and numbers follow the authors' code, sail-sg/iFormer at 725d8e7f455b (``models/inception_transformer.py``).
Maps are channels-last between blocks.

Two generalisations, without effect where the reference runs: maps of any height and width (the reference assumes
square maps of even width), and position tables resampled whenever the map differs from the table (the reference
compares the number of positions only).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import paddle
from paddle import nn

import kernels
from errors import UserError
from models import layers
from models.registry import Variant, register_family
from utils import Size, pair

Norm = partial(layers.LayerNorm, epsilon=1e-6)


class HighMixer(nn.Layer):
    """High-frequency mixer (equations 2 and 3): ``[B, H, W, C]`` to ``[B, 2C, H, W]``.

    The first half of the channels goes through a 1×1, then a depthwise convolution, the second through a max-pool,
    then a 1×1 convolution. As the released weights require, and unlike the equations, each path doubles its width and
    ends in GELU, and the convolutions come before the max-pool, both before attention.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.half = half = dim // 2
        self.conv1 = layers.PointwiseConv2D(half, 2 * half, bias_attr=False)
        self.proj1 = layers.DepthwiseConv2D(2 * half, 3, padding=1, bias_attr=False)
        self.max_pool = nn.MaxPool2D(3, stride=1, padding=1)
        self.proj2 = layers.PointwiseConv2D(half, 2 * half)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        conv, pool = x.split([self.half, self.half], axis=-1)
        conv = kernels.gelu(self.proj1(kernels.channels_first(self.conv1(conv))))
        pool = kernels.channels_last(self.max_pool(kernels.channels_first(pool)))
        return paddle.concat([conv, kernels.channels_first(kernels.gelu(self.proj2(pool)))], axis=1)


class LowMixer(nn.Layer):
    """Low-frequency mixer (equation 4): attention between average pooling and upsampling.

    ``[B, H, W, C]`` to ``[B, C, H, W]``. An odd side is pooled with a last window of one row or column, and cropped
    after upsampling.
    """

    def __init__(self, dim: int, num_heads: int, pool_size: int, qkv_bias: bool, attn_drop_rate: float) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.pool_size = pool_size
        self.attn_drop_rate = attn_drop_rate
        self.qkv = layers.Linear(dim, 3 * dim, bias_attr=None if qkv_bias else False)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        height, width = x.shape[1:3]
        if self.pool_size > 1:
            x = kernels.channels_last(kernels.average_pool(kernels.channels_first(x), self.pool_size))
        h, w = x.shape[1:3]
        qkv = self.qkv(x).reshape([-1, h * w, 3, self.num_heads, self.head_dim])
        x = kernels.self_attention(qkv, dropout=self.attn_drop_rate if self.training else 0.0)  # [B, N, heads, d]
        x = x.reshape([-1, h, w, self.num_heads * self.head_dim])
        if self.pool_size > 1:
            x = upsample(x, self.pool_size)[:, :height, :width]
        return kernels.channels_first(x)


def upsample(x: paddle.Tensor, factor: int) -> paddle.Tensor:
    """Repeat rows and columns: ``[B, H, W, C]`` to ``[B, factor·H, factor·W, C]``.

    Nearest interpolation by concatenation: a faster forward pass on a CPU, and static shapes when exported.
    """
    height, width, dim = x.shape[1:]
    x = paddle.concat([x.reshape([-1, height, width, 1, dim])] * factor, axis=3)  # [B, H, W, factor, C]
    x = paddle.concat([x.reshape([-1, height, 1, factor * width, dim])] * factor, axis=2)
    return x.reshape([-1, factor * height, factor * width, dim])


class Mixer(nn.Layer):
    """Inception token mixer (figure 3), ``[B, H, W, C]``: first channels high, last ``attention_heads`` heads low."""

    def __init__(self, dim: int, num_heads: int, attention_heads: int, pool_size: int, qkv_bias: bool,
                 attn_drop_rate: float, drop_rate: float) -> None:
        super().__init__()
        low_dim = attention_heads * (dim // num_heads)
        layers.check_choice("an entry of attention_heads", attention_heads, range(1, num_heads))
        high_dim = dim - low_dim
        layers.divide("the width of iFormer's high-frequency mixer", high_dim, "two paths", 2)
        self.split_sizes = [high_dim, low_dim]
        fused_dim = 2 * high_dim + low_dim
        self.high_mixer = HighMixer(high_dim)
        self.low_mixer = LowMixer(low_dim, attention_heads, pool_size, qkv_bias, attn_drop_rate)
        self.conv_fuse = layers.DepthwiseConv2D(fused_dim, 3, padding=1, bias_attr=False)
        self.proj = layers.PointwiseConv2D(fused_dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        high, low = x.split(self.split_sizes, axis=-1)
        x = paddle.concat([self.high_mixer(high), self.low_mixer(low)], axis=1)  # [B, 2·high + low, H, W]
        x = kernels.residual(x, self.conv_fuse(x))  # equation 6
        return self.proj_drop(self.proj(kernels.channels_last(x)))

    def add(self, x: paddle.Tensor, norm: layers.LayerNorm, drop_path: layers.DropPath,
            scale: paddle.Tensor | None) -> paddle.Tensor:
        """Return ``x + drop_path(self(norm(x)) · scale)``: one operator in mixed precision on the CPU."""
        high, low = self.high_mixer, self.low_mixer
        if not kernels.rounds_to_bfloat16() or (self.training and (self.proj_drop.p or low.attn_drop_rate)):
            return drop_path.add(x, self(norm(x)), scale=scale)
        return kernels.inception_mixer(
            x, (norm.weight, norm.bias), (high.conv1.weight.flatten(1), high.proj1.weight),
            (high.proj2.weight.flatten(1), high.proj2.bias), (low.qkv.weight, low.qkv.bias), self.conv_fuse.weight,
            (self.proj.weight.flatten(1), self.proj.bias), low.num_heads, low.pool_size, norm._epsilon, scale,
            drop_path.keep_scale(x))


class Block(nn.Layer):
    """iFormer block (equations 7 and 8), ``[B, H, W, C]`` to the same."""

    def __init__(self, dim: int, mixer: Mixer, mlp: layers.Mlp, drop_path: float, scale: float | None) -> None:
        super().__init__()
        self.norm1 = Norm(dim)
        self.attn = mixer
        self.norm2 = Norm(dim)
        self.mlp = mlp
        self.drop_path = layers.DropPath(drop_path)
        self.layer_scale_1 = layers.layer_scale(self, dim, scale)
        self.layer_scale_2 = layers.layer_scale(self, dim, scale)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.attn.add(x, self.norm1, self.drop_path, self.layer_scale_1)
        return self.mlp.add(x, self.norm2, self.drop_path, scale=self.layer_scale_2)


class Stem(nn.Layer):
    """Two 3×3 convolutions with total stride 4, 2 or 1: ``[B, in_chans, H, W]`` to ``[B, H/4, W/4, C]`` for 4."""

    def __init__(self, in_chans: int, embed_dim: int, stride: int) -> None:
        super().__init__()
        self.proj1 = layers.Conv2D(in_chans, embed_dim // 2, 3, stride=2 if stride == 4 else 1, padding=1)
        self.norm1 = layers.NormAct(embed_dim // 2, after="gelu")
        self.proj2 = layers.Conv2D(embed_dim // 2, embed_dim, 3, stride=min(stride, 2), padding=1)
        self.norm2 = layers.NormAct(embed_dim)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return kernels.channels_last(self.norm2(self.proj2(self.norm1(self.proj1(x)))))


class PatchEmbed(nn.Layer):
    """Convolution between stages: ``[B, H, W, C]`` to ``[B, H/2, W/2, C']`` for stride 2."""

    def __init__(self, in_chans: int, embed_dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = layers.Conv2D(in_chans, embed_dim, kernel_size, stride=stride, padding=(kernel_size - 1) // 2)
        self.norm = layers.NormAct(embed_dim)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return kernels.channels_last(self.norm(self.proj(kernels.channels_first(x))))


class InceptionTransformer(layers.Classifier):
    """iFormer (figure 2 and table 7): a stem and four stages of blocks on maps of 1/4, 1/8, 1/16 and 1/32.

    ``attention_heads`` gives for every block how many of its stage's ``num_heads`` heads attend (the frequency ramp);
    the other channels go to the high-frequency mixer. ``patch_kernel_size`` (3, or 2 for ``iformer_small_p2``) is
    that of the embeddings of stages 2 to 4. ``pos_embed_stages`` are the stages (1 to 4) that start with a position
    embedding. ``layer_scale_init_value`` (None: no layer scale) holds for stages 3 and 4. ``strides`` are the stem's
    (4, 2 or 1) and those of the embeddings of stages 2 to 4 (2 or 1): smaller ones keep small images large.
    """

    block_pattern = r"blocks\d\.\d+"
    map_layout = "NHWC"

    def __init__(self, num_classes: int, image_size: Size, in_chans: int, drop_path_rate: float,
                 depths: Sequence[int], embed_dims: Sequence[int], num_heads: Sequence[int],
                 attention_heads: Sequence[int], mlp_ratio: float = 4.0, qkv_bias: bool = True,
                 drop_rate: float = 0.0, attn_drop_rate: float = 0.0, patch_kernel_size: int = 3,
                 pos_embed_stages: Sequence[int] = (1, 2, 3, 4),
                 layer_scale_init_value: float | None = 1e-6, strides: Sequence[int] = (4, 2, 2, 2)) -> None:
        super().__init__()
        layers.check_strides("iFormer", strides, [(4, 2, 1), (2, 1), (2, 1), (2, 1)])
        if len(attention_heads) != sum(depths):
            raise UserError(f"attention_heads of iFormer has {len(attention_heads)} numbers, expected one for each of "
                            f"the {sum(depths)} blocks")
        if not set(pos_embed_stages) <= {1, 2, 3, 4}:
            raise UserError(f"pos_embed_stages of iFormer is {list(pos_embed_stages)}, expected stages from 1 to 4")
        self.num_features = embed_dims[-1]
        self.smallest_image = math.prod(strides) if patch_kernel_size == 2 else 1  # 2×2 embeddings halve 8 pixels
        self.pos_embed_stages = tuple(pos_embed_stages)
        sides, ramp = pair(image_size), iter(attention_heads)
        stages = layers.each_stage(depths, embed_dims=embed_dims, strides=strides, num_heads=num_heads,
                                   rates=layers.drop_path_rates(drop_path_rate, depths))
        for stage, (dim, stride, heads, rates) in enumerate(stages, start=1):
            if stage == 1:
                self.patch_embed = Stem(in_chans, dim, stride)
            else:
                embed = PatchEmbed(embed_dims[stage - 2], dim, patch_kernel_size, stride)
                self.add_sublayer(f"patch_embed{stage}", embed)
            sides = [max(side // stride, 1) for side in sides]
            if stage in self.pos_embed_stages:
                table = self.create_parameter([1, *sides, dim], default_initializer=layers.trunc_normal_)
                self.add_parameter(f"pos_embed{stage}", table)
            blocks = []
            for rate in rates:
                pool_size = 2 if stage <= 2 else 1
                mixer = Mixer(dim, heads, next(ramp), pool_size, qkv_bias, attn_drop_rate, drop_rate)
                mlp = layers.Mlp(dim, int(dim * mlp_ratio), drop_rate=drop_rate)
                blocks.append(Block(dim, mixer, mlp, rate, layer_scale_init_value if stage >= 3 else None))
            self.add_sublayer(f"blocks{stage}", nn.Sequential(*blocks))
        self.norm = Norm(self.num_features)
        self.apply(layers.init_trunc_normal)
        self.reset_classifier(num_classes)

    def resize_weights(self, name: str, array: np.ndarray, expected_shape: Sequence[int]) -> np.ndarray | None:
        """Resample a position table ``[1, H, W, C]`` of another image size; None for other tensors."""
        if not name.startswith("pos_embed"):
            return None
        return layers.resize_position_embedding(paddle.to_tensor(array), *expected_shape[1:3]).numpy()

    def forward_features(self, x: paddle.Tensor) -> paddle.Tensor:
        for stage in range(1, 5):
            x = getattr(self, "patch_embed" if stage == 1 else f"patch_embed{stage}")(x)  # [B, H, W, C]
            if stage in self.pos_embed_stages:
                table = layers.resize_position_embedding(getattr(self, f"pos_embed{stage}"), *x.shape[1:3])
                x = kernels.residual(x, table) if kernels.rounds_to_bfloat16() else x + table
            x = getattr(self, f"blocks{stage}")(x)
        return kernels.mean(self.norm(x.flatten(1, 2)), 1)


_SMALL = {"depths": [3, 3, 9, 3], "embed_dims": [96, 192, 320, 384], "num_heads": [3, 6, 10, 12],
          "attention_heads": [1] * 3 + [3] * 3 + [7] * 4 + [9] * 5 + [11] * 3}
_BASE = {"depths": [4, 6, 14, 6], "embed_dims": [96, 192, 384, 512], "num_heads": [3, 6, 12, 16],
         "attention_heads": [1] * 4 + [3] * 6 + [8] * 7 + [10] * 7 + [15] * 6}
_LARGE = {"depths": [4, 6, 18, 8], "embed_dims": [96, 192, 448, 640], "num_heads": [3, 6, 14, 20],
          "attention_heads": [1] * 4 + [3] * 6 + [10] * 9 + [12] * 9 + [19] * 8}
_SMALL_P2 = {**_SMALL, "patch_kernel_size": 2, "pos_embed_stages": [1], "layer_scale_init_value": None}
# For 32 pixels: maps of 16, 8, 8 and 4 a side, the ramp of attending channels 1/4, 1/2, 2/3, 7/8; layer scale is for
# depths that this has not.
_CIFAR = {"depths": [1, 2, 2, 1], "embed_dims": [64, 128, 192, 256], "num_heads": [4, 4, 6, 8],
          "attention_heads": [1] + [2] * 2 + [4] * 2 + [7], "strides": [2, 2, 1, 2], "layer_scale_init_value": None}
_AT_384 = {"image_size": 384, "crop_pct": 1.0,
           "note": "the paper prints the parameters of the network for 224 pixels, whose position tables are smaller"}


def _released(name: str, arguments: dict, *numbers: Any) -> Variant:
    settings = _AT_384 if name.endswith("384") else {"crop_pct": 0.9}
    url = f"https://huggingface.co/sail/dl2/resolve/main/iformer/{name}.pth"
    return Variant(arguments, *numbers, interpolation="bicubic", weights_url=url, **settings)


register_family(
    "iFormer",
    InceptionTransformer,
    {
        **{row[0]: _released(*row) for row in [
            ("iformer_small", _SMALL, 19_866_344, 4_825_828_736, "19.866M", "4.849G", 83.382),
            ("iformer_base", _BASE, 47_866_216, 9_341_953_536, "47.866M", "9.379G", 84.598),
            ("iformer_large", _LARGE, 86_637_096, 14_004_159_488, "86.637M", "14.048G", 84.752),
            ("iformer_small_384", _SMALL, 20_899_944, 16_031_256_576, "20M", "16.1G", 84.6),
            ("iformer_base_384", _BASE, 48_936_296, 30_445_438_976, "48M", "30.5G", 85.7),
            ("iformer_large_384", _LARGE, 87_743_656, 45_209_248_768, "87M", "45.3G", 85.8),
        ]},
        "iformer_small_p2": Variant(_SMALL_P2, 18_612_456, 4_663_258_496, "18.61M", "", 81.928, 95.700,
                                    note="an independent re-implementation with 2×2 patch embeddings"),
        "iformer_cifar": Variant(_CIFAR, 3_014_824, 129_850_368, image_size=32,
                                 note="for CIFAR-10; 2,760,394 parameters with 10 classes"),
    },
    paper="Inception Transformer, NeurIPS 2022",
    paper_url="https://arxiv.org/abs/2205.12956",
    reference="sail-sg/iFormer@725d8e7f455b",
)
