"""Mobile-Former: what its two forms promise beyond what every network does."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from analysis.complexity import count
from analysis.parity import reference_name, set_state
from engine.weights import linear_weights
from errors import UserError
from models import create_model
from references import fill

PVIT = "mobileformer_26m_pvit"


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


def test_activation_of_the_lite_bottleneck() -> None:
    plain, other = (filled(PVIT, **given)(images(2, 64)).numpy() for given in ({}, {"lite_act": "relu"}))
    assert np.abs(other - plain).max() > 1e-3
