"""Mobile-Former as PaddleViT has it, the form of the notebook (paper: https://arxiv.org/abs/2108.05895).

Names and numbers follow BR-IDL/PaddleViT at 5ac7d89d4fd0 (``image_classification/MobileFormer``), a port written
before the authors published their code (``models/mobileformer.py``). Against that: norms come before attention; each
head of a bridge projects its own slice of the tokens; dynamic ReLUs have offsets and one serves both places of a block;
a stride is a depthwise convolution before the block, which has no skip; convolutions have biases; nothing gates the
bridge to the tokens; no channel shuffles.
Maps are ``[B, C, H, W]``, tokens ``[B, T, D]``.

Where the source errs, and what is done here:

- Its head applies softmax in evaluation, and its loss again: logits always.
- It hands drop path to the token attention as dropout, and the dropout of attention weights to that attention's
  result: here ``drop_rate`` is for results and ``attn_drop_rate`` for weights everywhere.
- Its lite bottleneck defines an activation that it never applies: its weights need none; ``lite_act`` sets one.
- ``QKV_BIAS`` never reaches the blocks; padding is 1 whatever the kernel; without dynamic ReLU a block has no
  activation: here ``qkv_bias`` counts, padding is half the kernel, and ``use_dyrelu: false`` means ReLU.
- Its 52M file sets the lite bottleneck's stride to 1, which costs 160M multiply-accumulates. The variant follows
  the file; ``lite_stride: 2`` gives 48M, near the paper's 52M.
- Its drop path has the same rate in all blocks, and so it has here.

Keys of its YAML files under ``MODEL.MF`` and arguments here: ``TOKENS`` are ``token_num`` and ``token_dim``,
``NUM_HEAD`` ``num_heads``, ``POINTWISECONV_GROUPS`` ``groups``, ``STEM`` ``stem_channels`` and ``stem_stride``,
``LITE_BNECK`` ``lite_exp_size``, ``lite_channels`` and ``lite_stride``, ``BLOCK`` the rows of ``blocks``,
``CHANNEL_CONV`` ``head_channels``, ``HEAD.HIDDEN_FEATURE`` ``num_features``, ``DYRELU.REDUCE`` and its like
``dyrelu_reduction`` and its like. ``ALPHA`` scales all widths: they are written out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import NamedTuple

import paddle
import paddle.nn.functional as F
from paddle import nn

import kernels
from models import layers, mobileformer
from models.mobileformer import TABLE, BlockRow, block_rows
from models.registry import Variant, register_family
from utils import Size

Dynamic = Callable[[int], nn.Layer]  # a dynamic ReLU for a number of channels


class TokenSettings(NamedTuple):
    """Arguments that all parts with tokens share; ``drop_path`` is the rate of each branch of bridges and Formers."""

    token_dim: int
    num_heads: int
    mlp_ratio: float
    qkv_bias: bool
    drop_rate: float
    attn_drop_rate: float
    mlp_drop_rate: float
    drop_path: float


class HeadProjections(nn.LayerList):
    """Small linear layers ``0``, ``1``, ..., one for each head, on that head's slice: ``[B, T, D]`` to
    ``[B, T, channels]``."""

    def __init__(self, channels: int, settings: TokenSettings) -> None:
        heads, bias = settings.num_heads, None if settings.qkv_bias else False
        width = layers.divide("a width of Mobile-Former", channels, "num_heads", heads)
        super().__init__([layers.Linear(settings.token_dim // heads, width, bias_attr=bias) for _ in range(heads)])

    def forward(self, tokens: paddle.Tensor) -> paddle.Tensor:
        return paddle.concat([self[i](part) for i, part in enumerate(tokens.split(len(self), axis=2))], axis=2)


class MobileToFormer(nn.Layer):
    """The bridge from the map to the tokens: ``[B, C, H, W]`` and ``[B, T, D]`` to ``[B, T, D]``."""

    def __init__(self, channels: int, settings: TokenSettings) -> None:
        super().__init__()
        self.input_norm = layers.LayerNorm(settings.token_dim)
        self.heads_q_proj = HeadProjections(channels, settings)
        self.output = layers.Linear(channels, settings.token_dim)
        self.dropout = nn.Dropout(settings.drop_rate)
        self.attn_drop_rate = settings.attn_drop_rate
        self.droppath = layers.DropPath(settings.drop_path)

    def forward(self, x: paddle.Tensor, tokens: paddle.Tensor) -> paddle.Tensor:
        query = self.heads_q_proj(self.input_norm(tokens))  # [B, T, C]
        dropout = self.attn_drop_rate if self.training else 0.0
        gathered = kernels.attend_map(query, x, len(self.heads_q_proj), dropout)
        return tokens + self.droppath(self.dropout(self.output(gathered)))


class FormerToMobile(nn.Layer):
    """The bridge from the tokens to the map: ``[B, C, H, W]`` and ``[B, T, D]`` to ``[B, C, H, W]``."""

    def __init__(self, channels: int, settings: TokenSettings) -> None:
        super().__init__()
        self.input_token_norm = layers.LayerNorm(settings.token_dim)
        self.heads_k_proj = HeadProjections(channels, settings)
        self.heads_v_proj = HeadProjections(channels, settings)
        self.dropout = nn.Dropout(settings.drop_rate)
        self.attn_drop_rate = settings.attn_drop_rate
        self.droppath = layers.DropPath(settings.drop_path)

    def forward(self, x: paddle.Tensor, tokens: paddle.Tensor) -> paddle.Tensor:
        tokens = self.input_token_norm(tokens)
        key, value = self.heads_k_proj(tokens), self.heads_v_proj(tokens)  # each [B, T, C]
        dropout = self.attn_drop_rate if self.training else 0.0
        spread = kernels.attend_tokens(x, key, value, len(self.heads_k_proj), dropout)
        return x + self.droppath(self.dropout(spread))


class Attention(nn.Layer):
    """Self-attention among tokens, ``[B, T, D]`` to the same."""

    def __init__(self, settings: TokenSettings) -> None:
        super().__init__()
        dim = settings.token_dim
        self.num_heads, self.head_dim = settings.num_heads, dim // settings.num_heads
        self.qkv_proj = layers.Linear(dim, 3 * dim, bias_attr=None if settings.qkv_bias else False)
        self.output = layers.Linear(dim, dim)
        self.dropout = nn.Dropout(settings.drop_rate)
        self.attn_drop_rate = settings.attn_drop_rate

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        qkv = self.qkv_proj(x).reshape([0, 0, 3, self.num_heads, self.head_dim])
        x = kernels.self_attention(qkv, dropout=self.attn_drop_rate if self.training else 0.0).flatten(2)  # [B, T, D]
        return self.dropout(self.output(x))


class Former(nn.Layer):
    """Attention among tokens, then two fully connected layers, norms first: ``[B, T, D]`` to the same."""

    def __init__(self, settings: TokenSettings) -> None:
        super().__init__()
        dim = settings.token_dim
        self.attn_ln = layers.LayerNorm(dim)
        self.attn = Attention(settings)
        self.attn_droppath = layers.DropPath(settings.drop_path)
        self.mlp_ln = layers.LayerNorm(dim)
        self.mlp = layers.Mlp(dim, int(settings.mlp_ratio * dim), drop_rate=settings.mlp_drop_rate)
        self.mlp_droppath = layers.DropPath(settings.drop_path)

    def forward(self, tokens: paddle.Tensor) -> paddle.Tensor:
        tokens = tokens + self.attn_droppath(self.attn(self.attn_ln(tokens)))
        return tokens + self.mlp_droppath(self.mlp(self.mlp_ln(tokens)))


def greater(a: paddle.Tensor, b: paddle.Tensor) -> paddle.Tensor:
    """Return the elementwise maximum; the backward pass of Paddle's operator is several times as long on a CPU."""
    return b + F.relu(a - b)


