"""Mobile-Former: what its two forms promise beyond what every network does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from analysis.complexity import count
from analysis.parity import reference_name, set_state
from engine.weights.state_dict import linear_weights
from errors import UserError
from models import create_model
from models.mobileformer_pvit import greater
from references import fill

PVIT = "mobileformer_26m_pvit"
BOTH_FORMS = pytest.mark.parametrize("name", ["mobileformer_26m", PVIT])

SMALL: dict[str, Any] = {
    "stem_channels": 8, "lite_exp_size": 16, "lite_channels": 8, "blocks": [[24, 8, 1], [16, 16, 2, 5], [32, 16, 1]],
    "token_num": 2, "token_dim": 16, "head_channels": 32, "num_features": 24, "groups": 2,
}


def images(batch: int, side: int) -> paddle.Tensor:
    return paddle.to_tensor(fill.image_batch(7, batch, 3, side, side))


def filled(name: str, **arguments: Any) -> paddle.nn.Layer:
    """Return a network in evaluation mode, filled by the fixtures' rule."""
    model = create_model(name, num_classes=10, **arguments)
    linear = linear_weights(model)
    set_state(model, {reference_name(key): fill.tensor(reference_name(key), value.shape[:: -1 if key in linear else 1])
                      for key, value in model.state_dict().items()})
    model.eval()
    return model


def test_lite_stride_of_the_authors_form() -> None:
    """The numbers are the reference's, its first block's stride set to 1, on 64-pixel images."""
    model = filled("mobileformer_26m", lite_stride=1)
    model.to(dtype="float64")
    logits = model(images(2, 64).astype("float64")).numpy()
    np.testing.assert_allclose(logits[:, :4], [[0.89252386, 0.94126724, -1.30112922, -1.57284609],
                                               [1.09380101, 0.54842126, -0.32823533, -1.28475475]], rtol=0, atol=1e-8)
    assert count(model, 64).macs == 9_530_368


def test_the_52m_file_has_stride_1() -> None:
    assert count(create_model("mobileformer_52m_pvit"), 224).macs == 159_744_544
    assert count(create_model("mobileformer_52m_pvit", lite_stride=2), 224).macs == 48_245_632


@BOTH_FORMS
def test_small_architecture_trains(name: str) -> None:
    model = create_model(name, num_classes=3, stem_stride=1, lite_stride=1, **SMALL)
    assert model(images(2, 32)).shape == [2, 3]
    model(images(2, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.trainable)


def test_a_training_batch_of_one_image() -> None:
    model = create_model("mobileformer_26m", num_classes=10)
    with pytest.raises(UserError, match="training batch of 1 image, expected 2 or more"):
        model(images(1, 32))
    model.eval()
    assert np.isfinite(model(images(1, 32)).numpy()).all()
    model.train()
    model.classifier.fc[1].eval()  # a frozen norm takes any batch
    assert np.isfinite(model(images(1, 32)).numpy()).all()
    assert np.isfinite(create_model(PVIT, num_classes=10)(images(1, 64)).numpy()).all()


def test_dropouts_stand_where_their_names_say() -> None:
    model = create_model(PVIT, num_classes=10, drop_path_rate=0.4, drop_rate=0.1, attn_drop_rate=0.2,
                         mlp_drop_rate=0.3)
    rates = {f"{key.split('.', 2)[-1]}.{rate}": getattr(layer, rate) for key, layer in model.named_sublayers()
             if key.startswith("blocks.3.") for rate in ("p", "rate", "attn_drop_rate") if hasattr(layer, rate)}
    assert rates == {
        "toformer_bridge.dropout.p": 0.1, "toformer_bridge.attn_drop_rate": 0.2, "toformer_bridge.droppath.rate": 0.4,
        "former.attn.dropout.p": 0.1, "former.attn.attn_drop_rate": 0.2, "former.attn_droppath.rate": 0.4,
        "former.mlp.drop.p": 0.3, "former.mlp_droppath.rate": 0.4, "mobile.bneck.act.project.0.drop.p": 0.0,
        "tomobile_bridge.dropout.p": 0.1, "tomobile_bridge.attn_drop_rate": 0.2, "tomobile_bridge.droppath.rate": 0.4}
    assert model.head.dropout.p == 0.1


def test_options_of_the_notebooks_form() -> None:
    x = images(2, 64)
    plain = filled(PVIT)(x).numpy()
    assert np.abs(filled(PVIT, lite_act="relu")(x).numpy() - plain).max() > 1e-3
    without = create_model(PVIT, use_dyrelu=False)
    assert not [key for key in without.state_dict() if ".project." in key]
    biases = create_model(PVIT).state_dict().keys() - create_model(PVIT, qkv_bias=False).state_dict().keys()
    assert {key.rsplit(".", 3)[-3 if "heads" in key else -2] for key in biases} == {
        "heads_q_proj", "heads_k_proj", "heads_v_proj", "qkv_proj"}
    assert create_model(PVIT, num_classes=10, dyrelu_k=3)(x).shape == [2, 10]


def test_greater_is_the_maximum() -> None:
    generator = np.random.default_rng(0)
    a, b = (paddle.to_tensor(generator.standard_normal((3, 5)), stop_gradient=False) for _ in range(2))
    np.testing.assert_allclose(greater(a, b).numpy(), np.maximum(a.numpy(), b.numpy()), rtol=0, atol=1e-15)
    for ours, theirs in zip(paddle.grad(greater(a, b).sum(), [a, b]), paddle.grad(paddle.maximum(a, b).sum(), [a, b]),
                            strict=True):
        assert (ours == theirs).all()


@pytest.mark.slow
@BOTH_FORMS
def test_exported_network_takes_any_batch_and_size(name: str, tmp_path: Path) -> None:
    model = filled(name)
    paddle.jit.save(model, str(tmp_path / "net"), input_spec=[paddle.static.InputSpec([None, 3, None, None])])
    exported = paddle.jit.load(str(tmp_path / "net"))
    for batch, side in ((1, 64), (3, 33)):
        np.testing.assert_allclose(exported(images(batch, side)).numpy(), model(images(batch, side)).numpy(), atol=1e-5)
