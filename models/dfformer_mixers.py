"""DFFormer's token mixers and their parts; see ``models/dfformer.py`` for paper and reference. Channels-last maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from models.layers import DepthwiseConv2D, Linear, Mlp, channels_first, channels_last, ones_, zeros_

Activation = Callable[[], nn.Layer]

# On the CPU, the DFT of a map of at most so many positions is a matrix product: two to six times as fast.
MATRIX_POSITIONS = 64


class StarReLU(nn.Layer):
    """``scale · relu(x)² + bias`` with one learned number each (Yu et al., "MetaFormer Baselines for Vision")."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = self.create_parameter([1], default_initializer=ones_)
        self.bias = self.create_parameter([1], default_initializer=zeros_)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.scale * F.relu(x).square() + self.bias


@lru_cache(maxsize=64)
def dft_matrices(height: int, width: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the orthonormal DFT of real ``height`` × ``width`` maps as a matrix, and its inverse.

    With N = height · width and M = height · (width // 2 + 1), the first, ``[2M, N]``, gives the real parts of the
    M bins and then their imaginary parts; the second, ``[N, 2M]``, takes them.
    """
    bins = height * (width // 2 + 1)
    forward = np.fft.rfft2(np.eye(height * width).reshape(-1, height, width), norm="ortho").reshape(-1, bins)
    units = np.concatenate([np.eye(bins), 1j * np.eye(bins)]).reshape(2 * bins, height, -1)
    inverse = np.fft.irfft2(units, s=(height, width), norm="ortho").reshape(2 * bins, -1)
    return np.concatenate([forward.real.T, forward.imag.T]).astype(dtype), inverse.T.astype(dtype)


def filter_map(x: paddle.Tensor, real: paddle.Tensor, imag: paddle.Tensor) -> paddle.Tensor:
    """Multiply the spectrum of ``x``, ``[B, H, W, C]``, by a complex filter; returns the same shape.

    ``real`` and ``imag``, ``[B or 1, H · (W // 2 + 1), C]``, are the parts of the filter on the half spectrum.
    """
    _, height, width, channels = x.shape
    if paddle.in_dynamic_mode() and x.place.is_cpu_place() and height * width <= MATRIX_POSITIONS:
        dtype = "float64" if x.dtype == paddle.float64 else "float32"
        forward, inverse = map(paddle.to_tensor, dft_matrices(height, width, dtype))
        a, b = paddle.matmul(forward, x.flatten(1, 2)).split(2, axis=1)
        product = paddle.concat([a * real - b * imag, a * imag + b * real], axis=1)  # [B, 2M, C]
        return paddle.matmul(inverse, product).reshape([-1, height, width, channels])
    spectrum = paddle.fft.rfft2(x, axes=(1, 2), norm="ortho")
    weight = paddle.complex(real, imag).reshape([-1, height, width // 2 + 1, channels])
    return paddle.fft.irfft2(spectrum * weight, s=(height, width), axes=(1, 2), norm="ortho")


def mix_planes(real: paddle.Tensor, imag: paddle.Tensor, routing: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Mix complex planes, in parts ``[M, K]``, by weights ``[B, K, C]``; returns the mix in parts, ``[B, M, C]``."""
    return paddle.matmul(real, routing), paddle.matmul(imag, routing)


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

    def filter(self, x: paddle.Tensor, routing: paddle.Tensor | None) -> paddle.Tensor:
        """Filter ``x``, ``[B, H, W, med_channels]``, by planes mixed by ``routing``, or by a plane a channel for None.

        ``routing`` is ``[B, K, med_channels]``.
        """
        with paddle.amp.auto_cast(enable=False):
            if x.dtype != paddle.float64:
                x = x.astype("float32")
            filters = resize_filters(self.complex_weights, x.shape[1], x.shape[2] // 2 + 1)
            real, imag = filters.flatten(0, 1).unbind(-1)  # [H · (W // 2 + 1), K]
            if routing is None:
                return filter_map(x, real.unsqueeze(0), imag.unsqueeze(0))
            return filter_map(x, *mix_planes(real, imag, routing.astype(x.dtype)))


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
        routing = F.softmax(scores, axis=1)
        return self.pwconv2(self.filter(self.act1(self.pwconv1(x)), routing))


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