class DynamicReLU(nn.Layer):
    """The greatest of ``k`` linear functions for each channel: ``[B, C, H, W]`` and ``[B, D]`` to the first shape.

    Dynamic ReLU B (Chen et al., ECCV 2020); slopes and offsets come from the first token ``[B, D]``.
    """

    def __init__(self, channels: int, token_dim: int, k: int, reduction: float, coefs: Sequence[float],
                 consts: Sequence[float]) -> None:
        super().__init__()
        self.k, self.channels = k, channels
        outputs = 2 * k * channels
        self.project = nn.Sequential(layers.Mlp(token_dim, int(token_dim / reduction), out_features=outputs),
                                     layers.LayerNorm(outputs))
        (slope, offset), (first, other) = coefs, consts
        self.coefs = [slope] * k + [offset] * k
        self.consts = [first] + [other] * (2 * k - 1)

    def forward(self, x: paddle.Tensor, token: paddle.Tensor) -> paddle.Tensor:
        outputs = self.project(token).reshape([-1, self.channels, 2 * self.k, 1, 1]).unbind(2)  # each [B, C, 1, 1]
        values = [out * self.coefs[i] + self.consts[i] for i, out in enumerate(outputs)]  # slopes, then offsets
        return reduce(greater, [x * values[i] + values[self.k + i] for i in range(self.k)])


