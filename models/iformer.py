"""iFormer: Inception Transformer (Si et al., NeurIPS 2022, https://arxiv.org/abs/2205.12956).

Names and numbers follow the authors' code, sail-sg/iFormer at 725d8e7f455b (``models/inception_transformer.py``).

Two generalisations, without effect where the reference runs: maps of any height and width (the reference
assumes square maps of even width), and position tables resampled whenever the map differs from the table
(the reference compares the number of positions only).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import paddle
from paddle import nn

import kernels
from errors import UserError
from models.iformer_mixers import Mixer
from models.layers import (
    GELU,
    BatchNorm2D,
    Classifier,
    Conv2D,
    DropPath,
    LayerNorm,
    Mlp,
    channels_first,
    channels_last,
    check_image_size,
    check_strides,
    drop_path_rates,
    ones_,
    pair,
    resize_position_embedding,
    run_in_sequence,
    trunc_normal_,
    zeros_,
)
from models.registry import Variant, register_family

Norm = partial(LayerNorm, epsilon=1e-6)


class Block(nn.Layer):
    """iFormer block (equations 7 and 8), channels-last ``[B, H, W, C]`` to the same."""

    def __init__(self, dim: int, num_heads: int, attention_heads: int, mlp_ratio: float, qkv_bias: bool,
                 drop_rate: float, attn_drop_rate: float, drop_path: float, pool_size: int,
                 layer_scale_init_value: float | None) -> None:
        super().__init__()
        self.norm1 = Norm(dim)
        self.attn = Mixer(dim, num_heads, attention_heads, qkv_bias, attn_drop_rate, drop_rate, pool_size)
        self.norm2 = Norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop_rate=drop_rate)
        self.drop_path = DropPath(drop_path)
        self.layer_scale_1 = self.layer_scale_2 = None
        if layer_scale_init_value is not None:
            initial = nn.initializer.Constant(layer_scale_init_value)
            self.layer_scale_1 = self.create_parameter([dim], default_initializer=initial)
            self.layer_scale_2 = self.create_parameter([dim], default_initializer=initial)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        for norm, mix, scale in ((self.norm1, self.attn, self.layer_scale_1),
                                 (self.norm2, self.mlp, self.layer_scale_2)):
            x = kernels.residual(x, mix(norm(x)), scale=scale, share=self.drop_path.share(x))
        return x


class Stem(nn.Layer):
    """Two 3×3 convolutions of strides that make 4, 2 or 1: ``[B, in_chans, H, W]`` to ``[B, H/4, W/4, C]`` for 4."""

    def __init__(self, in_chans: int, embed_dim: int, stride: int) -> None:
        super().__init__()
        self.proj1 = Conv2D(in_chans, embed_dim // 2, 3, stride=2 if stride == 4 else 1, padding=1)
        self.norm1 = BatchNorm2D(embed_dim // 2)
        self.act = GELU()
        self.proj2 = Conv2D(embed_dim // 2, embed_dim, 3, stride=min(stride, 2), padding=1)
        self.norm2 = BatchNorm2D(embed_dim)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return channels_last(run_in_sequence([self.proj1, self.norm1, self.act, self.proj2, self.norm2], x))


class PatchEmbed(nn.Layer):
    """Convolution between stages: channels-last ``[B, H, W, C]`` to ``[B, H/2, W/2, C']`` for stride 2."""

    def __init__(self, in_chans: int, embed_dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = Conv2D(in_chans, embed_dim, kernel_size, stride=stride, padding=(kernel_size - 1) // 2)
        self.norm = BatchNorm2D(embed_dim)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return channels_last(self.norm(self.proj(channels_first(x))))


class InceptionTransformer(Classifier):
    """iFormer (figure 2 and table 7): a stem and four stages of blocks on maps of 1/4, 1/8, 1/16 and 1/32.

    ``attention_heads`` gives for every block how many of its stage's ``num_heads`` heads attend (the
    frequency ramp); the other channels go to the high-frequency mixer. ``patch_kernel_size`` (3, or 2 for
    ``iformer_small_p2``) is that of the embeddings of stages 2 to 4; ``pos_embed_stages`` are the stages
    (1 to 4) that start with a position embedding; ``layer_scale_init_value`` (None: no layer scale) holds for
    stages 3 and 4. ``strides`` are the stem's (4, 2 or 1) and those of the embeddings of stages 2 to 4 (2 or 1):
    smaller ones keep small images large.
    """

    block_pattern = r"blocks\d\.\d+"
    map_layout = "NHWC"

    def __init__(self, num_classes: int, image_size: int | tuple[int, int], in_chans: int, drop_path_rate: float,
                 depths: Sequence[int], embed_dims: Sequence[int], num_heads: Sequence[int],
                 attention_heads: Sequence[int], mlp_ratio: float = 4.0, qkv_bias: bool = True,
                 drop_rate: float = 0.0, attn_drop_rate: float = 0.0, patch_kernel_size: int = 3,
                 pos_embed_stages: Sequence[int] = (1, 2, 3, 4),
                 layer_scale_init_value: float | None = 1e-6, strides: Sequence[int] = (4, 2, 2, 2)) -> None:
        super().__init__()
        check_strides("iFormer", strides, [(4, 2, 1), (2, 1), (2, 1), (2, 1)])
        # 2×2 embeddings halve 8 pixels
        check_image_size("iFormer", image_size, math.prod(strides) if patch_kernel_size == 2 else 1)
        _check_architecture(depths, embed_dims, num_heads, attention_heads)
        _check_options(mlp_ratio, embed_dims, pos_embed_stages)
        self.num_features = embed_dims[-1]
        self.pos_embed_stages = tuple(pos_embed_stages)
        sides = pair(image_size)
        heads = iter(attention_heads)
        rates = drop_path_rates(drop_path_rate, depths)
        for stage, (depth, dim, stride) in enumerate(zip(depths, embed_dims, strides, strict=True), start=1):
            if stage == 1:
                self.patch_embed = Stem(in_chans, dim, stride)
            else:
                embed = PatchEmbed(embed_dims[stage - 2], dim, patch_kernel_size, stride)
                self.add_sublayer(f"patch_embed{stage}", embed)
            sides = [max(side // stride, 1) for side in sides]
            if stage in self.pos_embed_stages:
                table = self.create_parameter([1, *sides, dim], default_initializer=trunc_normal_)
                self.add_parameter(f"pos_embed{stage}", table)
            blocks = [
                Block(dim, num_heads[stage - 1], next(heads), mlp_ratio, qkv_bias, drop_rate, attn_drop_rate, rate,
                      pool_size=2 if stage <= 2 else 1,
                      layer_scale_init_value=layer_scale_init_value if stage >= 3 else None)
                for rate in rates[stage - 1][:depth]
            ]
            self.add_sublayer(f"blocks{stage}", nn.Sequential(*blocks))
        self.norm = Norm(self.num_features)
        self.apply(_init_weights)
        self.reset_classifier(num_classes)

    def build_head(self, num_classes: int) -> nn.Layer:
        head = super().build_head(num_classes)
        _init_weights(head)
        return head

    def resize_weights(self, name: str, array: np.ndarray, expected_shape: Sequence[int]) -> np.ndarray | None:
        """Resample a position table ``[1, H, W, C]`` of another image size, as ``forward`` does for another map."""
        if not name.startswith("pos_embed"):
            return None
        return resize_position_embedding(paddle.to_tensor(array), *expected_shape[1:3]).numpy()

    def forward_features(self, x: paddle.Tensor) -> paddle.Tensor:
        for stage in range(1, 5):
            x = getattr(self, "patch_embed" if stage == 1 else f"patch_embed{stage}")(x)  # [B, H, W, C]
            if stage in self.pos_embed_stages:
                x = x + resize_position_embedding(getattr(self, f"pos_embed{stage}"), *x.shape[1:3])
            x = getattr(self, f"blocks{stage}")(x)
        return self.norm(x.flatten(1, 2)).mean(1)


def _check_architecture(depths: Sequence[int], embed_dims: Sequence[int], num_heads: Sequence[int],
                        attention_heads: Sequence[int]) -> None:
    if not len(depths) == len(embed_dims) == len(num_heads) == 4:
        raise UserError("iFormer has four stages: depths, embed_dims and num_heads take four numbers each, got "
                        f"{list(depths)}, {list(embed_dims)}, {list(num_heads)}")
    if len(attention_heads) != sum(depths):
        raise UserError(f"attention_heads takes a number for each of the {sum(depths)} blocks, got "
                        f"{len(attention_heads)}")
    stages = [stage for stage, depth in enumerate(depths) for _ in range(depth)]
    for block, (stage, attending) in enumerate(zip(stages, attention_heads, strict=True)):
        dim, heads = embed_dims[stage], num_heads[stage]
        if dim % heads or not 0 < attending < heads or (dim - attending * (dim // heads)) % 2:
            raise UserError(f"block {block} of iFormer: {attending} of {heads} heads attending in {dim} channels leave "
                            "no even number of channels to the high-frequency mixer")


def _check_options(mlp_ratio: float, embed_dims: Sequence[int], pos_embed_stages: Sequence[int]) -> None:
    if min(embed_dims) * mlp_ratio < 1:
        raise UserError(f"mlp_ratio of iFormer is {mlp_ratio}, which leaves no channel of {min(embed_dims)}")
    if not set(pos_embed_stages) <= {1, 2, 3, 4}:
        raise UserError(f"pos_embed_stages of iFormer is {list(pos_embed_stages)}, expected stages from 1 to 4")


def _init_weights(layer: nn.Layer) -> None:
    """Initialise as the reference: truncated normal of 0.02 for all weights, norms at 1 and 0."""
    if isinstance(layer, (nn.Linear, nn.Conv2D)):
        trunc_normal_(layer.weight)
        if layer.bias is not None:
            zeros_(layer.bias)
    elif isinstance(layer, (nn.LayerNorm, nn.BatchNorm2D)):
        ones_(layer.weight)
        zeros_(layer.bias)


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
_WEIGHTS = "https://huggingface.co/sail/dl2/resolve/main/iformer/{}.pth"
_AT_224 = {"crop_pct": 0.9, "interpolation": "bicubic"}
_AT_384 = {"image_size": 384, "crop_pct": 1.0, "interpolation": "bicubic",
           "note": "the paper prints the parameters of the network for 224 pixels, whose position tables are smaller"}

register_family(
    "iFormer",
    InceptionTransformer,
    {
        "iformer_small": Variant(_SMALL, 19_866_344, 4_825_828_736, "19.866M", "4.849G", 83.382,
                                 weights_url=_WEIGHTS.format("iformer_small"), **_AT_224),
        "iformer_base": Variant(_BASE, 47_866_216, 9_341_953_536, "47.866M", "9.379G", 84.598,
                                weights_url=_WEIGHTS.format("iformer_base"), **_AT_224),
        "iformer_large": Variant(_LARGE, 86_637_096, 14_004_159_488, "86.637M", "14.048G", 84.752,
                                 weights_url=_WEIGHTS.format("iformer_large"), **_AT_224),
        "iformer_small_384": Variant(_SMALL, 20_899_944, 16_031_256_576, "20M", "16.1G", 84.6,
                                     weights_url=_WEIGHTS.format("iformer_small_384"), **_AT_384),
        "iformer_base_384": Variant(_BASE, 48_936_296, 30_445_438_976, "48M", "30.5G", 85.7,
                                    weights_url=_WEIGHTS.format("iformer_base_384"), **_AT_384),
        "iformer_large_384": Variant(_LARGE, 87_743_656, 45_209_248_768, "87M", "45.3G", 85.8,
                                     weights_url=_WEIGHTS.format("iformer_large_384"), **_AT_384),
        "iformer_small_p2": Variant(_SMALL_P2, 18_612_456, 4_663_258_496, "18.61M", "", 81.928, 95.700,
                                    note="an independent re-implementation with 2×2 patch embeddings"),
        "iformer_cifar": Variant(_CIFAR, 3_014_824, 129_850_368, image_size=32,
                                 note="for CIFAR-10; 2,760,394 parameters with 10 classes"),
    },
    paper="Inception Transformer, NeurIPS 2022",
    paper_url="https://arxiv.org/abs/2205.12956",
    reference="sail-sg/iFormer@725d8e7f455b",
)
