"""Mobile-Former: Bridging MobileNet and Transformer (Chen et al., CVPR 2022, https://arxiv.org/abs/2108.05895).

Names and numbers follow the authors' code, AAboys/MobileFormer at f44731062abb (``mobile_former.py``,
``dna_blocks.py``). ``models/mobileformer_pvit.py`` is the independent port that was written before that code was
published; the two share the widths of the paper's tables and the attention across the bridges, and differ in the rest.

Differences from the reference, none of which changes a released network:

- Drop path drops the branch of an image. The reference holds tokens as (tokens, images, width), so that its drop
  path drops the branch of a token in all images at once; its released weights were trained without drop path.
- A training batch of one image is refused in words: the head's batch norm sees one value for each image.
- A block's table row gives widths as the paper's table 1 does (the reference gives ratios), and options that no
  released network uses (token MLPs, separable depthwise convolutions, other activations) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import paddle
from paddle import nn

from errors import UserError
from models.layers import BatchNorm2D, Classifier, Conv2D, Sequential, check_image_size
from models.mobileformer_blocks import (
    BlockRow,
    DownsampleBlock,
    Head,
    InvertedBottleneckBlock,
    LiteBottleneck,
    MobileToFormer,
)
from models.registry import Variant, register_family


class MobileFormer(Classifier):
    """Mobile-Former (figure 1 and table 1): a stem, a lite bottleneck, blocks with tokens beside them, and a head.

    ``blocks`` are the rows of table 1, ``[exp_size, channels, stride]``, with the side of the depthwise kernels as
    fourth number where it is not 3; a block of stride 2 widens by ``downsample_ratio`` before its second pointwise
    convolution. ``stem_stride`` and ``lite_stride`` are 1 or 2 (1 keeps small images large). ``groups`` above 1
    splits all pointwise convolutions and shuffles channels between them. Bridges have ``num_heads`` heads, the
    attention among ``token_num`` tokens of width ``token_dim`` has ``token_heads``; the hidden layers that set the
    slopes of dynamic ReLUs have ``token_dim // dyrelu_reduction`` units. ``head_drop_rate`` is the dropout before the
    last layer. Nothing depends on ``image_size``: images of any size go through, at 1/32 of which the last map
    stands. Raises UserError for widths that do not divide as they must, and for training batches of one image.
    """

    block_pattern = r"features\.\d+"

    head_name = "classifier.classifier"

    def __init__(self, num_classes: int, image_size: int | tuple[int, int], in_chans: int, drop_path_rate: float,
                 stem_channels: int, lite_exp_size: int, lite_channels: int, blocks: Sequence[Sequence[int]],
                 token_num: int, token_dim: int, head_channels: int, num_features: int, stem_stride: int = 2,
                 lite_stride: int = 2, groups: int = 1, num_heads: int = 2, token_heads: int = 4,
                 dyrelu_reduction: int = 4, mlp_ratio: int = 2, downsample_ratio: int = 4,
                 head_drop_rate: float = 0.0) -> None:
        super().__init__()
        check_image_size("Mobile-Former", image_size, 1)
        check_positive(in_chans=in_chans, stem_channels=stem_channels, token_num=token_num, token_dim=token_dim,
                       head_channels=head_channels, num_features=num_features, groups=groups, num_heads=num_heads,
                       token_heads=token_heads, dyrelu_reduction=dyrelu_reduction, mlp_ratio=mlp_ratio,
                       downsample_ratio=downsample_ratio)
        check_range(0, 1, head_drop_rate=head_drop_rate)
        check_stride("the stem", stem_stride)
        lite, *rows = block_rows(stem_channels, [lite_exp_size, lite_channels, lite_stride], blocks)
        check_widths([lite, *rows], head_channels, groups, num_heads)
        check_multiples("token_heads", token_heads, token_dim=token_dim)
        check_multiples("dyrelu_reduction", dyrelu_reduction, token_dim=token_dim)
        for index, row in enumerate([lite, *rows]):
            if row is lite or row.stride == 2:
                check_multiples("the width before it", row.in_channels, part_name(index), exp_size=row.exp_size)
        self.num_features = num_features
        self.head_drop_rate = head_drop_rate
        self.tokens = nn.Embedding(token_num, token_dim, weight_attr=nn.initializer.Normal(0.0, 1.0))
        self.stem = Sequential(Conv2D(in_chans, stem_channels, 3, stem_stride, padding=1, bias_attr=False),
                               BatchNorm2D(stem_channels), nn.ReLU6())
        features: list[nn.Layer] = [LiteBottleneck(lite, groups)]
        for index, row in enumerate(rows, start=2):  # the reference counts the lite bottleneck and starts above 0
            settings = {"token_dim": token_dim, "num_heads": num_heads, "token_heads": token_heads,
                        "mlp_ratio": mlp_ratio, "drop_path": drop_path_rate * index / (1 + len(rows))}
            if row.stride == 1:
                features.append(InvertedBottleneckBlock(row, groups, dyrelu_reduction, **settings))
            else:
                features.append(DownsampleBlock(row, groups, dyrelu_reduction, downsample_ratio, **settings))
        self.features = nn.LayerList(features)
        channels = rows[-1].channels
        self.local_global = MobileToFormer(channels, token_dim, num_heads, drop_path_rate)
        self.classifier = Head(channels, token_dim, head_channels, num_features, groups)
        self.apply(_init_weights)
        self.reset_classifier(num_classes)

    def build_head(self, num_classes: int) -> nn.Layer:
        head = nn.Sequential(nn.Dropout(self.head_drop_rate), super().build_head(num_classes))
        _init_weights(head[1])
        return head

    def forward_features(self, x: paddle.Tensor) -> paddle.Tensor:
        tokens = self.tokens.weight.unsqueeze(0).expand([x.shape[0], -1, -1])  # [B, T, D]
        x = self.features[0](self.stem(x))
        for block in self.features[1:]:
            x, tokens = block(x, tokens)
        tokens = self.local_global(x, tokens)
        return self.classifier(x, tokens[:, 0])


def part_name(index: int) -> str:
    """Return what messages call row ``index`` of the table: the lite bottleneck is row 0."""
    return f"block {index}" if index else "the lite bottleneck"


def block_rows(stem_channels: int, lite: Sequence[int], blocks: Sequence[Sequence[int]]) -> list[BlockRow]:
    """Return the rows of the lite bottleneck and the blocks; raises UserError for a row that makes no sense."""
    if not isinstance(blocks, (list, tuple)) or not blocks:
        raise UserError(f"blocks of Mobile-Former is {blocks!r}, expected a list of rows [exp_size, channels, stride]")
    rows: list[BlockRow] = []
    for index, numbers in enumerate([lite, *blocks]):
        name = part_name(index)
        if not isinstance(numbers, (list, tuple)) or len(numbers) not in (3, 4):
            raise UserError(f"{name} of Mobile-Former is {numbers!r}, expected [exp_size, channels, stride] or "
                            "[exp_size, channels, stride, kernel_size]")
        row = BlockRow(rows[-1].channels if rows else stem_channels, *numbers)
        check_positive(name, **row._asdict())
        check_stride(name, row.stride)
        if row.kernel_size % 2 == 0:
            raise UserError(f"kernel_size of {name} is {row.kernel_size}, expected an odd number")
        rows.append(row)
    return rows


def check_widths(rows: Sequence[BlockRow], head_channels: int, groups: int, num_heads: int) -> None:
    """Raise UserError for widths that the groups of the pointwise convolutions or the bridges' heads do not divide."""
    for index, row in enumerate(rows):
        check_multiples("groups", groups, part_name(index), exp_size=row.exp_size, channels=row.channels)
        check_multiples("num_heads", num_heads, part_name(index), channels=row.channels)
    check_multiples("groups", groups, head_channels=head_channels)