class Bottleneck(nn.Layer):
    """Pointwise, depthwise, pointwise, ``[B, C, H, W]`` and ``[B, D]`` to ``[B, C', H, W]``, without a skip.

    One dynamic ReLU, steered by the first token, serves both places; without ``dynamic``, ``act`` is there.
    """

    def __init__(self, row: BlockRow, groups: int, act: str | None, dynamic: Dynamic | None = None) -> None:
        super().__init__()
        self.in_pw = pointwise(row.in_channels, row.exp_size, groups)
        self.in_pw_bn = layers.NormAct(row.exp_size, after=None if dynamic else act)
        self.dw = inner_conv(self.depthwise(row))
        self.dw_bn = layers.NormAct(row.exp_size, after=None if dynamic else act)
        self.out_pw = pointwise(row.exp_size, row.channels, groups)
        self.out_pw_bn = layers.NormAct(row.channels)
        self.act = dynamic(row.exp_size) if dynamic else None

    def depthwise(self, row: BlockRow) -> nn.Layer:
        """Return the convolution of each channel."""
        return layers.DepthwiseConv2D(row.exp_size, row.kernel_size, padding=row.kernel_size // 2)

    def forward(self, x: paddle.Tensor, token: paddle.Tensor | None = None) -> paddle.Tensor:
        for conv, norm in ((self.in_pw, self.in_pw_bn), (self.dw, self.dw_bn)):
            x = norm(conv(x))
            x = self.act(x, token) if self.act else x
        return self.out_pw_bn(self.out_pw(x))


class LiteBottleneck(Bottleneck):
    """The first block, without tokens: the depthwise convolution is a column's, then a row's, with the stride.

    ``[B, C, H, W]`` to ``[B, C', H', W']``; the source has no ``act`` here.
    """

    def depthwise(self, row: BlockRow) -> nn.Layer:
        hidden, stride, side, pad = row.exp_size, row.stride, row.kernel_size, row.kernel_size // 2
        return nn.Sequential(
            layers.DepthwiseConv2D(hidden, [side, 1], stride=[stride, 1], padding=[pad, 0]), layers.NormAct(hidden),
            layers.DepthwiseConv2D(hidden, [1, side], stride=[1, stride], padding=[0, pad]))


class Mobile(nn.Layer):
    """The map's side of a block: where the stride is 2, a strided depthwise convolution, then the bottleneck."""

    def __init__(self, row: BlockRow, groups: int, dynamic: Dynamic | None) -> None:
        super().__init__()
        self.bneck = Bottleneck(row, groups, "relu", dynamic)
        self.downsample_dw = nn.Identity()
        if row.stride == 2:
            strided = layers.DepthwiseConv2D(row.in_channels, row.kernel_size, row.stride, padding=row.kernel_size // 2)
            self.downsample_dw = nn.Sequential(inner_conv(strided), layers.NormAct(row.in_channels, after="relu"))

    def forward(self, x: paddle.Tensor, token: paddle.Tensor) -> paddle.Tensor:
        return self.bneck(self.downsample_dw(x), token)


class Block(nn.Layer):
    """Mobile-Former block (figure 3): ``[B, C, H, W]`` and ``[B, T, D]`` to ``[B, C', H', W']`` and ``[B, T, D]``."""

    def __init__(self, row: BlockRow, groups: int, settings: TokenSettings, dynamic: Dynamic | None) -> None:
        super().__init__()
        self.toformer_bridge = MobileToFormer(row.in_channels, settings)
        self.former = Former(settings)
        self.mobile = Mobile(row, groups, dynamic)
        self.tomobile_bridge = FormerToMobile(row.channels, settings)

    def forward(self, x: paddle.Tensor, tokens: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        tokens = self.former(self.toformer_bridge(x, tokens))
        return self.tomobile_bridge(self.mobile(x, tokens[:, 0]), tokens), tokens


def inner_conv(conv: nn.Layer) -> nn.Sequential:
    """Return ``conv`` below the name ``conv``, where the source's weights have it."""
    return nn.Sequential(("conv", conv))


def pointwise(in_channels: int, channels: int, groups: int) -> nn.Sequential:
    """Return a 1×1 convolution below the name ``conv``."""
    return inner_conv(mobileformer.pointwise(in_channels, channels, groups, bias_attr=None))


class MobileFormerPViT(layers.Classifier):
    """Mobile-Former in PaddleViT's form (figure 1): a stem, a lite bottleneck, blocks with tokens beside them, a head.

    ``blocks`` are the rows ``[exp_size, channels, stride]``, with the side of the depthwise kernel as fourth number
    where it is not 3. ``stem_stride`` and ``lite_stride`` are 1 or 2 (1 keeps small images large); ``lite_act`` is
    an activation's name or None. ``num_heads`` is that of bridges and of the attention among ``token_num`` tokens of
    width ``token_dim``. A dynamic ReLU has ``dyrelu_k`` functions from a hidden layer of
    ``token_dim / dyrelu_reduction`` units, whose slopes and offsets are the outputs times ``dyrelu_coefs`` plus
    ``dyrelu_consts`` (the first slope's, all others'). ``drop_rate`` is the dropout of the results of bridges and
    attention and before the last layer, ``attn_drop_rate`` that of attention weights, ``mlp_drop_rate`` that of the
    Formers' fully connected layers. Takes images of any size. Raises UserError for widths that do not divide.
    """

    block_pattern = r"blocks\.\d+"
    head_name = "head.fc2"

    def __init__(self, num_classes: int, image_size: Size, in_chans: int, drop_path_rate: float,
                 stem_channels: int, lite_exp_size: int, lite_channels: int, blocks: Sequence[Sequence[int]],
                 token_num: int, token_dim: int, head_channels: int, num_features: int, stem_stride: int = 2,
                 lite_stride: int = 2, lite_act: str | None = None, groups: int = 1, num_heads: int = 4,
                 mlp_ratio: float = 2.0, qkv_bias: bool = True, use_dyrelu: bool = True, dyrelu_k: int = 2,
                 dyrelu_reduction: float = 4.0, dyrelu_coefs: Sequence[float] = (1.0, 0.5),
                 dyrelu_consts: Sequence[float] = (1.0, 0.0), drop_rate: float = 0.0, attn_drop_rate: float = 0.0,
                 mlp_drop_rate: float = 0.0) -> None:
        super().__init__()
        layers.divide("token_dim of Mobile-Former", token_dim, "num_heads", num_heads)
        lite, *rows = block_rows(stem_channels, stem_stride, [lite_exp_size, lite_channels, lite_stride], blocks)
        settings = TokenSettings(token_dim, num_heads, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate, mlp_drop_rate,
                                 drop_path_rate)
        dynamic = partial(DynamicReLU, token_dim=token_dim, k=dyrelu_k, reduction=dyrelu_reduction,
                          coefs=dyrelu_coefs, consts=dyrelu_consts) if use_dyrelu else None
        self.num_features = num_features
        self.tokens = self.create_parameter([1, token_num, token_dim])
        self.stem = nn.Sequential(("conv", layers.Conv2D(in_chans, stem_channels, 3, stride=stem_stride, padding=1)),
                                  ("bn", layers.NormAct(stem_channels, after="hardswish")))
        self.bneck_lite = LiteBottleneck(lite, groups, lite_act)
        self.blocks = nn.LayerList([Block(row, groups, settings, dynamic) for row in rows])
        channels = rows[-1].channels
        self.end_toformer_bridge = MobileToFormer(channels, settings)
        self.channel_conv = nn.Sequential(pointwise(channels, head_channels, groups),
                                          layers.NormAct(head_channels, after="relu"))
        self.head = nn.Sequential(("fc1", layers.Linear(head_channels + token_dim, num_features)),
                                  ("act", nn.Hardswish()), ("dropout", nn.Dropout(drop_rate)))
        self.apply(layers.init_trunc_normal)  # as the source; tokens are Xavier uniform
        self.reset_classifier(num_classes)

    def forward_features(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.bneck_lite(self.stem(x))
        tokens = self.tokens.expand([x.shape[0], -1, -1])  # [B, T, D]
        for block in self.blocks:
            x, tokens = block(x, tokens)
        tokens = self.end_toformer_bridge(x, tokens)
        x = paddle.concat([kernels.mean(self.channel_conv(x).flatten(2), 2), tokens[:, 0]], axis=1)
        return self.head.dropout(self.head.act(self.head.fc1(x)))


_VARIANTS = [  # dynamic ReLU's reduction, heads, README's parameters and MACs, our counts on the source's code
    ("26m", {"num_heads": 4, "dyrelu_reduction": 6.0}, "3.227M", "26M", 3_204_324, 22_714_752, ""),
    ("52m", {"num_heads": 4, "dyrelu_reduction": 4.4, "lite_stride": 1}, "3.513M", "52M", 3_490_860, 159_744_544,
     "the source's file has the lite bottleneck's stride 1, against the paper; lite_stride 2 costs 48M MACs"),
    ("96m", {"num_heads": 4, "dyrelu_reduction": 4.0}, "4.595M", "96M", 4_564_400, 86_857_000, ""),
    ("151m", {"num_heads": 4, "dyrelu_reduction": 5.5}, "7.616M", "151M", 7_570_582, 142_807_656, ""),
    ("214m", {"num_heads": 4, "dyrelu_reduction": 4.65}, "9.416M", "214M", 9_357_167, 199_300_496, ""),
    ("294m", {"num_heads": 8, "dyrelu_reduction": 3.8}, "11.392M", "294M", 11_320_606, 274_900_288, ""),
    ("508m", {"num_heads": 8, "dyrelu_reduction": 3.25}, "14.013M", "508M", 13_916_561, 477_961_072, ""),
]
_NOTE = "the source's README repeats the MACs that the paper gives for its own, slightly larger networks"

register_family(
    "Mobile-Former (PaddleViT)",
    MobileFormerPViT,
    {f"mobileformer_{size}_pvit": Variant({**TABLE[size], **arguments}, parameters, macs, paper_parameters, paper_macs,
                                          crop_pct=0.875, interpolation="bicubic", note=note or _NOTE)
     for size, arguments, paper_parameters, paper_macs, parameters, macs, note in _VARIANTS},
    paper="Mobile-Former: Bridging MobileNet and Transformer, CVPR 2022",
    paper_url="https://arxiv.org/abs/2108.05895",
    reference="BR-IDL/PaddleViT@5ac7d89d4fd0",
)
