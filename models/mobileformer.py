"""Mobile-Former: Bridging MobileNet and Transformer (Chen et al., CVPR 2022, https://arxiv.org/abs/2108.05895).

Names and numbers follow the authors' code, AAboys/MobileFormer at f44731062abb (``mobile_former.py``,
``dna_blocks.py``); ``models/mobileformer_pvit.py`` is an independent port. Maps are ``[B, C, H, W]``, tokens
``[B, T, D]``. Deviations from the reference, none of which changes a released network:

- Drop path drops the branch of an image. The reference's drops the branch of a token in all images at once, since it
  holds tokens as (tokens, images, width); its released weights were trained without drop path.
- A block's row gives widths as the paper's table 1 does (the reference gives ratios), and options that no released
  network uses (token MLPs, separable depthwise convolutions, other activations) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import paddle
import paddle.nn.functional as F
from paddle import nn

import kernels
from errors import UserError
from models import layers
from models.registry import Variant, register_family
from utils import Size


class BlockRow(NamedTuple):
    """A line of table 1, after the width that enters: inner width, width that leaves, stride, kernel's side."""

    in_channels: int
    exp_size: int
    channels: int
    stride: int
    kernel_size: int = 3


def block_rows(stem_channels: int, stem_stride: int, lite: Sequence[int],
               blocks: Sequence[Sequence[int]]) -> list[BlockRow]:
    """Return the rows of the lite bottleneck and the blocks; raises UserError for impossible strides and kernels."""
    layers.check_choice("stem_stride of Mobile-Former", stem_stride, (1, 2))
    rows: list[BlockRow] = []
    for numbers in (lite, *blocks):
        row = BlockRow(rows[-1].channels if rows else stem_channels, *numbers)
        if row.stride not in (1, 2) or row.kernel_size % 2 == 0:
            raise UserError(f"a row of Mobile-Former is {list(numbers)}, expected [exp_size, channels, stride], with "
                            "stride 1 or 2, and an odd kernel_size or none")
        rows.append(row)
    return rows


def hard_sigmoid(x: paddle.Tensor) -> paddle.Tensor:
    """Return relu6(x + 3) / 6, of any shape; exact in float64 too, where Paddle's operator is off by 1e-8."""
    return paddle.scale(x, 1 / 6, 0.5).clip(0.0, 1.0)


