"""PoolFormer (Yu et al., "MetaFormer Is Actually What You Need for Vision", CVPR 2022,
https://arxiv.org/abs/2111.11418).

Names and numbers follow the authors' code, sail-sg/poolformer at a075575b8b3d (``models/poolformer.py``), for
classification. Maps are channels-last: the reference's channels-first blocks would transpose around every MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle import nn

import kernels
from errors import UserError
from models import layers
from models.registry import Variant, register_family
from utils import Size


class GroupNorm(nn.GroupNorm):
    """Normalises channels and positions together (one group), ``[B, H, W, C]``."""

    def __init__(self, dim: int) -> None:
        super().__init__(1, dim, data_format="NHWC")

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return kernels.group_norm(x, self.weight, self.bias, self._epsilon)


class Block(nn.Layer):
    """PoolFormer block (figure 2, equations 2 and 3), ``[B, H, W, C]`` to the same.

    The token mixer (equation 4) is the mean of a position's neighbourhood, padding left out, minus the position: the
    subtraction makes up for the residual connection around the mixer.
    """

    def __init__(self, dim: int, pool_size: int, mlp: layers.Mlp, drop_path: float, scale: float | None) -> None:
        super().__init__()
        self.norm1 = GroupNorm(dim)
        self.pool_size = pool_size
        self.norm2 = GroupNorm(dim)
        self.mlp = mlp.apply(layers.init_trunc_normal)
        self.drop_path = layers.DropPath(drop_path)
        self.layer_scale_1 = layers.layer_scale(self, dim, scale)
        self.layer_scale_2 = layers.layer_scale(self, dim, scale)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        norm = self.norm1
        x = kernels.pool_mixer(x, (norm.weight, norm.bias), self.pool_size, norm._epsilon, self.layer_scale_1,
                               self.drop_path.keep_scale(x))
        return self.mlp.add(x, self.norm2, self.drop_path, scale=self.layer_scale_2)


class PatchEmbed(nn.Layer):
    """A strided convolution without norm: ``[B, H, W, C]`` to ``[B, H / stride, W / stride, C']``."""

    def __init__(self, in_chans: int, embed_dim: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = layers.Conv2D(in_chans, embed_dim, kernel_size, stride=stride, padding=padding)
        layers.init_pytorch(self.proj)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return kernels.channels_last(self.proj(kernels.channels_first(x)))


class PoolFormer(layers.Classifier):
    """PoolFormer (figure 2): stages of pooling blocks on maps of 1/4, 1/8, 1/16 and 1/32 of the image.

    ``depths`` and ``embed_dims`` have a number for each stage, as many as wanted. ``layer_scale_init_value`` None
    leaves the layer scales out. Takes images of any size from 3 pixels on.
    """

    smallest_image = 3
    block_pattern = r"network\.\d+\.\d+"

    def __init__(self, num_classes: int, image_size: Size, in_chans: int, drop_path_rate: float,
                 depths: Sequence[int], embed_dims: Sequence[int], mlp_ratio: float = 4.0, pool_size: int = 3,
                 drop_rate: float = 0.0, layer_scale_init_value: float | None = 1e-5) -> None:
        super().__init__()
        if pool_size < 1 or pool_size % 2 == 0:
            raise UserError(f"pool_size of PoolFormer is {pool_size}, expected an odd number")
        self.num_features = embed_dims[-1]
        self.patch_embed = PatchEmbed(in_chans, embed_dims[0], kernel_size=7, stride=4, padding=2)
        self.network = nn.LayerList()
        stages = layers.each_stage(depths, embed_dims=embed_dims, rates=layers.drop_path_rates(drop_path_rate, depths))
        for stage, (dim, rates) in enumerate(stages):
            if stage > 0:
                self.network.append(PatchEmbed(embed_dims[stage - 1], dim, kernel_size=3, stride=2, padding=1))
            blocks = []
            for rate in rates:
                mlp = layers.Mlp(dim, int(dim * mlp_ratio), drop_rate=drop_rate, layer=layers.PointwiseConv2D)
                blocks.append(Block(dim, pool_size, mlp, rate, layer_scale_init_value))
            self.network.append(nn.Sequential(*blocks))
        self.norm = GroupNorm(self.num_features)
        self.reset_classifier(num_classes)

    def forward_features(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.patch_embed(x.transpose([0, 2, 3, 1]))  # a view, which it turns back
        for layer in self.network:
            x = layer(x)  # [B, H, W, C]
        return kernels.mean(self.norm(x).flatten(1, 2), 1)


_S12 = {"depths": [2, 2, 6, 2], "embed_dims": [64, 128, 320, 512]}
_S24 = {"depths": [4, 4, 12, 4], "embed_dims": [64, 128, 320, 512]}
_S36 = {"depths": [6, 6, 18, 6], "embed_dims": [64, 128, 320, 512], "layer_scale_init_value": 1e-6}
_M36 = {"depths": [6, 6, 18, 6], "embed_dims": [96, 192, 384, 768], "layer_scale_init_value": 1e-6}
_M48 = {"depths": [8, 8, 24, 8], "embed_dims": [96, 192, 384, 768], "layer_scale_init_value": 1e-6}


def _variant(name: str, arguments: dict, parameters: int, macs: int, *paper: str | float, crop: float) -> Variant:
    url = f"https://github.com/sail-sg/poolformer/releases/download/v1.0/{name}.pth.tar"
    return Variant(arguments, parameters, macs, *paper, crop_pct=crop, interpolation="bicubic", weights_url=url)


register_family(
    "PoolFormer",
    PoolFormer,
    {row[0]: _variant(*row, crop=0.95 if "_m" in row[0] else 0.9) for row in [
        ("poolformer_s12", _S12, 11_915_176, 1_812_267_008, "12M", "1.8G", 77.2),
        ("poolformer_s24", _S24, 21_388_968, 3_392_208_896, "21M", "3.4G", 80.3),
        ("poolformer_s36", _S36, 30_862_760, 4_972_150_784, "31M", "5.0G", 81.4),
        ("poolformer_m36", _M36, 56_172_520, 8_758_788_096, "56M", "8.8G", 82.1),
        ("poolformer_m48", _M48, 73_473_448, 11_533_320_192, "73M", "11.6G", 82.5),
    ]},
    paper="MetaFormer Is Actually What You Need for Vision, CVPR 2022",
    paper_url="https://arxiv.org/abs/2111.11418",
    reference="sail-sg/poolformer@a075575b8b3d",
)
