"""Each method on networks of which it is known what they see, and against InterpretDL where that holds up."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import cv2
import numpy as np
import paddle
import pytest
from explaining import IMAGENET_MEAN, IMAGENET_STD, Convolutions, FromImageNet, Linear, OnePatch, image_model, picture

from analysis.explain import attributions
from analysis.explain.faithfulness import area, measure_curves, summarise
from analysis.explain.lime import load_interpretdl
from analysis.explain.methods import METHODS, Explanation, explain, method_names
from errors import UserError
from models import create_model

IMAGENET = (f"AUGMENT.MEAN={list(IMAGENET_MEAN)}", f"AUGMENT.STD={list(IMAGENET_STD)}")
GREY = (0.5, 0.5, 0.5)  # the quick start's mean and deviation


@pytest.fixture(scope="module")
def interpretdl() -> ModuleType:
    if find_spec("interpretdl") is None:
        pytest.skip("requirements-explain.txt is not installed")
    return load_interpretdl()


def test_integrated_gradients_of_a_linear_logit_are_known() -> None:
    """The gradient of p(a·z) is p'(a·z) w, so the integral is w x (p(z) - p(0)) / z."""
    network, image = Linear(), picture()
    model = image_model(network)
    terms = network.weights.numpy().astype(np.float64) * model.normalise(image)
    z = terms.sum()
    p = 1 / (1 + np.exp(-z))
    expected = (terms * (p - 0.5) / z).sum(0)
    found = attributions.integrated_gradients(model, image, [0])[0]
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    assert abs(found.sum() - (p - 0.5)) < 1e-3 * abs(p - 0.5)


def test_smooth_grad_of_a_linear_logit_is_in_proportion_to_the_weights() -> None:
    network = Linear()
    found = attributions.smooth_grad(image_model(network), picture(), [0, 1])
    ratio = found / np.abs(network.weights.numpy()).sum(0)
    assert ratio.std() / ratio.mean() < 1e-3
    assert 0 < ratio.mean() <= 0.25  # p' is 1/4 at most


