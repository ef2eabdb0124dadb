"""CoAtNet (Dai et al., "Marrying Convolution and Attention for All Data Sizes", NeurIPS 2021,
https://arxiv.org/abs/2106.04803).

``coatnet_0`` to ``coatnet_4`` are the paper's networks, with its parameter counts (25M, 42M, 75M, 168M, 275M). Its
authors published neither code nor weights: names and numbers follow ``coatnet_0_224`` to ``coatnet_4_224`` of
huggingface/pytorch-image-models 1.0.31 (``timm/models/maxxvit.py``), for which no trained weights exist either (its
``coatnet_*_rw_*`` are other networks). ``models/coatnet_simple.py`` has the widely copied, smaller form.

Deviations of the reference from the paper: an MBConv has its stride in the depthwise convolution (the paper's own
variant in table 9; equation 5 has it in the expansion), and pooling is 2×2 averaging (appendix A.1: max-pooling of
stride 2). Deviations from the reference: maps with odd sides work, the last row and column being pooled alone, and
tables of offsets are resampled for maps of another size. Our multiply-accumulates include the products of attention;
counters that do not see into timm's fused attention leave them out (4.39G for CoAtNet-0).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

import kernels
from errors import UserError
from models import layers
from models.registry import Variant, register_family
from utils import Size, pair

# Relative positions. A table for maps of ``size`` = (H, W) is [(2H-1)(2W-1), heads]: a number for each head and offset,
# row-major in (y_query - y_key + H - 1, x_query - x_key + W - 1). For another map it is resampled bilinearly, as the
# authors do to fine-tune at larger image sizes (appendix A.1).


def table_rows(size: tuple[int, int]) -> int:
    """Return the number of offsets between two positions of a map of ``size``."""
    return (2 * size[0] - 1) * (2 * size[1] - 1)


def relative_bias(table: paddle.Tensor, size: tuple[int, int], height: int, width: int) -> paddle.Tensor:
    """Return the bias of a ``height`` × ``width`` map, ``[heads, H·W, H·W]`` (query, key), of a table for ``size``."""
    if size != (height, width):
        table = resize_table(table, size, (height, width))
    index = paddle.to_tensor(_relative_index(height, width))
    return F.embedding(index, table).t().reshape([table.shape[1], height * width, height * width])


def resize_table(table: paddle.Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> paddle.Tensor:
    """Resample a table for maps of ``size`` to one for maps of ``new_size``."""
    grid = table.reshape([1, 2 * size[0] - 1, 2 * size[1] - 1, -1])
    return layers.resize_position_embedding(grid, 2 * new_size[0] - 1, 2 * new_size[1] - 1).flatten(0, 2)


@functools.lru_cache(maxsize=32)
def _relative_index(height: int, width: int) -> np.ndarray:
    """Return int64 ``[(H·W)²]``: the row of the table for each query and key.

    A numpy array, not a buffer of a layer: ``Layer.to(dtype=...)`` would cast it.
    """
    y, x = (axis.reshape(-1) for axis in np.indices((height, width)))
    dy = y[:, None] - y[None, :] + height - 1
    dx = x[:, None] - x[None, :] + width - 1
    return (dy * (2 * width - 1) + dx).reshape(-1)


# Blocks


class Attention(nn.Layer):
    """Relative attention (equation 3, pre-softmax form), ``[B, H, W, C]`` to ``[B, H, W, C']``."""

    def __init__(self, dim: int, out_dim: int, head_dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads, self.head_dim = layers.divide("a width of CoAtNet", out_dim, "head_dim", head_dim), head_dim
        self.qkv = layers.PointwiseConv2D(dim, 3 * out_dim)
        self.rel_pos = nn.Layer()
        self.rel_pos.size = size
        self.rel_pos.relative_position_bias_table = self.create_parameter([table_rows(size), self.num_heads],
                                                                          default_initializer=layers.trunc_normal_)
        self.proj = layers.PointwiseConv2D(out_dim, out_dim)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        height, width = x.shape[1:3]
        qkv = self.qkv(x).reshape([-1, height * width, self.num_heads, 3, self.head_dim])
        bias = relative_bias(self.rel_pos.relative_position_bias_table, self.rel_pos.size, height, width)
        x = kernels.self_attention(qkv, bias, axis=3)  # [B, N, heads, head_dim]
        return self.proj(x.reshape([-1, height, width, self.num_heads * self.head_dim]))


class Downsample(nn.Layer):
    """Average pooling 2×2 for stride 2, then a 1×1 convolution where the width changes: ``[B, C', ⌈H/2⌉, ⌈W/2⌉]``."""

    def __init__(self, dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.expand = layers.Conv2D(dim, out_dim, 1) if dim != out_dim else nn.Identity()

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.expand(kernels.average_pool(x, 2) if self.stride == 2 else x)


class TransformerBlock(nn.Layer):
    """Attention and feed-forward, each after a norm and beside a shortcut: ``[B, C, H, W]`` to ``[B, C', H', W']``."""

    def __init__(self, dim: int, out_dim: int, stride: int, drop_path: float, expand_ratio: float, head_dim: int,
                 size: tuple[int, int]) -> None:
        super().__init__()
        self.reshapes = stride == 2 or dim != out_dim
        self.shortcut = Downsample(dim, out_dim, stride)
        norm = layers.LayerNorm(dim, epsilon=1e-6)
        self.norm1 = nn.Sequential(("norm", norm), ("down", Downsample(dim, dim, stride))) if self.reshapes else norm
        self.attn = Attention(dim, out_dim, head_dim, size)
        self.norm2 = layers.LayerNorm(out_dim, epsilon=1e-6)
        self.mlp = layers.Mlp(out_dim, int(out_dim * expand_ratio), layer=layers.PointwiseConv2D)
        self.drop_path = layers.DropPath(drop_path)
        self.apply(init_transformer)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        branch = kernels.channels_last(x)
        if self.reshapes:  # equation 4
            norm, down = self.norm1
            branch = kernels.channels_last(down(kernels.channels_first(norm(branch))))
        else:
            branch = self.norm1(branch)
        x = kernels.channels_last(self.shortcut(x))
        x = self.drop_path.add(x, self.attn(branch))  # [B, H', W', C']
        x = self.mlp.add(x, self.norm2, self.drop_path)
        return kernels.channels_first(x)


class SqueezeExcite(nn.Layer):
    """The gate of squeeze-and-excitation (Hu et al., 2018): means of channels to their factors, ``[B, C]``."""

    def __init__(self, dim: int, squeeze_dim: int) -> None:
        super().__init__()
        self.fc1 = layers.PointwiseConv2D(dim, squeeze_dim)
        self.fc2 = layers.PointwiseConv2D(squeeze_dim, dim)

    def forward(self, means: paddle.Tensor) -> paddle.Tensor:
        return F.sigmoid(self.fc2(F.silu(self.fc1(means))))


class MBConvBlock(nn.Layer):
    """Inverted bottleneck with squeeze-and-excitation (equation 5): ``[B, C, H, W]`` to ``[B, C', H', W']``."""

    def __init__(self, dim: int, out_dim: int, stride: int, drop_path: float, expand_ratio: float,
                 se_ratio: float) -> None:
        super().__init__()
        hidden_dim = int(out_dim * expand_ratio)
        self.shortcut = Downsample(dim, out_dim, stride)
        self.pre_norm = layers.NormAct(dim)
        self.conv1_1x1 = layers.Conv2D(dim, hidden_dim, 1, bias_attr=False)
        self.norm1 = layers.NormAct(hidden_dim, after="gelu")
        self.conv2_kxk = layers.DepthwiseConv2D(hidden_dim, 3, stride=stride, padding=1, bias_attr=False)
        self.norm2 = layers.NormAct(hidden_dim, after="gelu")
        self.se = SqueezeExcite(hidden_dim, max(int(out_dim * se_ratio), 1))
        self.conv3_1x1 = layers.Conv2D(hidden_dim, out_dim, 1)
        self.drop_path = layers.DropPath(drop_path)
        self.apply(init_conv)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        branch = layers.mbconv(self.pre_norm(x), self.conv1_1x1, self.norm1, self.conv2_kxk, self.norm2, self.se,
                               self.conv3_1x1)
        return self.drop_path.add(self.shortcut(x), branch)


def init_conv(layer: nn.Layer) -> None:
    """Initialise as EfficientNet does: normal with variance 2 / fan_out; biases stay 0."""
    if isinstance(layer, nn.Conv2D):
        fan_out = layer.weight.shape[0] * math.prod(layer.weight.shape[2:]) // layer._groups
        nn.initializer.Normal(std=math.sqrt(2 / fan_out))(layer.weight)


def init_transformer(layer: nn.Layer) -> None:
    """Initialise as the vision transformer does: Xavier uniform, biases 0 or, in feed-forward layers, close to 0."""
    if isinstance(layer, nn.Conv2D):
        nn.initializer.XavierUniform()(layer.weight)
    elif isinstance(layer, layers.Mlp):
        for linear in (layer.fc1, layer.fc2):
            nn.initializer.Normal(std=1e-6)(linear.bias)


# Networks


class CoAtNetBase(layers.Classifier):
    """Base of both forms: stages behind a stem, and the tables of offsets in their attention.

    A layer that holds a table of offsets has the (height, width) of its map in ``size``.
    """

    init_head = staticmethod(layers.init_pytorch)

    def build_stages(self, block: Mapping[str, Callable[..., nn.Layer]], dim: int, image_size: Size,
                     drop_path_rate: float, depths: Sequence[int], embed_dims: Sequence[int],
                     block_types: Sequence[str], strides: Sequence[int]) -> Iterator[nn.Sequential]:
        """Yield the stages behind a stem of width ``dim``, with the first of ``strides``.

        A stage's first block changes stride and width. ``block[type](dim, out_dim, stride, drop_path, size=size)``
        builds one for maps of ``size``, (height, width).
        """
        if min(depths) < 1:
            raise UserError(f"depths of CoAtNet is {depths}, expected 1 or more for each stage")
        self.num_features = embed_dims[-1]
        stages = layers.each_stage(depths, embed_dims=embed_dims, block_types=block_types, stage_strides=strides[1:],
                                   rates=layers.drop_path_rates(drop_path_rate, depths))
        size = tuple(-(-side // strides[0]) for side in pair(image_size))
        for out_dim, kind, stride, rates in stages:
            layers.check_choice("a block type of CoAtNet", kind, ("C", "T"))
            size = tuple(-(-side // stride) for side in size)
            blocks = []
            for rate in rates:
                blocks.append(block[kind](dim, out_dim, stride, rate, size=size))
                dim, stride = out_dim, 1
            yield nn.Sequential(*blocks)

    def resize_weights(self, name: str, array: np.ndarray, expected_shape: Sequence[int]) -> np.ndarray | None:
        """Resample a table of offsets of a square image to ours; None for other tensors.

        A table does not tell its H and W: they are taken to be equal. None where they cannot be.
        """
        layer_name, _, leaf = name.rpartition(".")
        side = (math.isqrt(len(array)) + 1) // 2
        if not leaf.endswith("bias_table") or table_rows((side, side)) != len(array):
            return None
        size = dict(self.named_sublayers())[layer_name].size
        return resize_table(paddle.to_tensor(array), (side, side), size).numpy()


class CoAtNet(CoAtNetBase):
    """The paper's CoAtNet (table 3): a stem of width ``stem_dim`` and stages at 1/4 to 1/32 of the image.

    ``block_types`` gives each stage MBConv (C) or Transformer (T) blocks. ``expand_ratio`` widens inside both,
    ``se_ratio`` times a block's width is that of the squeeze. ``strides`` are the stem's and the stages' (2 or 1: ones
    keep small images large). Takes images of any size. Raises UserError for a Transformer stage whose width
    ``head_dim`` does not divide.
    """

    block_pattern = r"stages\.\d\.blocks\.\d+"
    head_name = "head.fc"

    def __init__(self, num_classes: int, image_size: Size, in_chans: int, drop_path_rate: float,
                 depths: Sequence[int], embed_dims: Sequence[int], stem_dim: int = 64,
                 block_types: Sequence[str] = "CCTT", expand_ratio: float = 4.0, se_ratio: float = 0.25,
                 head_dim: int = 32, strides: Sequence[int] = (2, 2, 2, 2, 2)) -> None:
        super().__init__()
        layers.check_strides("CoAtNet", strides, [(2, 1)] * (1 + len(depths)))
        self.stem = nn.Sequential(  # S0
            ("conv1", layers.Conv2D(in_chans, stem_dim, 3, strides[0], padding=1, bias_attr=False)),
            ("norm1", layers.NormAct(stem_dim, after="gelu")),
            ("conv2", layers.Conv2D(stem_dim, stem_dim, 3, padding=1, bias_attr=False))).apply(init_conv)
        block = {"C": lambda *common, size: MBConvBlock(*common, expand_ratio, se_ratio),
                 "T": lambda *common, size: TransformerBlock(*common, expand_ratio, head_dim, size)}
        stages = self.build_stages(block, stem_dim, image_size, drop_path_rate, depths, embed_dims, block_types,
                                   strides)
        self.stages = nn.Sequential(*(nn.Sequential(("blocks", blocks)) for blocks in stages))
        dim = self.num_features
        self.head = nn.Layer()
        self.head.norm = layers.LayerNorm(dim, epsilon=1e-6)
        self.head.pre_logits = nn.Sequential(("fc", layers.Linear(dim, dim)), ("act", nn.Tanh()))
        layers.init_pytorch(self.head.pre_logits.fc)
        self.reset_classifier(num_classes)

    def forward_features(self, x: paddle.Tensor) -> paddle.Tensor:
        x = kernels.mean(self.stages(self.stem(x)).flatten(2), -1)  # [B, C]
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
    },
    paper="CoAtNet: Marrying Convolution and Attention for All Data Sizes, NeurIPS 2021",
    paper_url="https://arxiv.org/abs/2106.04803",
    reference="huggingface/pytorch-image-models@v1.0.31",
)
