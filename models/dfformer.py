"""DFFormer, CDFFormer and GFFormer (Tatsunami and Taki, "FFT-Based Dynamic Token Mixer for Vision", AAAI 2024,
https://arxiv.org/abs/2303.03932): MetaFormers whose token mixers are filters in the frequency domain.

Names and numbers follow the authors' code, okojoalg/dfformer at 2b757c511a1b (``models/dfformer.py``), without its
AFNO ablation. Maps are channels-last, ``[B, H, W, C]``.

Filters belong to a map size. The reference takes it as ``image_size // 4``, ``// 8``, ... and fails where the strided
convolutions round otherwise; here filters have the map's own size, which is the same for multiples of 32. On another
map they are resampled in the forward pass (bicubic, ``align_corners``): for DynamicFilter as the reference does with
``weight_resize``, and for GlobalFilter as well. ``resize_weights`` resamples the filters of a checkpoint alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

import kernels
from models import layers
from models.registry import Variant, register_family
from utils import Size, pair

Activation = Callable[[], nn.Layer]
BlockNorm = partial(layers.LayerNorm, epsilon=1e-6, bias_attr=False)


class StarReLU(nn.Layer):
    """``scale · relu(x)² + bias`` with one learned number each (Yu et al., "MetaFormer Baselines for Vision")."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = self.create_parameter([1], default_initializer=layers.ones_)
        self.bias = self.create_parameter([1], default_initializer=layers.zeros_)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return kernels.star_relu(x, self.scale, self.bias)


def resize_filters(filters: paddle.Tensor, height: int, bins: int) -> paddle.Tensor:
    """Resample filters ``[H, W // 2 + 1, K, 2]`` to ``[height, bins, K, 2]`` (bicubic, align_corners)."""
    if filters.shape[:2] == [height, bins]:
        return filters
    planes = filters.flatten(2).transpose([2, 0, 1]).unsqueeze(0)  # [1, 2K, H, W // 2 + 1]
    planes = F.interpolate(planes, size=(height, bins), mode="bicubic", align_corners=True)
    return planes.squeeze(0).transpose([1, 2, 0]).reshape([height, bins, *filters.shape[2:]])