class MobileToFormer(nn.Layer):
    """The bridge from the map to the tokens: ``[B, C, H, W]`` and ``[B, T, D]`` to ``[B, T, D]``.

    Queries are projected tokens, keys and values the raw map (equation 1). Another projection of the tokens gates the
    result, which equation 1 does not have: the released weights do.
    """

    def __init__(self, channels: int, token_dim: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        layers.divide("a width of Mobile-Former", channels, "num_heads", num_heads)
        self.num_heads = num_heads
        self.alpha = nn.Sequential(layers.Linear(token_dim, channels))
        self.q = layers.Linear(token_dim, channels)
        self.proj = layers.Linear(channels, token_dim)
        self.layer_norm = layers.LayerNorm(token_dim)
        self.drop_path = layers.DropPath(drop_path)

    def forward(self, x: paddle.Tensor, tokens: paddle.Tensor) -> paddle.Tensor:
        gathered = kernels.attend_map(self.q(tokens), x, self.num_heads)  # equation 1, [B, T, C]
        gathered = gathered * (2.0 * hard_sigmoid(self.alpha(tokens)))
        return self.layer_norm(tokens + self.drop_path(self.proj(gathered)))


class Former(nn.Layer):
    """Attention among raw tokens, then two fully connected layers, norms last: ``[B, T, D]`` to the same."""

    def __init__(self, token_dim: int, num_heads: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = layers.divide("token_dim of Mobile-Former", token_dim, "token_heads", num_heads)
        self.q = layers.Linear(token_dim, token_dim)
        self.channel_mlp = layers.Linear(token_dim, token_dim)
        self.layer_norm = layers.LayerNorm(token_dim)
        self.ffn = nn.Sequential(layers.Linear(token_dim, mlp_ratio * token_dim), layers.GELU(),
                                 layers.Linear(mlp_ratio * token_dim, token_dim))
        self.ffn_norm = layers.LayerNorm(token_dim)
        self.drop_path = layers.DropPath(drop_path)

    def forward(self, tokens: paddle.Tensor) -> paddle.Tensor:
        query, keys = (x.reshape([0, 0, self.num_heads, self.head_dim]) for x in (self.q(tokens), tokens))
        mixed = kernels.attention(query, keys, keys).flatten(2)  # [B, T, D]
        tokens = self.layer_norm(tokens + self.drop_path(self.channel_mlp(mixed)))
        return self.ffn_norm(tokens + self.ffn(tokens))


class FormerToMobile(nn.Layer):
    """The bridge from the projected tokens to the raw map: ``[B, C, H, W]`` and ``[B, T, D]`` to ``[B, C, H, W]``."""

    def __init__(self, channels: int, token_dim: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.k = layers.Linear(token_dim, channels)
        self.proj = layers.Linear(token_dim, channels)
        self.drop_path = layers.DropPath(drop_path)

    def forward(self, x: paddle.Tensor, tokens: paddle.Tensor) -> paddle.Tensor:
        spread = kernels.attend_tokens(x, self.k(tokens), self.proj(tokens), self.num_heads)  # equation 2
        return x + self.drop_path(spread)


class DynamicReLU(nn.Layer):
    """Dynamic ReLU B (Chen et al., ECCV 2020) without offsets: max(a₁x, a₂x), ``[B, C, H, W]`` to the same.

    The slopes a₁ in [0, 2] and a₂ in [-1, 1] of each channel come from the first token, ``[B, D]``.
    """

    def __init__(self, channels: int, token_dim: int, dyrelu_reduction: int) -> None:
        super().__init__()
        self.hyper = nn.Sequential(layers.Linear(token_dim, token_dim // dyrelu_reduction), nn.ReLU(),
                                   layers.Linear(token_dim // dyrelu_reduction, 2 * channels))

    def forward(self, x: paddle.Tensor, token: paddle.Tensor) -> paddle.Tensor:
        first, second = (2.0 * hard_sigmoid(self.hyper(token))).split(2, axis=1)  # each [B, C]
        return kernels.dynamic_relu(x, first, second - 1.0)


def shuffle(x: paddle.Tensor, groups: int) -> paddle.Tensor:
    """Interleave the channels of ``groups`` groups (Zhang et al., "ShuffleNet", 2018, figure 1): ``[B, C, H, W]``."""
    return kernels.channel_shuffle(x, groups) if groups > 1 else x


def pointwise(in_channels: int, channels: int, groups: int, bias_attr: bool | None = False) -> layers.Conv2D:
    """Return a 1×1 convolution."""
    for width in (in_channels, channels):
        layers.divide("a width of Mobile-Former", width, "groups", groups)
    return layers.Conv2D(in_channels, channels, 1, groups=groups, bias_attr=bias_attr)


def widening(in_channels: int, channels: int, kernel_size: int, stride: int) -> layers.DepthwiseConv2D:
    """Return a depthwise convolution that makes ``channels`` of ``in_channels``."""
    multiplier = layers.divide("exp_size of Mobile-Former", channels, "the width before it", in_channels)
    return layers.DepthwiseConv2D(in_channels, kernel_size, stride, padding=kernel_size // 2, bias_attr=False,
                                  multiplier=multiplier)


class ConvNorm(nn.Sequential):
    """A convolution, batch norm and a shuffle of ``groups`` groups (1: none); then ``keep_scale · x + residual``."""

    def __init__(self, conv: layers.Conv2D, groups: int = 1) -> None:
        super().__init__(conv, layers.NormAct(conv.weight.shape[0]))
        self.groups = groups

    def forward(self, x: paddle.Tensor, residual: paddle.Tensor | None = None,
                keep_scale: paddle.Tensor | None = None) -> paddle.Tensor:
        conv, norm = self
        if self.groups == 1:
            return norm(conv(x), residual, keep_scale)
        x = shuffle(norm(conv(x)), self.groups)
        return x if residual is None else kernels.residual(residual, x, keep_scale=keep_scale)


class Block(nn.Layer):
    """Mobile-Former block (figure 3): ``[B, C, H, W]`` and ``[B, T, D]`` to ``[B, C', H', W']`` and ``[B, T, D]``.

    Map to tokens, tokens among themselves, ``mobile`` (a subclass's) with the updated first token, tokens to map.
    """

    def __init__(self, row: BlockRow, token_dim: int, num_heads: int, token_heads: int, mlp_ratio: int,
                 drop_path: float) -> None:
        super().__init__()
        self.local_global = MobileToFormer(row.in_channels, token_dim, num_heads, drop_path)
        self.global_block = Former(token_dim, token_heads, mlp_ratio, drop_path)
        self.global_local = FormerToMobile(row.channels, token_dim, num_heads, drop_path)
        self.drop_path = layers.DropPath(drop_path)

    def forward(self, x: paddle.Tensor, tokens: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        tokens = self.global_block(self.local_global(x, tokens))
        return self.global_local(self.mobile(x, tokens[:, 0]), tokens), tokens


class InvertedBottleneckBlock(Block):
    """The block of stride 1: pointwise, depthwise, pointwise, with a skip where the width stays."""

    def __init__(self, row: BlockRow, groups: int, dyrelu_reduction: int, **tokens: Any) -> None:
        super().__init__(row, **tokens)
        width, token_dim = row.exp_size, tokens["token_dim"]
        self.skip = row.in_channels == row.channels
        self.conv1 = ConvNorm(pointwise(row.in_channels, width, groups), groups=groups)
        self.hyper1 = DynamicReLU(width, token_dim, dyrelu_reduction)
        self.conv2 = ConvNorm(widening(width, width, row.kernel_size, stride=1))
        self.hyper2 = DynamicReLU(width, token_dim, dyrelu_reduction)
        self.conv3 = ConvNorm(pointwise(width, row.channels, groups), groups=groups)

    def mobile(self, x: paddle.Tensor, token: paddle.Tensor) -> paddle.Tensor:
        out = self.hyper1(self.conv1(x), token)
        out = self.hyper2(self.conv2(out), token)
        return self.conv3(out, residual=x, keep_scale=self.drop_path.keep_scale(x)) if self.skip else self.conv3(out)


class DownsampleBlock(Block):
    """The block of stride 2: depthwise (widening) and pointwise to the new width, then the two again around a skip."""

    def __init__(self, row: BlockRow, groups: int, dyrelu_reduction: int, expand_ratio: int, **tokens: Any) -> None:
        super().__init__(row, **tokens)
        channels, token_dim, side = row.channels, tokens["token_dim"], row.kernel_size
        self.conv1 = ConvNorm(widening(row.in_channels, row.exp_size, side, row.stride),
                              groups=row.in_channels if groups > 1 else 1)
        self.hyper1 = DynamicReLU(row.exp_size, token_dim, dyrelu_reduction)
        self.conv2 = ConvNorm(pointwise(row.exp_size, channels, groups))
        self.conv3 = ConvNorm(widening(channels, expand_ratio * channels, side, stride=1),
                              groups=channels if groups > 1 else 1)
        self.hyper3 = DynamicReLU(expand_ratio * channels, token_dim, dyrelu_reduction)
        self.conv4 = ConvNorm(pointwise(expand_ratio * channels, channels, groups))

    def mobile(self, x: paddle.Tensor, token: paddle.Tensor) -> paddle.Tensor:
        x = self.conv2(self.hyper1(self.conv1(x), token))
        return self.conv4(self.hyper3(self.conv3(x), token), residual=x, keep_scale=self.drop_path.keep_scale(x))


class LiteBottleneck(nn.Layer):
    """The first block, without tokens: depthwise (widening), ReLU6, pointwise, and a skip where the shape stays."""

    def __init__(self, row: BlockRow, groups: int) -> None:
        super().__init__()
        self.skip = row.stride == 1 and row.in_channels == row.channels
        self.groups = row.in_channels if groups > 1 else 1
        self.conv = nn.Sequential(  # the numbers of the reference: 2 is ReLU6, 3 the shuffle
            ("0", widening(row.in_channels, row.exp_size, row.kernel_size, row.stride)),
            ("1", layers.NormAct(row.exp_size, after="relu6")),
            ("4", pointwise(row.exp_size, row.channels, groups)),
            ("5", layers.NormAct(row.channels)))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        depthwise, act, conv, norm = self.conv
        return norm(conv(shuffle(act(depthwise(x)), self.groups)), residual=x if self.skip else None)


class Head(nn.Layer):
    """Map and first token, ``[B, C, H, W]`` and ``[B, D]``, to features; the network adds ``classifier`` below."""

    def __init__(self, channels: int, token_dim: int, hidden: int, num_features: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.conv = nn.Sequential(("1", pointwise(channels, hidden, groups)),  # 0 is the shuffle
                                  ("2", layers.NormAct(hidden, after="relu6")))
        self.fc = nn.Sequential(layers.Linear(hidden + token_dim, num_features), nn.BatchNorm1D(num_features),
                                nn.Hardswish())

    def forward(self, x: paddle.Tensor, token: paddle.Tensor) -> paddle.Tensor:
        if self.fc[1].training and x.shape[0] == 1:
            raise UserError("the head norm of Mobile-Former has a training batch of 1 image, expected 2 or more")
        pooled = F.hardswish(kernels.mean(self.conv(shuffle(x, self.groups)).flatten(2), 2))  # [B, hidden]
        return self.fc(paddle.concat([pooled, token], axis=1))


def _init_weights(layer: nn.Layer) -> None:
    """Initialise as the reference: convolutions normal by fan out, groups not counted, linear layers normal of 0.01."""
    if isinstance(layer, nn.Conv2D):
        channels, _, height, width = layer.weight.shape
        nn.initializer.Normal(0.0, (2.0 / (channels * height * width)) ** 0.5)(layer.weight)
    elif isinstance(layer, nn.Linear):
        nn.initializer.Normal(0.0, 0.01)(layer.weight)


class MobileFormer(layers.Classifier):
    """Mobile-Former (figure 1 and table 1): a stem, a lite bottleneck, blocks with tokens beside them, and a head.

    ``blocks`` are the rows of table 1, ``[exp_size, channels, stride]``, with the side of the depthwise kernels as
    fourth number where it is not 3; a block of stride 2 widens by ``downsample_ratio`` before its second pointwise
    convolution. ``stem_stride`` and ``lite_stride`` are 1 or 2 (1 keeps small images large). ``groups`` above 1
    splits all pointwise convolutions and shuffles channels between them. Bridges have ``num_heads`` heads, the
    attention among ``token_num`` tokens of width ``token_dim`` has ``token_heads``. The hidden layers that set the
    slopes of dynamic ReLUs have ``token_dim // dyrelu_reduction`` units. ``head_drop_rate`` is the dropout before the
    last layer. Takes images of any size. Raises UserError for widths that do not divide as they must, and for training
    batches of one image.
    """

    block_pattern = r"features\.\d+"
    head_name = "classifier.classifier"
    init_head = staticmethod(_init_weights)

    def __init__(self, num_classes: int, image_size: Size, in_chans: int, drop_path_rate: float,
                 stem_channels: int, lite_exp_size: int, lite_channels: int, blocks: Sequence[Sequence[int]],
                 token_num: int, token_dim: int, head_channels: int, num_features: int, stem_stride: int = 2,
                 lite_stride: int = 2, groups: int = 1, num_heads: int = 2, token_heads: int = 4,
                 dyrelu_reduction: int = 4, mlp_ratio: int = 2, downsample_ratio: int = 4,
                 head_drop_rate: float = 0.0) -> None:
        super().__init__()
        lite, *rows = block_rows(stem_channels, stem_stride, [lite_exp_size, lite_channels, lite_stride], blocks)
        self.num_features = num_features
        self.head_drop_rate = head_drop_rate
        self.tokens = nn.Embedding(token_num, token_dim, weight_attr=nn.initializer.Normal(0.0, 1.0))
        self.stem = nn.Sequential(layers.Conv2D(in_chans, stem_channels, 3, stem_stride, padding=1, bias_attr=False),
                                  layers.NormAct(stem_channels, after="relu6"))
        self.features = nn.LayerList([LiteBottleneck(lite, groups)])
        for index, row in enumerate(rows, start=2):  # the reference counts the lite bottleneck and starts above 0
            settings = {"token_dim": token_dim, "num_heads": num_heads, "token_heads": token_heads,
                        "mlp_ratio": mlp_ratio, "drop_path": drop_path_rate * index / (1 + len(rows))}
            self.features.append(
                InvertedBottleneckBlock(row, groups, dyrelu_reduction, **settings) if row.stride == 1 else
                DownsampleBlock(row, groups, dyrelu_reduction, downsample_ratio, **settings))
        channels = rows[-1].channels
        self.local_global = MobileToFormer(channels, token_dim, num_heads, drop_path_rate)
        self.classifier = Head(channels, token_dim, head_channels, num_features, groups)
        self.apply(_init_weights)
        self.reset_classifier(num_classes)

    def build_head(self, num_classes: int) -> nn.Layer:
        return nn.Sequential(nn.Dropout(self.head_drop_rate), super().build_head(num_classes))

    def forward_features(self, x: paddle.Tensor) -> paddle.Tensor:
        tokens = self.tokens.weight.unsqueeze(0).expand([x.shape[0], -1, -1])  # [B, T, D]
        x = self.features[0](self.stem(x))
        for block in self.features[1:]:
            x, tokens = block(x, tokens)
        tokens = self.local_global(x, tokens)
        return self.classifier(x, tokens[:, 0])


def _row(token_num: int, token_dim: int, stem: int, lite: Sequence[int], head: Sequence[int],
         blocks: Sequence[Sequence[int]], **others: int) -> dict[str, Any]:
    """Return arguments of table 1: tokens, stem, lite bottleneck [exp_size, channels, stride], head, blocks."""
    return {"token_num": token_num, "token_dim": token_dim, "stem_channels": stem, "lite_exp_size": lite[0],
            "lite_channels": lite[1], "lite_stride": lite[2], "head_channels": head[0], "num_features": head[1],
            "blocks": blocks, **others}


_BLOCKS_52M = [[36, 12, 1], [72, 24, 2], [72, 24, 1], [144, 48, 2], [192, 48, 1], [288, 64, 1], [384, 96, 2],
               [576, 96, 1]]
TABLE: Mapping[str, Mapping[str, Any]] = {
    "26m": _row(3, 128, 8, [24, 12, 2], [576, 1024], _BLOCKS_52M, groups=4),
    "52m": _row(3, 128, 8, [24, 12, 2], [576, 1024], _BLOCKS_52M),
    "96m": _row(4, 128, 12, [24, 12, 1], [768, 1280], [
        [72, 16, 2], [96, 32, 2], [96, 32, 1], [192, 64, 2], [256, 64, 1], [384, 88, 1], [528, 128, 2], [768, 128, 1]]),
    "151m": _row(6, 192, 12, [24, 12, 1], [768, 1280], [
        [72, 16, 2], [48, 16, 1], [96, 32, 2], [96, 32, 1], [192, 64, 2], [256, 64, 1], [384, 88, 1], [528, 88, 1],
        [528, 128, 2], [768, 128, 1], [768, 128, 1]]),
    "214m": _row(6, 192, 12, [24, 12, 1], [960, 1600], [
        [72, 20, 2], [60, 20, 1], [120, 40, 2], [160, 40, 1], [240, 80, 2], [320, 80, 1], [480, 112, 1], [672, 112, 1],
        [672, 160, 2], [960, 160, 1], [960, 160, 1]]),
    "294m": _row(6, 192, 16, [32, 16, 1], [1152, 1920], [
        [96, 24, 2], [96, 24, 1], [144, 48, 2], [192, 48, 1], [288, 96, 2], [384, 96, 1], [576, 128, 1], [768, 128, 1],
        [768, 192, 2], [1152, 192, 1], [1152, 192, 1]]),
    "508m": _row(6, 192, 24, [48, 24, 1], [1440, 1920], [
        [144, 40, 2], [120, 40, 1], [240, 72, 2], [216, 72, 1], [432, 128, 2], [512, 128, 1], [768, 176, 1],
        [1056, 176, 1], [1056, 240, 2], [1440, 240, 1], [1440, 240, 1]]),
}
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
                                     crop_pct=0.875, interpolation="bilinear", note=_NOTE,
                                     weights_url=f"https://drive.google.com/file/d/{file}/view")
     for size, paper_parameters, paper_macs, top1, file, parameters, macs in _PAPER},
    paper="Mobile-Former: Bridging MobileNet and Transformer, CVPR 2022",
    paper_url="https://arxiv.org/abs/2108.05895",
    reference="AAboys/MobileFormer@f44731062abb",
)