def check_stride(name: str, stride: int) -> None:
    """Raise UserError for a stride that is neither 1 nor 2."""
    if stride not in (1, 2):
        raise UserError(f"stride of {name} is {stride!r}, expected 1 or 2")


def check_positive(part: str = "", /, **sizes: int) -> None:
    """Raise UserError for a size of ``part`` that is no whole number from 1 up."""
    for key, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{key} of {part or 'Mobile-Former'} is {value!r}, expected a whole number from 1 up")


def check_range(low: float, high: float, **numbers: float) -> None:
    """Raise UserError for what is no number from ``low`` up to, and below, ``high``."""
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
            raise UserError(f"{key} of Mobile-Former is {value!r}, expected a number, {low} <= {key} < {high}")


def check_multiples(divisor_name: str, divisor: int, part: str = "", /, **sizes: int) -> None:
    """Raise UserError for a size of ``part`` that is no multiple of ``divisor``."""
    for key, value in sizes.items():
        if value % divisor:
            raise UserError(f"{key} of {part or 'Mobile-Former'} is {value}, expected a multiple of {divisor_name}, "
                            f"which is {divisor}")


def _init_weights(layer: nn.Layer) -> None:
    """Initialise as the reference: convolutions normal by fan out, groups not counted, linear layers normal of 0.01."""
    if isinstance(layer, nn.Conv2D):
        channels, _, height, width = layer.weight.shape
        nn.initializer.Normal(0.0, (2.0 / (channels * height * width)) ** 0.5)(layer.weight)
    elif isinstance(layer, nn.Linear):
        nn.initializer.Normal(0.0, 0.01)(layer.weight)


_BLOCKS_52M = [[36, 12, 1], [72, 24, 2], [72, 24, 1], [144, 48, 2], [192, 48, 1], [288, 64, 1],
               [384, 96, 2], [576, 96, 1]]
_52M = {"token_num": 3, "token_dim": 128, "stem_channels": 8, "lite_exp_size": 24, "lite_channels": 12,
        "lite_stride": 2, "blocks": _BLOCKS_52M, "head_channels": 576, "num_features": 1024}

