"""PoolFormer: what it promises beyond what every network does."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

import kernels
from models import create_model
from models.layers import Mlp, PointwiseConv2D, channels_first, channels_last


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-14), ("float32", 1e-6)])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (6, 4)])
def test_pooling_leaves_padding_out_of_its_mean(shape: tuple[int, int], dtype: str, tolerance: float) -> None:
    x = np.random.default_rng(0).standard_normal((2, *shape, 3))
    expected = np.empty_like(x)
    for i in range(shape[0]):
        for j in range(shape[1]):
            window = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            expected[:, i, j] = window.mean((1, 2)) - x[:, i, j]
    pooled = kernels.pool_difference(paddle.to_tensor(x, dtype=dtype), 3)
    np.testing.assert_allclose(pooled.numpy(), expected, rtol=0, atol=tolerance)


def test_mlp_is_two_pointwise_convolutions() -> None:
    paddle.seed(0)
    mlp = Mlp(6, 24, layer=PointwiseConv2D)
    mlp.to(dtype="float64")
    for parameter in mlp.parameters():
        parameter.set_value(paddle.randn(parameter.shape, dtype="float64"))
    x = paddle.randn([3, 6, 2, 5], dtype="float64")
    hidden = F.gelu(F.conv2d(x, mlp.fc1.weight, mlp.fc1.bias))
    expected = F.conv2d(hidden, mlp.fc2.weight, mlp.fc2.bias)
    found = channels_first(mlp(channels_last(x)))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=0, atol=1e-12)


def test_architecture_in_arguments() -> None:
    model = create_model("poolformer_s12", 3, 32, depths=[1, 2], embed_dims=[8, 12], layer_scale_init_value=None,
                         pool_size=5)
    assert model(paddle.randn([2, 3, 32, 32])).shape == [2, 3]
    assert [name for name in model.state_dict() if "layer_scale" in name] == []
    assert len(model.network) == 3