def test_occlusion_finds_the_one_patch_and_equals_interpretdl(interpretdl: ModuleType) -> None:
    model, image = image_model(OnePatch()), picture()
    found = attributions.occlusion(model, image, [0])[0]
    far = np.ones((32, 32), bool)
    far[8 - 3 : 16 + 3, 20 - 3 : 28 + 3] = False  # a window of 4 pixels that touches the patch reaches 3 beyond it
    assert np.abs(found[far]).max() < 1e-7
    assert found[10:14, 22:26].min() > 1e-3

    interpreter = interpretdl.OcclusionInterpreter(FromImageNet(OnePatch(), GREY, GREY), device="cpu")
    theirs = interpreter.interpret(image, (3, 4, 4), labels=[0], strides=(1, 2, 2), baselines=_imagenet_of_grey()[0],
                                   visual=False)[0, 0]
    times = np.bincount((np.arange(0, 29, 2)[:, None] + np.arange(4)).ravel())  # windows over each row and column
    np.testing.assert_allclose(found * np.outer(times, times), theirs, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_grad_cam_is_the_formula(channels_last: bool) -> None:
    """With global average pooling and a linear head the mean gradients are the head's weights (the CAM paper)."""
    network = Convolutions(channels_last)
    model, image = image_model(network), picture()
    found = attributions.grad_cam(model, image, [0, 2], "maps")
    with paddle.no_grad():
        maps = network.maps(network.first(paddle.to_tensor(model.normalise(image)[None])))[0].numpy()
    maps = maps.transpose(2, 0, 1) if channels_last else maps
    weights = network.scale * network.head.weight.numpy()[:, [0, 2]] / (16 * 16)
    for heat, expected in zip(found, np.maximum(np.einsum("khw,kc->chw", maps, weights), 0), strict=True):
        np.testing.assert_allclose(heat, cv2.resize(expected, (32, 32)), atol=1e-6)
        assert heat.max() > 1e-3
    assert not network.training and not network.maps._forward_post_hooks


def test_score_cam_is_that_of_interpretdl_but_for_its_sign_in_any_layout(interpretdl: ModuleType) -> None:
    image = picture()
    found, turned = (attributions.score_cam(image_model(Convolutions(last)), image, [1], "maps")[0]
                     for last in (False, True))
    np.testing.assert_allclose(found, turned, atol=1e-5)

    # InterpretDL multiplies the image as ImageNet normalises it: a config with these figures makes that ours too.
    model = image_model(Convolutions(), *IMAGENET)
    found = attributions.score_cam(model, image, [1], "maps")[0]
    theirs = interpretdl.ScoreCAMInterpreter(Convolutions(), device="cpu").interpret(
        image, "maps", labels=[1], visual=False)[0]
    assert theirs.min() < 0 < theirs.max()
    np.testing.assert_allclose(found, np.maximum(theirs, 0), atol=1e-4)


# At 32 pixels; the last blocks of most have a map of one or two positions.
LAYERS = {"iformer_small": "blocks2.2", "coatnet_0": "stages.1.blocks.2", "convmixer_256_8": "10",
          "mobileformer_26m": "features.3", "dfformer_s18": "stages.1.2", "poolformer_s12": "network.2.1"}


@pytest.mark.parametrize("name", LAYERS)
def test_cams_choose_a_layer_of_every_family(name: str) -> None:
    model = image_model(create_model(name, 10, 32), f"MODEL.NAME={name}", "MODEL.ARGS={}")
    assert attributions.default_layer(model) == LAYERS[name]
    found = attributions.grad_cam(model, picture(), range(4), LAYERS[name])
    assert found.shape == (4, 32, 32) and np.isfinite(found).all() and found.min() >= 0 and found.max() > 0


def test_layers_that_give_no_cam_are_refused() -> None:
    model = image_model(Convolutions())
    for layer, said in (("mops", "is not the name of a layer .nearest: maps"), ("head", "outputs 0 maps")):
        with pytest.raises(UserError, match=said):
            explain(model, picture(), "gradcam", layer=layer)
    assert method_names("all") == tuple(METHODS) == ("lime", "gradcam", "scorecam", "ig", "smoothgrad", "occlusion")
    with pytest.raises(UserError, match=r"'lim' is unknown.*nearest: lime"):
        method_names("lim")


def test_an_explanation_is_of_the_predicted_and_the_true_class_and_is_kept(tmp_path) -> None:
    model, image = image_model(Convolutions()), picture()
    order = model.probabilities_of(image).argsort()
    found = explain(model, image, "gradcam", label=int(order[0]), layer="maps")
    assert found.classes == (order[-1], order[0])
    with np.load(found.save(tmp_path / "one.npz")) as kept:
        np.testing.assert_allclose(kept["maps"], found.maps, atol=1e-7)
        assert kept["label"] == order[0] and kept["layer"] == "maps" and kept["image"].shape == (32, 32, 3)
    assert explain(model, image, "gradcam", label=int(order[-1]), layer="maps").classes == (order[-1],)


def test_curves_of_a_ranking_that_knows_and_of_one_that_is_wrong() -> None:
    """Sixteen equal regions, one of which is all that counts: its place in the ranking is the area under the curve."""
    model, image = image_model(OnePatch()), picture()
    rows, columns = np.divmod(np.arange(1024).reshape(32, 32), 32)
    segments = (rows // 8) * 4 + (columns + 4) // 8 % 4  # the patch is region 4·1 + 3
    heat = (segments == 7).astype(float)
    probabilities = model.probabilities_of(image)
    assert probabilities.argmax() == 0
    right, wrong = (Explanation(name, image, (0,), maps[None], probabilities)
                    for name, maps in (("lime", heat), ("ig", -heat)))
    curves = measure_curves(model, [right, wrong], segments, randoms=40, cover="colour")
    high, low = probabilities[0], 1 / (1 + np.exp(2))
    step = (high - low) / 32  # half a region's width; the curve falls linearly over it
    summary = summarise([curves, curves])
    for kind, name, expected in (("deletion", "lime", low + step), ("deletion", "ig", high - step),
                                 ("insertion", "lime", high - step), ("insertion", "ig", low + step)):
        np.testing.assert_allclose(area(curves[kind][name]), expected, atol=2e-3)
        assert summary[kind][name]["better_than_random"] == (name == "lime")
    assert abs(summary["deletion"]["random_mean"] - (high + low) / 2) < 0.15 * (high - low)


def test_a_network_that_gives_no_numbers_is_refused() -> None:
    network = Convolutions()
    network.head.bias.set_value(paddle.full([4], float("nan")))
    with pytest.raises(UserError, match="not finite"):
        explain(image_model(network), picture(), "occlusion")


def _imagenet_of_grey() -> np.ndarray:
    """Return the grey image as InterpretDL normalises it, ``[1, 1, 3, 32, 32]``."""
    grey = (np.float32(0.5) - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    return np.broadcast_to(grey[:, None, None], (1, 1, 3, 32, 32)).astype(np.float32)