TABLE: Mapping[str, Mapping[str, Any]] = {
    "26m": {**_52M, "groups": 4},
    "52m": _52M,
    "96m": {"token_num": 4, "token_dim": 128, "stem_channels": 12, "lite_exp_size": 24, "lite_channels": 12,
            "lite_stride": 1, "head_channels": 768, "num_features": 1280,
            "blocks": [[72, 16, 2], [96, 32, 2], [96, 32, 1], [192, 64, 2], [256, 64, 1], [384, 88, 1],
                       [528, 128, 2], [768, 128, 1]]},
    "151m": {"token_num": 6, "token_dim": 192, "stem_channels": 12, "lite_exp_size": 24, "lite_channels": 12,
             "lite_stride": 1, "head_channels": 768, "num_features": 1280,
             "blocks": [[72, 16, 2], [48, 16, 1], [96, 32, 2], [96, 32, 1], [192, 64, 2], [256, 64, 1],
                        [384, 88, 1], [528, 88, 1], [528, 128, 2], [768, 128, 1], [768, 128, 1]]},
    "214m": {"token_num": 6, "token_dim": 192, "stem_channels": 12, "lite_exp_size": 24, "lite_channels": 12,
             "lite_stride": 1, "head_channels": 960, "num_features": 1600,
             "blocks": [[72, 20, 2], [60, 20, 1], [120, 40, 2], [160, 40, 1], [240, 80, 2], [320, 80, 1],
                        [480, 112, 1], [672, 112, 1], [672, 160, 2], [960, 160, 1], [960, 160, 1]]},
    "294m": {"token_num": 6, "token_dim": 192, "stem_channels": 16, "lite_exp_size": 32, "lite_channels": 16,
             "lite_stride": 1, "head_channels": 1152, "num_features": 1920,
             "blocks": [[96, 24, 2], [96, 24, 1], [144, 48, 2], [192, 48, 1], [288, 96, 2], [384, 96, 1],
                        [576, 128, 1], [768, 128, 1], [768, 192, 2], [1152, 192, 1], [1152, 192, 1]]},
    "508m": {"token_num": 6, "token_dim": 192, "stem_channels": 24, "lite_exp_size": 48, "lite_channels": 24,
             "lite_stride": 1, "head_channels": 1440, "num_features": 1920,
             "blocks": [[144, 40, 2], [120, 40, 1], [240, 72, 2], [216, 72, 1], [432, 128, 2], [512, 128, 1],
                        [768, 176, 1], [1056, 176, 1], [1056, 240, 2], [1440, 240, 1], [1440, 240, 1]]},
}

_DRIVE = "https://drive.google.com/file/d/{}/view"
_PAPER = [  # parameters, MACs, top-1 and file of the authors' README, our counts on their code
    ("26m", "3.2M", "26M", 64.0, "15uWYzx2VWWUjacZQHB56vOHzKxQDlp5O", 3_232_788, 23_550_208),
    ("52m", "3.5M", "52M", 68.7, "1ekq_FPl57gjIlYX16Ll0nBuEyB0pjgGt", 3_469_092, 49_290_496),
    ("96m", "4.6M", "96M", 72.8, "1kMbRceswujtliCHKr-nxMFsrkvBrEfrW", 4_585_252, 92_017_040),
    ("151m", "7.6M", "151M", 75.2, "1w4QO-zhJ8QI1zGu7iOZ7lXxYJ5G1VXdF", 7_595_828, 146_249_168),
    ("214m", "9.4M", "214M", 76.7, "13MOjdIMMBJgqyq_ld-grRhBBHOFU5Ggd", 9_425_920, 208_374_240),
    ("294m", "11.4M", "294M", 77.9, "1JBSM7NJ60fN9TgT5sMnbhmbZwrzcBd0r", 11_422_648, 286_732_160),
    ("508m", "14.0M", "508M", 79.3, "1bqLIcpbCaxK-Eb4wcxk0iJpFJ1nXfGuF", 13_976_976, 498_467_680),
]
_NOTE = ("the paper's MACs take in about one operation for each element that a norm puts out; with these ours come to "
         "26.0M, 51.7M, 96.3M, 151.9M, 215.1M, 295.3M and 510.5M")

register_family(
    "Mobile-Former",
    MobileFormer,
    {f"mobileformer_{size}": Variant(TABLE[size], parameters, macs, paper_parameters, paper_macs, top1,
                                     crop_pct=0.875, interpolation="bilinear", weights_url=_DRIVE.format(file),
                                     note=_NOTE)
     for size, paper_parameters, paper_macs, top1, file, parameters, macs in _PAPER},
    paper="Mobile-Former: Bridging MobileNet and Transformer, CVPR 2022",
    paper_url="https://arxiv.org/abs/2108.05895",
    reference="AAboys/MobileFormer@f44731062abb",
)
