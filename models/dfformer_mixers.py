"""DFFormer's token mixers and their parts; see ``models/dfformer.py`` for paper and reference. Channels-last maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import paddle
import paddle.nn.functional as F
from paddle import nn

import kernels
from models.layers import DepthwiseConv2D, Linear, Mlp, channels_first, channels_last, ones_, zeros_

Activation = Callable[[], nn.Layer]


class StarReLU(nn.Layer):
    """``scale · relu(x)² + bias`` with one learned number each (Yu et al., "MetaFormer Baselines for Vision")."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = self.create_parameter([1], default_initializer=ones_)
        self.bias = self.create_parameter([1], default_initializer=zeros_)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return kernels.star_relu(x, self.scale, self.bias)


def resize_filters(filters: paddle.Tensor, height: int, bins: int) -> paddle.Tensor:
    """Resample filters ``[H, W // 2 + 1, K, 2]`` to ``[height, bins, K, 2]`` (bicubic, align_corners)."""
    if filters.shape[:2] == [height, bins]:
        return filters
    planes = filters.flatten(2).transpose([2, 0, 1]).unsqueeze(0)
    planes = F.interpolate(planes, size=(height, bins), mode="bicubic", align_corners=True)
    return planes.squeeze(0).transpose([1, 2, 0]).reshape([height, bins, *filters.shape[2:]])


class FrequencyFilter(nn.Layer):
    """What the frequency filters share: K planes between two fully connected layers, ``[B, H, W, C]`` to the same.

    ``complex_weights``, ``[H, W // 2 + 1, K, 2]``, holds real and imaginary parts. The spectrum is computed in
    float32 under mixed precision.
    """

    def __init__(self, dim: int, med_channels: int, planes: int, size: Sequence[int], act_layer: Activation) -> None:
        super().__init__()
        self.pwconv1 = Linear(dim, med_channels, bias_attr=False)
        self.act1 = act_layer()
        self.complex_weights = self.create_parameter([size[0], size[1] // 2 + 1, planes, 2],
                                                     default_initializer=nn.initializer.Normal(std=0.02))
        self.pwconv2 = Linear(med_channels, dim, bias_attr=False)

    def filter(self, x: paddle.Tensor, scores: paddle.Tensor | None) -> paddle.Tensor:
        """Filter ``x``, ``[B, H, W, med_channels]``, by planes mixed by the softmax of ``scores`` over them.

        ``scores`` is ``[B, K, med_channels]``, or None for a plane a channel.
        """
        with paddle.amp.auto_cast(enable=False):
            if x.dtype != paddle.float64:
                x = x.astype("float32")
            filters = resize_filters(self.complex_weights, x.shape[1], x.shape[2] // 2 + 1)
            real, imag = filters.flatten(0, 1).unbind(-1)  # [H · (W // 2 + 1), K]
            return kernels.filter_spectrum(x, real, imag, None if scores is None else scores.astype(x.dtype))


class DynamicFilter(FrequencyFilter):
    """Filters that a router mixes for each image and channel (figure 3); see FrequencyFilter."""

    def __init__(self, dim: int, size: Sequence[int], act_layer: Activation, num_filters: int, expansion_ratio: float,
                 reweight_expansion_ratio: float) -> None:
        med_channels = int(expansion_ratio * dim)
        super().__init__(dim, med_channels, num_filters, size, act_layer)
        self.num_filters = num_filters
        self.med_channels = med_channels
        self.reweight = Mlp(dim, int(reweight_expansion_ratio * dim), StarReLU,
                            out_features=num_filters * med_channels, bias_attr=False)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        scores = self.reweight(x.flatten(1, 2).mean(1)).reshape([-1, self.num_filters, self.med_channels])
        return self.pwconv2(self.filter(self.act1(self.pwconv1(x)), scores))


class GlobalFilter(FrequencyFilter):
    """One learned filter a channel (Rao et al., "Global Filter Networks", 2021); see FrequencyFilter."""

    def __init__(self, dim: int, size: Sequence[int], act_layer: Activation, expansion_ratio: float) -> None:
        med_channels = int(expansion_ratio * dim)
        super().__init__(dim, med_channels, med_channels, size, act_layer)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.pwconv2(self.filter(self.act1(self.pwconv1(x)), None))


class SepConv(nn.Layer):
    """A depthwise 7×7 convolution between two fully connected layers (ConvFormer's mixer), ``[B, H, W, C]``."""

    def __init__(self, dim: int, act_layer: Activation, expansion_ratio: float) -> None:
        super().__init__()
        med_channels = int(expansion_ratio * dim)
        self.pwconv1 = Linear(dim, med_channels, bias_attr=False)
        self.act1 = act_layer()
        self.dwconv = DepthwiseConv2D(med_channels, 7, padding=3, bias_attr=False)
        self.pwconv2 = Linear(med_channels, dim, bias_attr=False)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = channels_first(self.act1(self.pwconv1(x)))
        return self.pwconv2(channels_last(self.dwconv(x)))
