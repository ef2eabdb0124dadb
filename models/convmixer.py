"""ConvMixer (Trockman and Kolter, "Patches Are All You Need?", 2022, https://arxiv.org/abs/2201.09792).

Names and numbers follow the authors' code, locuslab/convmixer at 47048118e957 (``convmixer.py``): one numbered
sequence, so weights are called ``0.weight``, ``3.0.fn.0.weight``, ... The authors' 280-character version is the same
network for odd kernels. Their released weights of ConvMixer-768/32 were trained with ReLU, although the published code
has GELU: the variant has ReLU, and ``act_layer="gelu"`` gives the published code's network.

Deviation, without effect at rate 0: ``drop_path_rate`` drops the depthwise branch of a block, the only one with a
residual; the authors trained without.
"""

from __future__ import annotations

import paddle
from paddle import nn

import kernels
from models import layers
from models.registry import Variant, register_family
from utils import Size


class Block(nn.Sequential):
    """Mix positions beside a shortcut (equation 2), then channels (equation 3): ``[B, dim, H, W]`` to the same."""

    def __init__(self, dim: int, kernel_size: int, act: str, drop_path: float) -> None:
        # "SAME" pads the odd row and column of an even kernel at the bottom and right, as PyTorch's "same" does.
        depthwise = layers.DepthwiseConv2D(dim, kernel_size, padding=kernel_size // 2 if kernel_size % 2 else "SAME")
        mixer = nn.Sequential(("0", depthwise), ("2", layers.NormAct(dim, before=act)))
        super().__init__(("0", nn.Sequential(("fn", mixer))), ("1", layers.Conv2D(dim, dim, 1)),
                         ("3", layers.NormAct(dim, before=act)))
        self.drop_path = layers.DropPath(drop_path)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        residual, pointwise, last_norm, drop_path = self
        depthwise, norm = residual.fn
        plain = type(norm) is type(last_norm) is layers.NormAct and norm.before == "gelu"
        if kernels.rounds_to_bfloat16() and plain and depthwise._padding != "SAME":
            return kernels.convmixer_block(
                x, (depthwise.weight, depthwise.bias), norm.tensors, (pointwise.weight, pointwise.bias),
                last_norm.tensors, drop_path.keep_scale(x), norm.training, norm._momentum, norm._epsilon)
        x = norm(depthwise(x), residual=x, keep_scale=drop_path.keep_scale(x))
        return last_norm(pointwise(x))


class ConvMixer(layers.Classifier):
    """ConvMixer-dim/depth (figure 2): patches, ``depth`` blocks at one resolution, global mean, a linear head.

    ``act_layer`` is an activation of ``NormAct``. The map has ``image_size // patch_size`` positions a side; pixels
    that fill no patch are left out. Takes images of any size from one patch on.
    """

    block_pattern = r"\d+"
    init_head = staticmethod(layers.init_pytorch)

    def __init__(self, num_classes: int, image_size: Size, in_chans: int, drop_path_rate: float,
                 dim: int, depth: int, kernel_size: int = 9, patch_size: int = 7, act_layer: str = "gelu") -> None:
        super().__init__()
        self.smallest_image = patch_size
        # The numbers of the reference: the activation is layer 1, pooling and flattening come before the head.
        self.add_sublayer("0", layers.Conv2D(in_chans, dim, patch_size, stride=patch_size))
        self.add_sublayer("2", layers.NormAct(dim, before=act_layer))
        for index, rate in enumerate(layers.drop_path_rates(drop_path_rate, [depth])[0], start=3):
            self.add_sublayer(str(index), Block(dim, kernel_size, act_layer, rate))
        self.apply(layers.init_pytorch)
        self.num_features = dim
        self.head_name = str(3 + depth + 2)
        self.reset_classifier(num_classes)

    def forward_features(self, x: paddle.Tensor) -> paddle.Tensor:
        for layer in [layer for name, layer in self.named_children() if name != self.head_name]:
            x = layer(x)  # [B, dim, H / patch_size, W / patch_size]
        return kernels.mean(kernels.channels_last(x).flatten(1, 2), 1)


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
