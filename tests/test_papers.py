"""What single papers promise beyond what every network does."""

from typing import Any

import numpy as np
import paddle
import pytest

import kernels
from analysis.complexity import count
from analysis.parity import reference_name, set_state
from engine.weights import linear_weights
from errors import UserError
from models import create_model
from models.dfformer import DynamicFilter, StarReLU, resize_filters
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


SMALL = {"depths": [1, 1], "embed_dims": [4, 8], "token_mixers": ["dynamic_filter", "global_filter"]}


@pytest.mark.parametrize("mode", kernels.MODES)
def test_half_precision_is_filtered_in_float32(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What mixed precision hands over is in half precision; on a CPU ``auto_cast`` does nothing by itself."""
    size, entered, context = 5, [], paddle.amp.auto_cast
    monkeypatch.setattr(paddle.amp, "auto_cast", lambda **given: entered.append(given) or context(**given))
    mixer = DynamicFilter(8, (size, size), StarReLU, 4, 2.0, 0.25)
    x, scores = paddle.randn([2, size, size, 16]).astype("bfloat16"), paddle.rand([2, 4, 16]).astype("bfloat16")
    x.stop_gradient = scores.stop_gradient = False
    routing = np.exp(scores.astype("float64").numpy())
    routing /= routing.sum(1, keepdims=True)
    weight = np.einsum("hwfl,bfc->bhwcl", mixer.complex_weights.numpy(), routing)
    spectrum = np.fft.rfft2(x.astype("float32").numpy(), axes=(1, 2)) * (weight[..., 0] + 1j * weight[..., 1])
    with kernels.using(mode):
        filtered = mixer.filter(x, scores)
    assert filtered.dtype == paddle.float32 and entered == [{"enable": False}]
    np.testing.assert_allclose(filtered.numpy(), np.fft.irfft2(spectrum, s=(size, size), axes=(1, 2)), atol=1e-6)
    filtered.square().sum().backward()
    assert x.grad.dtype == scores.grad.dtype == x.dtype and mixer.complex_weights.grad.dtype == paddle.float32
    assert 0 < float(mixer.complex_weights.grad.abs().sum()) < float("inf")


def test_resampling_is_bicubic_with_aligned_corners() -> None:
    filters = paddle.randn([4, 3, 5, 2])
    large = resize_filters(filters, 7, 5)
    np.testing.assert_allclose(large[::2, ::2].numpy(), filters.numpy(), rtol=0, atol=1e-6)
    # Between four equidistant points, the cubic with slope factor -0.75 weighs them by -3, 19, 19, -3 of 32.
    middle = np.tensordot([-3 / 32, 19 / 32, 19 / 32, -3 / 32], filters.numpy(), 1)
    np.testing.assert_allclose(large[3, ::2].numpy(), middle, rtol=0, atol=1e-6)
    one = paddle.randn([1, 1, 5, 2])
    np.testing.assert_allclose(resize_filters(one, 3, 2).numpy(), np.broadcast_to(one.numpy(), (3, 2, 5, 2)), atol=1e-6)


@pytest.mark.parametrize("size", [(33, 50), (48, 31), (63, 65)])
def test_filters_have_the_size_of_the_maps(size: tuple[int, int]) -> None:
    """Also where image_size // 4, the reference's rule, is not the map's size."""
    model = create_model("dfformer_s18", 3, size, **SMALL)
    x = paddle.randn([1, 3, *size])
    for downsample, stage in zip(model.downsample_layers, model.stages, strict=True):
        x = downsample(x)
        _, height, width, _ = x.shape
        assert stage[0].token_mixer.complex_weights.shape[:2] == [height, width // 2 + 1]


def test_drop_path_falls_on_both_branches() -> None:
    block = create_model("dfformer_s18", 3, 32, drop_path_rate=0.5, **SMALL).stages[1][0]
    block.train()
    x = paddle.randn([400, 4, 4, 8])
    with paddle.no_grad():
        mixed = x + 2 * block.token_mixer(block.norm1(x))
        images = block(x)
        outcomes = {"neither": x, "mixer": mixed, "mlp": x + 2 * block.mlp(block.norm2(x)),
                    "both": mixed + 2 * block.mlp(block.norm2(mixed))}
        counts = {key: int((abs(images - value).max((1, 2, 3)) < 1e-5).sum()) for key, value in outcomes.items()}
    assert sum(counts.values()) == 400
    assert all(60 < count < 140 for count in counts.values()), counts