class GlobalFilter(nn.Layer):
    """One learned filter a channel between two fully connected layers, ``[B, H, W, C]`` to the same.

    Rao et al., "Global Filter Networks for Image Classification", 2021. ``complex_weights``, ``[H, W // 2 + 1, K, 2]``,
    holds real and imaginary parts of the K filters.
    """

    def __init__(self, dim: int, size: Sequence[int], act_layer: Activation, expansion_ratio: float,
                 num_filters: int | None = None) -> None:
        super().__init__()
        self.med_channels = int(expansion_ratio * dim)
        self.pwconv1 = layers.Linear(dim, self.med_channels, bias_attr=False)
        self.act1 = act_layer()
        self.complex_weights = self.create_parameter([size[0], size[1] // 2 + 1, num_filters or self.med_channels, 2],
                                                     default_initializer=nn.initializer.Normal(std=0.02))
        self.pwconv2 = layers.Linear(self.med_channels, dim, bias_attr=False)

    def scores(self, x: paddle.Tensor) -> paddle.Tensor | None:
        """Return what mixes the filters, ``[B, K, med_channels]``; None where each channel has its own."""
        return None

    def filter(self, x: paddle.Tensor, scores: paddle.Tensor | None) -> paddle.Tensor:
        """Filter ``x``, ``[B, H, W, med_channels]``, by the filters mixed by the softmax of ``scores`` over them.

        The FFT has no half precision: float32 under mixed precision.
        """
        with paddle.amp.auto_cast(enable=False):
            if x.dtype != paddle.float64:
                x = x.astype("float32")
            filters = resize_filters(self.complex_weights, x.shape[1], x.shape[2] // 2 + 1)
            real, imag = filters.flatten(0, 1).unbind(-1)  # [H · (W // 2 + 1), K]
            return kernels.filter_spectrum(x, real, imag, None if scores is None else scores.astype(x.dtype))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.pwconv2(self.filter(self.act1(self.pwconv1(x)), self.scores(x)))


class DynamicFilter(GlobalFilter):
    """Filters that a router mixes for each image and channel (figure 3); the router always has StarReLU."""

    def __init__(self, dim: int, size: Sequence[int], act_layer: Activation, num_filters: int, expansion_ratio: float,
                 reweight_expansion_ratio: float) -> None:
        super().__init__(dim, size, act_layer, expansion_ratio, num_filters)
        self.num_filters = num_filters
        self.reweight = layers.Mlp(dim, int(reweight_expansion_ratio * dim), StarReLU,
                                   out_features=num_filters * self.med_channels, bias_attr=False)

    def scores(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.reweight(kernels.mean(x.flatten(1, 2), 1)).reshape([-1, self.num_filters, self.med_channels])


class SepConv(nn.Layer):
    """A depthwise 7×7 convolution between two fully connected layers (ConvFormer's mixer), ``[B, H, W, C]``."""

    def __init__(self, dim: int, act_layer: Activation, expansion_ratio: float) -> None:
        super().__init__()
        med_channels = int(expansion_ratio * dim)
        self.pwconv1 = layers.Linear(dim, med_channels, bias_attr=False)
        self.act1 = act_layer()
        self.dwconv = layers.DepthwiseConv2D(med_channels, 7, padding=3, bias_attr=False)
        self.pwconv2 = layers.Linear(med_channels, dim, bias_attr=False)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = kernels.channels_first(self.act1(self.pwconv1(x)))
        return self.pwconv2(kernels.channels_last(self.dwconv(x)))


class Block(nn.Layer):
    """MetaFormer block, ``[B, H, W, C]`` to the same; with ``res_scale``, learned factors ``[C]`` of its shortcuts."""

    def __init__(self, dim: int, token_mixer: nn.Layer, mlp: nn.Layer, drop_path: float, res_scale: bool) -> None:
        super().__init__()
        scale = 1.0 if res_scale else None
        self.norm1 = BlockNorm(dim)
        self.token_mixer = token_mixer
        self.res_scale1 = nn.Layer()
        self.res_scale1.scale = layers.layer_scale(self, dim, scale)
        self.norm2 = BlockNorm(dim)
        self.mlp = mlp
        self.res_scale2 = nn.Layer()
        self.res_scale2.scale = layers.layer_scale(self, dim, scale)
        self.drop_path = layers.DropPath(drop_path)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.drop_path.add(x, self.token_mixer(self.norm1(x)), kept=self.res_scale1.scale)
        return self.mlp.add(x, self.norm2, self.drop_path, kept=self.res_scale2.scale)


class Downsampling(nn.Layer):
    """A strided convolution to a channels-last map: after a norm between stages, before one in the stem."""

    def __init__(self, in_chans: int, embed_dim: int, stem: bool, stride: int) -> None:
        super().__init__()
        self.stem = stem
        if stem:
            padding = 2 if stride == 4 else 3
            self.conv = layers.Conv2D(in_chans, embed_dim, 7, stride, padding)  # of [B, in_chans, H, W]
            self.post_norm = BlockNorm(embed_dim)
        else:
            self.pre_norm = BlockNorm(in_chans)
            self.conv = layers.Conv2D(in_chans, embed_dim, 3, stride, padding=1)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if self.stem:
            return self.post_norm(kernels.channels_last(self.conv(x)))
        return kernels.channels_last(self.conv(kernels.channels_first(self.pre_norm(x))))


class MlpHead(nn.Layer):
    """Classifier head: linear, squared ReLU, norm, linear; ``[B, C]`` to ``[B, num_classes]``."""

    def __init__(self, dim: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = layers.Linear(dim, 4 * dim)
        self.norm = layers.LayerNorm(4 * dim)
        self.fc2 = layers.Linear(4 * dim, num_classes)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.fc2(self.drop(self.norm(F.relu(self.fc1(x)).square())))


class DFFormer(layers.Classifier):
    """A MetaFormer (figure 3, table 1): stages on maps of 1/4, 1/8, 1/16 and 1/32 of the image.

    ``depths``, ``embed_dims`` and ``token_mixers`` have an entry for each stage. A token mixer is "dynamic_filter"
    (with ``num_filters`` filters and a router of ``reweight_expansion_ratio`` of the width), "global_filter" or
    "sep_conv"; ``expansion_ratio`` is the width of its inside. ``act_layer``, in mixers and MLPs, is "star_relu",
    "gelu" or "relu". Stages from ``res_scale_stage`` on (counted from 1) scale their skip connections. ``strides`` are
    the stem's (4, 2 or 1) and those of the convolutions before the other stages (2 or 1), by default 4, 2, 2, ...:
    smaller ones keep small images large. Takes images of any size from 3 pixels on.
    """

    smallest_image = 3
    block_pattern = r"stages\.\d\.\d+"
    map_layout = "NHWC"

    def __init__(self, num_classes: int, image_size: Size, in_chans: int, drop_path_rate: float,
                 depths: Sequence[int], embed_dims: Sequence[int], token_mixers: Sequence[str],
                 act_layer: str = "star_relu", num_filters: int = 4, expansion_ratio: float = 2.0,
                 reweight_expansion_ratio: float = 0.25, mlp_ratio: float = 4.0, res_scale_stage: int = 3,
                 head_drop_rate: float = 0.0, strides: Sequence[int] | None = None) -> None:
        super().__init__()
        strides = [4] + [2] * (len(depths) - 1) if strides is None else strides
        layers.check_strides("DFFormer", strides, [(4, 2, 1)] + [(2, 1)] * (len(depths) - 1))
        activations = {"star_relu": StarReLU, "gelu": layers.GELU, "relu": nn.ReLU}
        layers.check_choice("act_layer of DFFormer", act_layer, activations)
        act = activations[act_layer]
        mixers = {
            "dynamic_filter": lambda dim, size: DynamicFilter(dim, size, act, num_filters, expansion_ratio,
                                                              reweight_expansion_ratio),
            "global_filter": lambda dim, size: GlobalFilter(dim, size, act, expansion_ratio),
            "sep_conv": lambda dim, size: SepConv(dim, act, expansion_ratio),
        }
        self.num_features = embed_dims[-1]
        self.head_drop_rate = head_drop_rate
        self.downsample_layers, self.stages = nn.LayerList(), nn.LayerList()
        size = [side - 2 if strides[0] == 4 else side for side in pair(image_size)]  # the stem's padding is 2, of 3
        stages = layers.each_stage(depths, embed_dims=embed_dims, token_mixers=token_mixers, strides=strides,
                                   rates=layers.drop_path_rates(drop_path_rate, depths))
        for stage, (dim, mixer, stride, rates) in enumerate(stages):
            layers.check_choice("a token mixer of DFFormer", mixer, mixers)
            size = [(side - 1) // stride + 1 for side in size]
            in_dim = embed_dims[stage - 1] if stage else in_chans
            self.downsample_layers.append(Downsampling(in_dim, dim, stage == 0, stride))
            blocks = []
            for rate in rates:
                token_mixer = mixers[mixer](dim, size)
                mlp = layers.Mlp(dim, int(mlp_ratio * dim), act, bias_attr=False)
                blocks.append(Block(dim, token_mixer, mlp, rate, res_scale=stage + 1 >= res_scale_stage))
            self.stages.append(nn.Sequential(*blocks))
        self.norm = layers.LayerNorm(self.num_features, epsilon=1e-6)
        self.apply(layers.init_trunc_normal)
        self.reset_classifier(num_classes)

    def build_head(self, num_classes: int) -> nn.Layer:
        return MlpHead(self.num_features, num_classes, self.head_drop_rate)

    def forward_features(self, x: paddle.Tensor) -> paddle.Tensor:
        for stage, downsample in enumerate(self.downsample_layers):
            x = self.stages[stage](downsample(x))  # [B, H, W, C]
        return self.norm(kernels.mean(x.flatten(1, 2), 1))

    def resize_weights(self, name: str, array: np.ndarray, expected_shape: Sequence[int]) -> np.ndarray | None:
        """Resample the filters of another image size to ``expected_shape``; None for other tensors."""
        if not name.endswith("complex_weights") or array.ndim != 4 or tuple(array.shape[2:]) != (*expected_shape[2:],):
            return None
        return resize_filters(paddle.to_tensor(array), *expected_shape[:2]).numpy()


_S18 = {"depths": [3, 3, 9, 3], "embed_dims": [64, 128, 320, 512]}
_S36 = {"depths": [3, 12, 18, 3], "embed_dims": [64, 128, 320, 512]}
_M36 = {"depths": [3, 12, 18, 3], "embed_dims": [96, 192, 384, 576]}
_B36 = {"depths": [3, 12, 18, 3], "embed_dims": [128, 256, 512, 768]}
# For 32 pixels: maps of 16, 8, 8 and 4 a side.
_CIFAR = {"depths": [1, 2, 2, 1], "embed_dims": [64, 128, 192, 256], "strides": [2, 2, 1, 2]}
_DF = {"token_mixers": ["dynamic_filter"] * 4}
_CDF = {"token_mixers": ["sep_conv"] * 2 + ["dynamic_filter"] * 2}
_GF = {"token_mixers": ["global_filter"] * 4}
_ACCURACY = "the authors' repository prints no figures; the paper's abstract gives the accuracy of CDFFormer-B36 alone"
_AT_224 = {"crop_pct": 1.0, "interpolation": "bicubic"}


def _released(name: str, arguments: dict, parameters: int, macs: int, top1: float | None = None) -> Variant:
    url = f"https://github.com/okojoalg/dfformer/releases/download/weights/{name}.pth"
    return Variant(arguments, parameters, macs, top1=top1, weights_url=url, note=_ACCURACY, **_AT_224)


register_family(
    "DFFormer",
    DFFormer,
    {
        "dfformer_s18": _released("dfformer_s18", {**_S18, **_DF}, 30_324_372, 3_800_469_504),
        "dfformer_s36": _released("dfformer_s36", {**_S36, **_DF}, 45_610_656, 7_364_195_328),
        "dfformer_m36": _released("dfformer_m36", {**_M36, **_DF}, 65_316_064, 12_463_070_976),
        "dfformer_b36": _released("dfformer_b36", {**_B36, **_DF}, 114_989_344, 22_127_849_472),
        "cdfformer_s18": _released("cdfformer_s18", {**_S18, **_CDF}, 30_193_512, 3_885_057_024),
        "cdfformer_s36": _released("cdfformer_s36", {**_S36, **_CDF}, 45_230_658, 7_533_090_816),
        "cdfformer_m36": _released("cdfformer_m36", {**_M36, **_CDF}, 64_433_218, 12_716_061_696),
        "cdfformer_b36": _released("cdfformer_b36", {**_B36, **_CDF}, 113_368_642, 22_464_700_416, 85.0),
        "gfformer_s18": Variant({**_S18, **_GF}, 29_639_856, 3_789_778_944, **_AT_224, note="a fixed filter a channel"),
        "dfformer_s18_gelu": Variant({**_S18, **_DF, "act_layer": "gelu"}, 30_324_300, 3_800_469_504, **_AT_224,
                                     note="GELU in mixers and MLPs"),
        "dfformer_s18_relu": Variant({**_S18, **_DF, "act_layer": "relu"}, 30_324_300, 3_800_469_504, **_AT_224,
                                     note="ReLU in mixers and MLPs"),
        "dfformer_s18_k2": Variant({**_S18, **_DF, "num_filters": 2}, 28_526_004, 3_795_345_408, **_AT_224,
                                   note="two filters for four"),
        "dfformer_s18_d8": Variant({**_S18, **_DF, "reweight_expansion_ratio": 0.125}, 28_333_716, 3_798_478_848,
                                   **_AT_224, note="routers of half the width"),
        "dfformer_cifar": Variant({**_CIFAR, **_DF}, 4_554_092, 137_300_992, image_size=32,
                                  note="for CIFAR-10; 3,539,342 parameters with 10 classes"),
        "cdfformer_cifar": Variant({**_CIFAR, **_CDF}, 4_500_710, 140_273_664, image_size=32,
                                   note="for CIFAR-10; 3,485,960 parameters with 10 classes"),
    },
    paper="FFT-Based Dynamic Token Mixer for Vision, AAAI 2024",
    paper_url="https://arxiv.org/abs/2303.03932",
    reference="okojoalg/dfformer@2b757c511a1b",
)
