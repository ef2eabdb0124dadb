"""The networks for images of 32 pixels: where their strides leave the maps."""

from __future__ import annotations

import re

import paddle
import pytest

from models import create_model

NETWORKS = ["iformer_cifar", "coatnet_cifar", "dfformer_cifar", "cdfformer_cifar"]


def sides(name: str, height: int, width: int) -> list[tuple[int, int]]:
    """Return the sides of the map behind each stage's blocks, the same ones in a row once."""
    model = create_model(name, num_classes=10, image_size=32)
    found: list[tuple[int, int]] = []

    def note(layer: paddle.nn.Layer, inputs: tuple, output: paddle.Tensor) -> None:
        channels = 1 if model.map_layout == "NCHW" else 3
        found.append(tuple(side for axis, side in enumerate(output.shape) if axis not in (0, channels)))

    for key, layer in model.named_sublayers():
        if re.fullmatch(model.block_pattern, key):
            layer.register_forward_post_hook(note)
    model.eval()
    with paddle.no_grad():
        assert model(paddle.ones([1, 3, height, width])).shape == [1, 10]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_stay_as_large_as_told(name: str) -> None:
    assert sides(name, 32, 32) == [(16, 16), (8, 8), (4, 4)]
    assert sides(name, 37, 30) == [(19, 15), (10, 8), (5, 4)]

