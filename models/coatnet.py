"""CoAtNet (Dai et al., "Marrying Convolution and Attention for All Data Sizes", NeurIPS 2021,
https://arxiv.org/abs/2106.04803).

``coatnet_0`` to ``coatnet_4`` are the paper's networks, with its parameter counts (25M, 42M, 75M, 168M, 275M). Its
authors published neither code nor weights: names and numbers follow ``coatnet_0_224`` to ``coatnet_4_224`` of
huggingface/pytorch-image-models 1.0.31 (``timm/models/maxxvit.py``), for which no trained weights exist either (its
``coatnet_*_rw_*`` are other networks). ``coatnet_0_simple`` to ``coatnet_4_simple`` follow other code and have 17.8M
parameters where the paper has 25M, since 8 heads attend at every width and hidden layers take a block's input width;
``models/coatnet_simple.py`` lists all that differs.

Where the reference is not the paper: an MBConv has its stride in the depthwise convolution (the paper's own variant in
table 9; equation 5 has it in the expansion), and pooling is 2×2 averaging (appendix A.1: max-pooling of stride 2).
Where we are not the reference: maps with odd sides work, the last row and column being pooled by themselves, and where
a map is not of the size that the network was built for, its tables are resampled (``models/relative_position.py``).
Our multiply-accumulates take in the products of attention; counts that do not see into timm's fused attention leave
them out (4.39G for CoAtNet-0).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import ClassVar

import numpy as np
import paddle
from paddle import nn

from errors import UserError
from models.coatnet_blocks import MBConvBlock, PlainBlock, TransformerBlock, init_conv
from models.layers import (
    GELU,
    BatchNorm2D,
    Classifier,
    Conv2D,
    LayerNorm,
    Linear,
    check_image_size,
    check_strides,
    drop_path_rates,
    pair,
    pytorch_default_,
    run_in_sequence,
)
from models.registry import Variant, register_family
from models.relative_position import resize_square_table


class CoAtNetBase(Classifier):
    """What both forms share: a stem at 1/2 and four stages at 1/4 to 1/32 of the image, and tables of offsets.

    ``kinds`` are those of blocks, by the letter that ``block_types`` has for each. ``strides`` are the stem's and the
    stages'; ``numbers`` are further arguments, which must be positive. A layer that holds a table of offsets has the
    (height, width) of its map in ``size``.
    """

    kinds: ClassVar[Mapping[str, str]] = {"C": "convolution", "T": "Transformer"}

    def __init__(self, image_size: int | tuple[int, int], depths: Sequence[int], embed_dims: Sequence[int],
                 block_types: Sequence[str], strides: Sequence[int] = (2, 2, 2, 2, 2), **numbers: float) -> None:
        super().__init__()
        for key, value in (("depths", depths), ("embed_dims", embed_dims)):
            if not isinstance(value, (list, tuple)) or len(value) != 4 or min(value) < 1:
                raise UserError(f"{key} of CoAtNet is {value}, expected four numbers of 1 or more, one for each stage")
        if len(block_types) != 4 or set(block_types) - set(self.kinds):
            kinds = ", ".join(f"{letter} ({kind})" for letter, kind in self.kinds.items())
            raise UserError(f"block_types of CoAtNet is {block_types}, expected four of {kinds}, such as CCTT")
        check_strides("CoAtNet", strides, [(2, 1)] * 5)
        check_image_size("CoAtNet", image_size, 1)
        for key, value in numbers.items():
            if value <= 0:
                raise UserError(f"{key} of CoAtNet is {value}, expected more than 0")
        self.num_features = embed_dims[-1]
        self.map_sizes = [tuple(-(-side // stride) for side in pair(image_size))
                          for stride in list(accumulate(strides, operator.mul))[1:]]

    def resize_weights(self, name: str, array: np.ndarray, expected_shape: Sequence[int]) -> np.ndarray | None:
        """Resample a table of offsets of a square image to ours; None for a tensor that is no such table."""
        layer_name, _, leaf = name.rpartition(".")
        if not leaf.endswith("bias_table"):
            return None
        return resize_square_table(name, array, dict(self.named_sublayers())[layer_name].size)


class Stem(nn.Layer):
    """Two 3×3 convolutions (S0 of the paper): ``[B, in_chans, H, W]`` to ``[B, C, ⌈H/2⌉, ⌈W/2⌉]`` for stride 2."""

    def __init__(self, in_chans: int, dim: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv2D(in_chans, dim, 3, stride, padding=1, bias_attr=False)
        self.norm1 = BatchNorm2D(dim)
        self.act = GELU()
        self.conv2 = Conv2D(dim, dim, 3, padding=1, bias_attr=False)
        self.apply(init_conv)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return run_in_sequence([self.conv1, self.norm1, self.act, self.conv2], x)


class CoAtNet(CoAtNetBase):
    """The paper's CoAtNet (table 3): a stem of width ``stem_dim`` and four stages.

    ``block_types`` gives each stage MBConv (C) or Transformer (T) blocks; ``expand_ratio`` widens inside both,
    ``se_ratio`` times a block's width is that of the squeeze. A third kind (P) is not the paper's: plain 3×3
    convolutions, which learn more in the first epochs (docs/recipes) and have no branch to drop
    (``models.coatnet_blocks.PlainBlock``). ``pre_logits`` is the hidden layer of the reference's head. ``strides`` are
    the stem's and the stages' (2 or 1: ones keep small images large). Any image size, and any other at inference.
    Raises UserError for an impossible architecture, such as a Transformer stage whose width ``head_dim`` does not
    divide.
    """

    block_pattern = r"stages\.\d\.blocks\.\d+"

    head_name = "head.fc"

    kinds: ClassVar[Mapping[str, str]] = CoAtNetBase.kinds | {"P": "plain 3×3 convolutions"}

    def __init__(self, num_classes: int, image_size: int | tuple[int, int], in_chans: int, drop_path_rate: float,
                 depths: Sequence[int], embed_dims: Sequence[int], stem_dim: int = 64,
                 block_types: Sequence[str] = "CCTT", expand_ratio: float = 4.0, se_ratio: float = 0.25,
                 head_dim: int = 32, strides: Sequence[int] = (2, 2, 2, 2, 2), pre_logits: bool = True) -> None:
        super().__init__(image_size, depths, embed_dims, block_types, strides, stem_dim=stem_dim,
                         expand_ratio=expand_ratio, se_ratio=se_ratio, head_dim=head_dim)
        self.stem = Stem(in_chans, stem_dim, strides[0])
        dim = stem_dim
        stages = []
        for out_dim, kind, size, rates, first in zip(embed_dims, block_types, self.map_sizes, drop_path_rates(
                drop_path_rate, depths), strides[1:], strict=True):
            if kind == "T" and out_dim % head_dim:
                raise UserError(f"embed_dims of CoAtNet: {out_dim} channels do not divide into heads of {head_dim}")
            blocks = []
            for rate in rates:
                stride = 1 if blocks else first
                if kind == "P":
                    blocks.append(PlainBlock(dim, out_dim, stride))
                elif kind == "C":
                    blocks.append(MBConvBlock(dim, out_dim, stride, rate, expand_ratio, se_ratio))
                else:
                    blocks.append(TransformerBlock(dim, out_dim, stride, rate, expand_ratio, head_dim, size))
                dim = out_dim
            stages.append(nn.Sequential(("blocks", nn.Sequential(*blocks))))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Layer()
        self.head.norm = LayerNorm(dim, epsilon=1e-6)
        self.head.pre_logits = nn.Identity()
        if pre_logits:
            self.head.pre_logits = nn.Sequential(("fc", Linear(dim, dim)), ("act", nn.Tanh()))
            pytorch_default_(self.head.pre_logits.fc)
        self.reset_classifier(num_classes)

    def build_head(self, num_classes: int) -> nn.Layer:
        head = super().build_head(num_classes)
        pytorch_default_(head)
        return head

    def forward_features(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.stages(self.stem(x)).flatten(2).mean(-1)
        return self.head.pre_logits(self.head.norm(x))


# Depths and widths (table 3); the simple form has the same.
ARCHITECTURES = {
    "0": {"depths": [2, 3, 5, 2], "embed_dims": [96, 192, 384, 768], "stem_dim": 64},
    "1": {"depths": [2, 6, 14, 2], "embed_dims": [96, 192, 384, 768], "stem_dim": 64},
    "2": {"depths": [2, 6, 14, 2], "embed_dims": [128, 256, 512, 1024], "stem_dim": 128},
    "3": {"depths": [2, 6, 14, 2], "embed_dims": [192, 384, 768, 1536], "stem_dim": 192},
    "4": {"depths": [2, 12, 28, 2], "embed_dims": [192, 384, 768, 1536], "stem_dim": 192},
}
# For 32 pixels: maps of 16 (C), 8 (C), 8 (T) and 4 (T) a side.
_CIFAR = {"depths": [2, 2, 2, 1], "embed_dims": [64, 128, 192, 256], "stem_dim": 32, "strides": [2, 1, 2, 1, 2]}
# For 32 pixels, and plain convolutions in place of MBConv: maps of 16, 8 and 4 (P) and 4 (T) a side.
_PLAIN = {"depths": [1, 1, 1, 2], "embed_dims": [64, 192, 256, 256], "stem_dim": 24, "strides": [1, 2, 2, 2, 1],
          "block_types": "PPPT", "pre_logits": False}
_NOTE = ("the paper's figures are with an MBConv's stride in the expansion, which we count as 4.14G, 8.24G, 15.50G and "
         "34.37G; with it in the depthwise convolution, as in the reference and here, the paper's table 9 has 4.6G, "
         "8.8G and 16.6G, and 82.0, 83.5 and 84.1 %, for CoAtNet-0 to 2")

register_family(
    "CoAtNet",
    CoAtNet,
    {
        "coatnet_0": Variant(ARCHITECTURES["0"], 25_036_820, 4_546_507_776, "25M", "4.2G", 81.6, note=_NOTE),
        "coatnet_1": Variant(ARCHITECTURES["1"], 42_225_776, 8_643_499_008, "42M", "8.4G", 83.3, note=_NOTE),
        "coatnet_2": Variant(ARCHITECTURES["2"], 74_684_744, 16_427_134_976, "75M", "15.7G", 84.1, note=_NOTE),
        "coatnet_3": Variant(ARCHITECTURES["3"], 166_966_264, 36_453_156_864, "168M", "34.7G", 84.5, note=_NOTE),
        "coatnet_4": Variant(ARCHITECTURES["4"], 275_425_288, 62_316_840_960, "275M"),
        "coatnet_cifar": Variant(_CIFAR, 2_405_564, 113_149_952, image_size=32,
                                 note="for CIFAR-10; 2,151,134 parameters with 10 classes"),
        "coatnet_plain_cifar": Variant(_PLAIN, 3_370_992, 142_542_848, image_size=32,
                                       note="for CIFAR-10; 3,116,562 parameters with 10 classes; plain convolutions in "
                                            "place of the paper's MBConv"),
    },
    paper="CoAtNet: Marrying Convolution and Attention for All Data Sizes, NeurIPS 2021",
    paper_url="https://arxiv.org/abs/2106.04803",
    reference="huggingface/pytorch-image-models@v1.0.31",
)
