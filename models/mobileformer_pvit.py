"""Mobile-Former as PaddleViT has it, the form of the notebook (paper: https://arxiv.org/abs/2108.05895).

Names and numbers follow BR-IDL/PaddleViT at 5ac7d89d4fd0 (``image_classification/MobileFormer``), a port written
before the authors published their code (``models/mobileformer.py``). Against that: norms come before attention;
each head of a bridge projects its own slice of the tokens; dynamic ReLUs have offsets and one serves both places of
a block; a stride is a depthwise convolution before the block, which has no skip; convolutions have biases; no
channel shuffles.

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

import math
from collections.abc import Sequence

import paddle
from paddle import nn

from errors import UserError
from models.layers import (
    BatchNorm2D,
    Classifier,
    Conv2D,
    Linear,
    Sequential,
    check_image_size,
    trunc_normal_,
    zeros_,
)
from models.mobileformer import (
    TABLE,
    block_rows,
    check_multiples,
    check_positive,
    check_range,
    check_stride,
    check_widths,
)
from models.mobileformer_pvit_blocks import (
    Block,
    DynamicSettings,
    LiteBottleneck,
    MobileToFormer,
    TokenSettings,
    inner_conv,
)
from models.registry import Variant, register_family


class MobileFormerPViT(Classifier):
    """Mobile-Former in PaddleViT's form (figure 1): a stem, a lite bottleneck, blocks with tokens beside them, a head.

    ``blocks`` are the rows ``[exp_size, channels, stride]``, with the side of the depthwise kernel as fourth number
    where it is not 3. ``stem_stride`` and ``lite_stride`` are 1 or 2 (1 keeps small images large); ``lite_act`` is
    an activation's name or None. ``num_heads`` is that of bridges and of the attention among ``token_num`` tokens of
    width ``token_dim``. A dynamic ReLU has ``dyrelu_k`` functions from a hidden layer of
    ``token_dim / dyrelu_reduction`` units, whose slopes and offsets are the outputs times ``dyrelu_coefs`` plus
    ``dyrelu_consts`` (the first slope's, all others'). ``drop_rate`` is the dropout of what bridges and attention
    give and before the last layer, ``attn_drop_rate`` that of attention weights, ``mlp_drop_rate`` that of the
    Formers' fully connected layers. Nothing depends on ``image_size``: images of any size go through. Raises
    UserError for widths that do not divide as they must.
    """

    block_pattern = r"blocks\.\d+"

    head_name = "head.fc2"

    def __init__(self, num_classes: int, image_size: int | tuple[int, int], in_chans: int, drop_path_rate: float,
                 stem_channels: int, lite_exp_size: int, lite_channels: int, blocks: Sequence[Sequence[int]],
                 token_num: int, token_dim: int, head_channels: int, num_features: int, stem_stride: int = 2,
                 lite_stride: int = 2, lite_act: str | None = None, groups: int = 1, num_heads: int = 4,
                 mlp_ratio: float = 2.0, qkv_bias: bool = True, use_dyrelu: bool = True, dyrelu_k: int = 2,
                 dyrelu_reduction: float = 4.0, dyrelu_coefs: Sequence[float] = (1.0, 0.5),
                 dyrelu_consts: Sequence[float] = (1.0, 0.0), drop_rate: float = 0.0, attn_drop_rate: float = 0.0,
                 mlp_drop_rate: float = 0.0) -> None:
        super().__init__()
        check_image_size("Mobile-Former", image_size, 1)
        check_positive(in_chans=in_chans, stem_channels=stem_channels, token_num=token_num, token_dim=token_dim,
                       head_channels=head_channels, num_features=num_features, groups=groups, num_heads=num_heads,
                       dyrelu_k=dyrelu_k)
        check_stride("the stem", stem_stride)
        lite, *rows = block_rows(stem_channels, [lite_exp_size, lite_channels, lite_stride], blocks)
        check_widths([lite, *rows], head_channels, groups, num_heads)
        check_multiples("groups", groups, stem_channels=stem_channels)
        check_multiples("num_heads", num_heads, token_dim=token_dim)
        check_range(1, token_dim + 1, dyrelu_reduction=dyrelu_reduction)
        check_range(1, math.inf, mlp_ratio=mlp_ratio)
        check_range(0, 1, drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, mlp_drop_rate=mlp_drop_rate)
        for name, pair in {"dyrelu_coefs": dyrelu_coefs, "dyrelu_consts": dyrelu_consts}.items():
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise UserError(f"{name} of Mobile-Former is {pair!r}, expected two numbers")
            check_range(-1e3, 1e3, **{f"{name}[{i}]": value for i, value in enumerate(pair)})
        settings = TokenSettings(token_dim, num_heads, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate, mlp_drop_rate,
                                 drop_path_rate)
        dynamic = DynamicSettings(dyrelu_k, dyrelu_reduction, dyrelu_coefs, dyrelu_consts) if use_dyrelu else None
        self.num_features = num_features
        self.tokens = self.create_parameter([1, token_num, token_dim])
        self.stem = Sequential(("conv", Conv2D(in_chans, stem_channels, 3, stride=stem_stride, padding=1)),
                               ("bn", BatchNorm2D(stem_channels)), ("act", nn.Hardswish()))
        self.bneck_lite = LiteBottleneck(lite, groups, lite_act)
        self.blocks = nn.LayerList([Block(row, groups, settings, dynamic) for row in rows])
        channels = rows[-1].channels
        self.end_toformer_bridge = MobileToFormer(channels, settings)
        self.channel_conv = Sequential(inner_conv(Conv2D(channels, head_channels, 1, groups=groups)),
                                       BatchNorm2D(head_channels), nn.ReLU())
        self.head = nn.Sequential(("fc1", Linear(head_channels + token_dim, num_features)), ("act", nn.Hardswish()),
                                  ("dropout", nn.Dropout(drop_rate)))
        self.apply(_init_weights)
        self.reset_classifier(num_classes)

    def build_head(self, num_classes: int) -> nn.Layer:
        head = super().build_head(num_classes)
        _init_weights(head)
        return head

    def forward_features(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.bneck_lite(self.stem(x))
        tokens = self.tokens.expand([x.shape[0], -1, -1])  # [B, T, D]
        for block in self.blocks:
            x, tokens = block(x, tokens)
        tokens = self.end_toformer_bridge(x, tokens)
        x = paddle.concat([self.channel_conv(x).flatten(2).mean(2), tokens[:, 0]], axis=1)
        return self.head.dropout(self.head.act(self.head.fc1(x)))


def _init_weights(layer: nn.Layer) -> None:
    """Initialise as the source: weights normal of 0.02 (cut at ±2), biases 0; tokens are Xavier uniform."""
    if isinstance(layer, (nn.Linear, nn.Conv2D)):
        trunc_normal_(layer.weight)
        if layer.bias is not None:
            zeros_(layer.bias)


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
