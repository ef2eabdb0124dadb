"""PoolFormer: what it promises beyond what every network does."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import kernels
from models import create_model


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


def test_architecture_in_arguments() -> None:
    model = create_model("poolformer_s12", 3, 32, depths=[1, 2], embed_dims=[8, 12], layer_scale_init_value=None,
                         pool_size=5)
    assert model(paddle.randn([2, 3, 32, 32])).shape == [2, 3]
    assert [name for name in model.state_dict() if "layer_scale" in name] == []
    assert len(model.network) == 3
