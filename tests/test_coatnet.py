"""CoAtNet: what its two forms promise beyond what every network does."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from models import create_model
from models.coatnet import relative_bias, table_rows


def test_bias_of_a_pair_is_that_of_its_offset() -> None:
    height, width = size = (3, 4)
    table = np.random.default_rng(0).standard_normal((table_rows(size), 2))
    grid = table.reshape(5, 7, 2)
    bias = relative_bias(paddle.to_tensor(table), size, *size).numpy().reshape(2, height, width, height, width)
    for y, x, other_y, other_x in np.ndindex(height, width, height, width):
        assert (bias[:, y, x, other_y, other_x] == grid[y - other_y + 2, x - other_x + 3]).all()


@pytest.mark.parametrize("block_types", ["CCCC", ["C", "T", "T", "T"]])
@pytest.mark.parametrize("name", ["coatnet_0", "coatnet_0_simple"])
def test_other_layouts_of_stages_run(name: str, block_types: str | list[str]) -> None:
    model = create_model(name, 3, 32, block_types=block_types, depths=[1, 1, 2, 1], embed_dims=[32, 32, 64, 96])
    assert model(paddle.randn([2, 3, 32, 32])).shape == [2, 3]
