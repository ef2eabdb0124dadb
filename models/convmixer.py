"""ConvMixer (Trockman and Kolter, "Patches Are All You Need?", 2022, https://arxiv.org/abs/2201.09792).

Names and numbers follow the authors' code, locuslab/convmixer at 47048118e957 (``convmixer.py``): one numbered
sequence, so that weights are called ``0.weight``, ``3.0.fn.0.weight``, ... The authors' 280-character version is
the same network for odd kernels.

Released weights of ConvMixer-768/32 were trained with ReLU, although the published code has GELU; the variant has
ReLU, and ``act_layer="gelu"`` gives the published code's network.

One addition, without effect at rate 0: ``drop_path_rate`` drops the depthwise branch of a block, the only one
with a residual around it; the authors trained without.
"""

from __future__ import annotations

import paddle
from paddle import nn

from errors import UserError
from models.layers import (
    BatchNorm2D,
    Classifier,
    Conv2D,
    DepthwiseConv2D,
    DropPath,
    Sequential,
    activation,
    check_image_size,
    drop_path_rates,
    pytorch_default_,
    run_in_sequence,
)
from models.registry import Variant, register_family


class Residual(nn.Layer):
    """``fn(x) + x``, any shape; ``fn`` is dropped with probability ``drop_path`` in training."""

    def __init__(self, fn: Sequential, drop_path: float) -> None:
        super().__init__()
        self.fn = fn
        self.drop_path = DropPath(drop_path)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.fn(x, residual=x, share=self.drop_path.share(x))


def block(dim: int, kernel_size: int, act_layer: type[nn.Layer], drop_path: float) -> Sequential:
    """Return a ConvMixer block (equations 2 and 3), ``[B, dim, H, W]`` to the same.

    A depthwise convolution mixes positions, with a residual around it, then a 1×1 convolution mixes channels;
    the activation comes before each batch norm. "SAME" pads the odd row and column of an even kernel at the
    bottom and right, as PyTorch's "same" does.
    """
    padding = kernel_size // 2 if kernel_size % 2 else "SAME"
    spatial = Sequential(DepthwiseConv2D(dim, kernel_size, padding=padding), act_layer(), BatchNorm2D(dim))
    return Sequential(Residual(spatial, drop_path), Conv2D(dim, dim, 1), act_layer(), BatchNorm2D(dim))


class ConvMixer(Classifier):
    """ConvMixer-dim/depth (figure 2): patches, ``depth`` blocks at one resolution, global mean, a linear head.

    ``act_layer`` is "gelu" or "relu". The map has ``image_size // patch_size`` positions a side, pixels that fill
    no patch are left out, and a network built for one size takes any other. Raises UserError for sizes below 1
    and for images smaller than a patch.
    """

    block_pattern = r"\d+"

    def __init__(self, num_classes: int, image_size: int | tuple[int, int], in_chans: int, drop_path_rate: float,
                 dim: int, depth: int, kernel_size: int = 9, patch_size: int = 7, act_layer: str = "gelu") -> None:
        super().__init__()
        _check_architecture(image_size, dim, depth, kernel_size, patch_size)
        act = activation(act_layer)
        [rates] = drop_path_rates(drop_path_rate, [depth])
        numbered = [Conv2D(in_chans, dim, patch_size, stride=patch_size), act(), BatchNorm2D(dim),
                    *(block(dim, kernel_size, act, rate) for rate in rates)]
        for index, layer in enumerate(numbered):
            self.add_sublayer(str(index), layer)
        self.length = len(numbered)
        self.num_features = dim
        self.head_name = str(self.length + 2)  # the numbers between are the reference's pooling and flattening
        self.apply(_init_weights)
        self.reset_classifier(num_classes)

    def build_head(self, num_classes: int) -> nn.Layer:
        head = super().build_head(num_classes)
        pytorch_default_(head)
        return head

    def forward_features(self, x: paddle.Tensor) -> paddle.Tensor:
        numbered = [getattr(self, str(index)) for index in range(self.length)]
        x = run_in_sequence(numbered, x)  # [B, dim, H / patch_size, W / patch_size]
        return x.flatten(2).mean(-1)


def _check_architecture(image_size: int | tuple[int, int], dim: int, depth: int, kernel_size: int,
                        patch_size: int) -> None:
    sizes = {"dim": dim, "depth": depth, "kernel_size": kernel_size, "patch_size": patch_size}
    for key, value in sizes.items():
        if value < 1:
            raise UserError(f"{key} of ConvMixer is {value}, expected 1 or more")
    check_image_size(f"ConvMixer with patch_size {patch_size}", image_size, patch_size)


def _init_weights(layer: nn.Layer) -> None:
    if isinstance(layer, nn.Conv2D):
        pytorch_default_(layer)


def _architecture(dim: int, depth: int, kernel_size: int, patch_size: int, act_layer: str = "gelu") -> dict:
    return {"dim": dim, "depth": depth, "kernel_size": kernel_size, "patch_size": patch_size, "act_layer": act_layer}


_WEIGHTS = "https://github.com/tmp-iclr/convmixer/releases/download/v1.0/{}.pth.tar"
_AT_224 = {"crop_pct": 0.96, "interpolation": "bicubic"}

register_family(
    "ConvMixer",
    ConvMixer,
    {
        "convmixer_1536_20": Variant(_architecture(1536, 20, 9, 7), 51_625_960, 51_099_168_768, "51.6M", "", 81.37,
                                     weights_url=_WEIGHTS.format("convmixer_1536_20_ks9_p7"), **_AT_224),
        "convmixer_768_32": Variant(_architecture(768, 32, 7, 7, "relu"), 21_110_248, 20_676_851_712, "21.1M", "",
                                    80.16, weights_url=_WEIGHTS.format("convmixer_768_32_ks7_p7_relu"), **_AT_224,
                                    note="ReLU, as in the released weights"),
        "convmixer_1024_20": Variant(_architecture(1024, 20, 9, 14), 24_383_464, 5_948_547_072, "24.4M", "", 76.94,
                                     weights_url=_WEIGHTS.format("convmixer_1024_20_ks9_p14"), **_AT_224),
        "convmixer_256_8": Variant(_architecture(256, 8, 5, 2), 848_616, 148_367_360, image_size=32,
                                   note="for CIFAR-10; 594,186 parameters with 10 classes"),
    },
    paper="Patches Are All You Need?, TMLR 2023",
    paper_url="https://arxiv.org/abs/2201.09792",
    reference="locuslab/convmixer@47048118e957",
)
