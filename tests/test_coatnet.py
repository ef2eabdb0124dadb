"""What the two forms of CoAtNet promise beyond parity: relative positions, image sizes, whole architectures."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from errors import UserError
from models import create_model
from models.coatnet import relative_bias, table_rows

SMALL = {"depths": [1, 1, 2, 1], "embed_dims": [32, 32, 64, 96], "stem_dim": 16, "num_classes": 3}
both_forms = pytest.mark.parametrize("name", ["coatnet_0", "coatnet_0_simple"])


def images(height: int, width: int) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 3, height, width), dtype=np.float32))


def with_random_tables(name: str, image_size: int) -> paddle.nn.Layer:
    """Return a network whose tables of offsets are not the near nothing that they start as."""
    paddle.seed(0)
    model = create_model(name, image_size=image_size, **SMALL)
    for key, parameter in model.named_parameters():
        if key.endswith("bias_table"):
            parameter.set_value(paddle.randn(parameter.shape))
    model.eval()
    return model


def test_bias_of_a_pair_is_that_of_its_offset() -> None:
    height, width = size = (3, 4)
    table = np.random.default_rng(0).standard_normal((table_rows(size), 2))
    grid = table.reshape(5, 7, 2)
    bias = relative_bias(paddle.to_tensor(table), size, *size).numpy().reshape(2, height, width, height, width)
    for y, x, other_y, other_x in np.ndindex(height, width, height, width):
        assert (bias[:, y, x, other_y, other_x] == grid[y - other_y + 2, x - other_x + 3]).all()


@both_forms
def test_another_image_size_resamples_the_tables(name: str, size: tuple[int, int] = (40, 67)) -> None:
    """In forward and when weights are loaded alike, and where it matters."""
    model = with_random_tables(name, 64)
    other = create_model(name, image_size=size, **SMALL)
    state, resized = {}, 0
    for key, target in other.state_dict().items():
        array = model.state_dict()[key].numpy()
        if list(array.shape) != target.shape:
            array = other.resize_weights(key, array, target.shape)
            resized += 1
        state[key] = array
    assert resized == 3  # two blocks of stage 3, one of stage 4
    other.set_state_dict(state)
    other.eval()
    logits = model(images(*size)).numpy()
    np.testing.assert_allclose(other(images(*size)).numpy(), logits, rtol=0, atol=1e-5)
    assert other.resize_weights("s0.0.0.weight", np.zeros([16, 3, 3, 3], "float32"), [16, 3, 5, 5]) is None

    for key, parameter in model.named_parameters():
        if key.endswith("bias_table"):
            parameter.set_value(paddle.zeros_like(parameter))
    assert np.abs(model(images(*size)).numpy() - logits).max() > 1e-2 * logits.std()


@both_forms
def test_table_of_no_square_image_is_refused(name: str) -> None:
    model = create_model(name, image_size=64, **SMALL)
    [key, *_] = [key for key, _ in model.named_parameters() if key.endswith("bias_table")]
    heads = model.state_dict()[key].shape[1]
    with pytest.raises(UserError, match="has 45 rows, expected 49"):
        model.resize_weights(key, np.zeros([45, heads], "float32"), [49, heads])


@both_forms
def test_other_layouts_of_stages_run(name: str) -> None:
    for block_types in ("CCCC", ["C", "T", "T", "T"]):
        logits = create_model(name, image_size=32, block_types=block_types, **SMALL)(images(32, 32))
        assert logits.shape == [2, 3]


@both_forms
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": [0, 1, 1, 1]}, r"depths of CoAtNet is \[0, 1, 1, 1\], expected 1 or more"),
        ({"block_types": "CCTX"}, r"block_types of CoAtNet is CCTX, expected four of C \(convolution\), T \(Transf"),
        ({"block_types": "CCT"}, "block_types of CoAtNet is CCT, expected four"),
        ({"image_size": 0}, "image_size is 0, expected 1 or more a side for CoAtNet"),
    ],
)
def test_impossible_architectures_are_refused(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(name, **{"image_size": 32, **SMALL, **arguments})


def test_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="100 channels do not divide into heads of 32"):
        create_model("coatnet_0", image_size=32, **{**SMALL, "embed_dims": [32, 32, 100, 96]})
