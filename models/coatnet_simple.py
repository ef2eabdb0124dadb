"""The simple CoAtNet: the widely copied code of KKKSQJ/DeepLearning at c2baf359df9b
(``classification/coatNet/models/networks.py``), names and numbers included.

It has the depths and widths of the paper's CoAtNet (``models/coatnet.py``), but it is another network:
17.8M, 33.2M, 55.7M, 117.7M and 204.0M parameters where the paper has 25M, 42M, 75M, 168M and 275M.

===============================  ===================================  ======================================
..                               ``coatnet_N``, the paper's           ``coatnet_N_simple``, this one
===============================  ===================================  ======================================
attention heads of 32 channels   width / 32                           8 at every width
hidden width of feed-forward     4 × the block's output width         4 × its input width
and MBConv
squeeze width                    1/4 of the output width              1/4 of the input width
squeeze-and-excitation           SiLU, biases                         GELU, no biases
norms of an MBConv               before it and inside                 inside and after it
stride of an MBConv              in the depthwise convolution         in the 1×1 expansion
shortcut at stride 2             average pooling 2×2, 1×1 with bias   max-pooling 3×3, 1×1 without bias
attention at stride 2            norm, then pooling                   pooling, then norm
query, key, value                with biases                          without
stem                             one norm and activation              a norm and activation for each layer
head                             norm, linear, tanh, linear           linear without bias
LayerNorm epsilon                1e-6                                 1e-5
===============================  ===================================  ======================================

Of the 7.2M parameters that CoAtNet-0 has more in the paper's form, 3.5M are in its attention, 3.0M in its feed-forward
layers and 0.6M in its head. The paper's accuracies are those of its own networks; none are published for these.

Where we are not the reference: CoAtNet-2 ends in 1024 channels, not 1026 (a slip there; ``embed_dims`` takes either);
the final pooling is the mean of any map; odd and rectangular images work, and a map that differs from its tables of
offsets has them resampled (the reference fails for any size but the one it was built for). Two additions without
effect at rate 0: ``drop_path_rate``, and ``drop_rate`` in the feed-forward as in the attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import paddle
import paddle.nn.functional as F
from paddle import nn

import kernels
from errors import UserError
from models import layers
from models.coatnet import ARCHITECTURES, CoAtNetBase, relative_bias, table_rows
from models.registry import Variant, register_family
from utils import Size


def conv_norm(conv: nn.Conv2D, after: str | None = "gelu") -> nn.Sequential:
    """Return a convolution, batch norm and activation."""
    return nn.Sequential(conv, layers.NormAct(conv.weight.shape[0], after=after))


class MBConv(nn.Layer):
    """Inverted bottleneck with squeeze-and-excitation: ``[B, C, H, W]`` to ``[B, C', H', W']``."""

    def __init__(self, dim: int, out_dim: int, stride: int, drop_path: float, expand_ratio: float,
                 se_ratio: float) -> None:
        super().__init__()
        hidden_dim, squeeze_dim = int(dim * expand_ratio), max(int(dim * se_ratio), 1)
        self.downsample = stride == 2
        if self.downsample:
            self.pool = nn.MaxPool2D(3, stride=2, padding=1)
            self.proj = layers.Conv2D(dim, out_dim, 1, bias_attr=False)
        self.block = nn.Sequential(
            ("expand_conv", conv_norm(layers.Conv2D(dim, hidden_dim, 1, stride=stride, bias_attr=False))),
            ("dw_conv", conv_norm(layers.DepthwiseConv2D(hidden_dim, 3, padding=1, bias_attr=False))),
            ("se", nn.Sequential(("fc", nn.Sequential(  # means of channels to their factors, Hu et al., 2018
                layers.Linear(hidden_dim, squeeze_dim, bias_attr=False), layers.GELU(),
                layers.Linear(squeeze_dim, hidden_dim, bias_attr=False), nn.Sigmoid())))),
            ("pro_conv", conv_norm(layers.Conv2D(hidden_dim, out_dim, 1, bias_attr=False), after=None)),
        )
        self.drop_path = layers.DropPath(drop_path)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        expand_conv, dw_conv, se, (conv, norm) = self.block
        shortcut = self.proj(self.pool(x)) if self.downsample else x
        x = layers.mbconv(x, *expand_conv, *dw_conv, se, conv)  # [B, C', H', W']
        return norm(x, residual=shortcut, keep_scale=self.drop_path.keep_scale(x))


class Attention(nn.Layer):
    """Relative attention (equation 3) over the positions of a map: ``[B, H·W, C]`` to ``[B, H·W, C']``."""

    def __init__(self, dim: int, out_dim: int, num_heads: int, head_dim: int, drop_rate: float,
                 size: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.size = size
        self.relative_bias_table = self.create_parameter([table_rows(size), num_heads],
                                                         default_initializer=layers.zeros_)
        self.qkv = layers.Linear(dim, 3 * num_heads * head_dim, bias_attr=False)
        self.proj = nn.Sequential(layers.Linear(num_heads * head_dim, out_dim), nn.Dropout(drop_rate))

    def forward(self, x: paddle.Tensor, height: int, width: int) -> paddle.Tensor:
        qkv = self.qkv(x).reshape([-1, height * width, 3, self.num_heads, self.head_dim])
        bias = relative_bias(self.relative_bias_table, self.size, height, width)
        return self.proj(kernels.self_attention(qkv, bias).flatten(2))


class Transformer(nn.Layer):
    """Attention and feed-forward beside shortcuts: ``[B, C, H, W]`` to ``[B, C', H', W']``."""

    def __init__(self, dim: int, out_dim: int, stride: int, drop_path: float, expand_ratio: float, num_heads: int,
                 head_dim: int, drop_rate: float, size: tuple[int, int]) -> None:
        super().__init__()
        hidden_dim = int(dim * expand_ratio)
        self.downsample = stride == 2
        if self.downsample:
            self.pool = nn.MaxPool2D(3, stride=2, padding=1)
            self.proj = layers.Conv2D(dim, out_dim, 1, bias_attr=False)
        self.attn = Attention(dim, out_dim, num_heads, head_dim, drop_rate, size)
        self.ffn = nn.Sequential(("ffn", nn.Sequential(
            layers.Linear(out_dim, hidden_dim), layers.GELU(), nn.Dropout(drop_rate),
            layers.Linear(hidden_dim, out_dim), nn.Dropout(drop_rate))))
        self.norm1 = layers.LayerNorm(dim)
        self.norm2 = layers.LayerNorm(out_dim)
        self.drop_path = layers.DropPath(drop_path)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.pool(x) if self.downsample else x
        height, width = x.shape[2:]
        shortcut = self.proj(x) if self.downsample else x
        shortcut, x = (y.flatten(2).transpose([0, 2, 1]) for y in (shortcut, x))  # [B, H·W, C'] and [B, H·W, C]
        x = self.drop_path.add(shortcut, self.attn(self.norm1(x), height, width))
        x = self.drop_path.add(x, self.ffn(self.norm2(x)))
        return x.transpose([0, 2, 1]).reshape([-1, x.shape[2], height, width])


class CoAtNetSimple(CoAtNetBase):
    """The simple CoAtNet: a stem of ``stem_depth`` convolutions of width ``stem_dim`` and four stages.

    ``block_types`` gives each stage MBConv (C) or Transformer (T) blocks; ``expand_ratio`` and ``se_ratio`` times a
    block's input width are its hidden and its squeeze width. Takes images of any size.
    """

    block_pattern = r"s[1-4]\.\d+"
    head_name = "fc"

    def __init__(self, num_classes: int, image_size: Size, in_chans: int, drop_path_rate: float,
                 depths: Sequence[int], embed_dims: Sequence[int], stem_dim: int = 64, stem_depth: int = 2,
                 block_types: Sequence[str] = "CCTT", expand_ratio: float = 4.0, se_ratio: float = 0.25,
                 num_heads: int = 8, head_dim: int = 32, drop_rate: float = 0.0) -> None:
        super().__init__()
        if stem_depth < 1:
            raise UserError(f"stem_depth of CoAtNet is {stem_depth}, expected 1 or more")
        self.s0 = nn.Sequential(*(
            conv_norm(layers.Conv2D(stem_dim if i else in_chans, stem_dim, 3, 1 if i else 2, 1, bias_attr=False))
            for i in range(stem_depth)))
        block = {"C": lambda *common, size: MBConv(*common, expand_ratio, se_ratio),
                 "T": lambda *common, size: Transformer(*common, expand_ratio, num_heads, head_dim, drop_rate, size)}
        stages = self.build_stages(block, stem_dim, image_size, drop_path_rate, depths, embed_dims, block_types,
                                   strides=(2, 2, 2, 2, 2))
        for stage, blocks in enumerate(stages, start=1):
            self.add_sublayer(f"s{stage}", blocks)
        self.apply(_init_weights)
        self.reset_classifier(num_classes)

    def build_head(self, num_classes: int) -> nn.Layer:
        return layers.Linear(self.num_features, num_classes, bias_attr=False)

    def forward_features(self, x: paddle.Tensor) -> paddle.Tensor:
        for stage in (self.s0, self.s1, self.s2, self.s3, self.s4):
            x = stage(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _init_weights(layer: nn.Layer) -> None:
    """Initialise as the reference: convolutions normal with variance 2 / (out channels × kernel), linear uniform."""
    if isinstance(layer, nn.Conv2D):
        fan_out = layer.weight.shape[0] * math.prod(layer.weight.shape[2:])
        nn.initializer.Normal(std=math.sqrt(2 / fan_out))(layer.weight)
    elif isinstance(layer, nn.Linear):
        layers.init_pytorch(layer)


_NOTE = ("another network than the paper's, whose figures are given beside it: 8 attention heads of 32 at every width "
         "instead of width / 32, hidden widths from a block's input instead of its output, a plain linear head; "
         "`models/coatnet_simple.py` lists what differs")

register_family(
    "CoAtNet",
    CoAtNetSimple,
    {
        "coatnet_0_simple": Variant(ARCHITECTURES["0"], 17_788_344, 3_395_216_384, "25M", "4.2G", note=_NOTE),
        "coatnet_1_simple": Variant(ARCHITECTURES["1"], 33_168_192, 7_056_880_640, "42M", "8.4G", note=_NOTE),
        "coatnet_2_simple": Variant(ARCHITECTURES["2"], 55_717_632, 13_050_397_696, "75M", "15.7G", note=_NOTE),
        "coatnet_3_simple": Variant(ARCHITECTURES["3"], 117_719_488, 27_818_648_576, "168M", "34.7G", note=_NOTE),
        "coatnet_4_simple": Variant(ARCHITECTURES["4"], 203_950_768, 48_815_662_080, "275M", note=_NOTE),
    },
    paper="CoAtNet: Marrying Convolution and Attention for All Data Sizes, NeurIPS 2021",
    paper_url="https://arxiv.org/abs/2106.04803",
    reference="KKKSQJ/DeepLearning@c2baf359df9b",
)
