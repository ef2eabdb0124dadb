"""Each method on networks of which it is known what they see, against InterpretDL where that holds up; the command."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import paddle
import pytest
from paddle import nn

from analysis.explain import attributions
from analysis.explain.faithfulness import area, measure_curves, summarise
from analysis.explain.image_model import ImageModel
from analysis.explain.lime import load_interpretdl
from analysis.explain.methods import METHODS, Explanation, explain, method_names
from configs.load import load_config
from engine.model import build_model
from engine.weights import save_weights
from errors import UserError
from models import create_model
from processes import ROOT, TINY, call, command, overrides

SIDE = 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image_model(network: nn.Layer, *overrides: str) -> ImageModel:
    """Return a network with the quick start's config, whose mean colour is grey."""
    return ImageModel(load_config(ROOT / "configs" / "quickstart.yaml", [*TINY, *overrides]), network)


def picture(seed: int = 0) -> np.ndarray:
    """Return a smooth image of a few coloured patches, uint8 ``[32, 32, 3]``."""
    import cv2

    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)


class FromImageNet(nn.Layer):
    """A network behind InterpretDL's normalisation: images by ImageNet's mean and std to the logits of another's."""

    def __init__(self, network: nn.Layer, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        as_map = [paddle.to_tensor(np.float32(v).reshape(3, 1, 1)) for v in (IMAGENET_MEAN, IMAGENET_STD, mean, std)]
        self.own_mean, self.own_std, self.mean, self.std = as_map

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        return self.network((images.astype("float32") * self.own_std + self.own_mean - self.mean) / self.std)


class Linear(nn.Layer):
    """Two classes, the logit of the first linear in the pixels, that of the second 0."""

    def __init__(self, seed: int = 0, scale: float = 0.05) -> None:
        super().__init__()
        weights = scale * np.random.default_rng(seed).standard_normal((3, SIDE, SIDE))
        self.register_buffer("weights", paddle.to_tensor(weights.astype(np.float32)))

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        logit = (images * self.weights).sum([1, 2, 3])
        return paddle.stack([logit, paddle.zeros_like(logit)], axis=1)


class OnePatch(nn.Layer):
    """Two classes: the first where the patch in rows 8 to 15, columns 20 to 27 is not the mean colour."""

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        seen = images[:, :, 8:16, 20:28].abs().mean([1, 2, 3])
        return paddle.stack([4 * seen, 2 * paddle.ones_like(seen)], axis=1)


class ChannelsLast(nn.Layer):
    """Channels first to channels last."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return x.transpose([0, 2, 3, 1])


class Convolutions(nn.Layer):
    """Two convolutions, global average pooling, a linear head; ``maps`` outputs ``[B, 6, 16, 16]`` or channels last.

    ``seen`` counts images.
    """

    def __init__(self, channels_last: bool = False, classes: int = 4, scale: float = 8.0) -> None:
        super().__init__()
        paddle.seed(1)
        self.first = nn.Sequential(nn.Conv2D(3, 8, 3, padding=1), nn.ReLU())
        self.map_layout = "NHWC" if channels_last else "NCHW"
        self.maps = nn.Sequential(nn.Conv2D(8, 6, 3, stride=2, padding=1), nn.Tanh(),
                                  *([ChannelsLast()] if channels_last else []))
        self.head = nn.Linear(6, classes)
        self.scale, self.seen = scale, 0
        self.eval()

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        self.seen += len(images)
        maps = self.maps(self.first(images))
        return self.scale * self.head(maps.mean([1, 2] if self.map_layout == "NHWC" else [2, 3]))


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

    grey = (np.float32(0.5) - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)  # as InterpretDL normalises it
    grey = np.broadcast_to(grey[:, None, None], (1, 3, 32, 32))
    interpreter = interpretdl.OcclusionInterpreter(FromImageNet(OnePatch(), GREY, GREY), device="cpu")
    theirs = interpreter.interpret(image, (3, 4, 4), labels=[0], strides=(1, 2, 2), baselines=grey,
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


@pytest.fixture(scope="module")
def arguments(interpretdl: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the arguments that name a small network, its weights drawn but not trained."""
    weights = tmp_path_factory.mktemp("explain") / "tiny.pdparams"
    save_weights(weights, build_model(load_config(ROOT / "configs" / "quickstart.yaml", TINY)).state_dict())
    return ["-c", "configs/quickstart.yaml", "-w", str(weights), *overrides(*TINY)]


def test_every_method_in_one_sheet(arguments: list[str], tmp_path: Path) -> None:
    file = tmp_path / "a photograph.png"
    cv2.imwrite(str(file), np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    out = tmp_path / "out"
    command("explain", *arguments, "--method", "all", "--index", "3", "--samples", "150", "--superpixels", "12",
            "--curves", "3", "--out", out, file)
    names = {path.name for path in out.iterdir()}
    methods = ("lime", "gradcam", "scorecam", "ig", "smoothgrad", "occlusion")
    assert names == {"all.png", "all.json", "all_curves.png", *(f"{image}_{method}.npz" for method in methods
                                                                for image in ("a_photograph", "test_image_3"))}
    summary = json.loads((out / "all.json").read_text(encoding="utf-8"))
    assert [record["name"] for record in summary["images"]] == ["a photograph.png", "test image 3"]
    assert summary["images"][0]["true"] is None and summary["images"][1]["true"] == "9"
    assert summary["images"][0]["layer"] == "blocks2.0" and set(methods) < set(summary["curves"]["deletion"])
    with np.load(out / "test_image_3_lime.npz") as kept:
        assert kept["weights"].shape == (len(kept["classes"]), kept["segments"].max() + 1)
        np.testing.assert_allclose(kept["maps"][0], kept["weights"][0][kept["segments"]], rtol=1e-6)
    for method in methods:
        with np.load(out / f"test_image_3_{method}.npz") as kept:
            assert kept["maps"].shape == (len(kept["classes"]), 32, 32) and np.isfinite(kept["maps"]).all()
    sheet = cv2.imread(str(out / "all.png"))
    assert sheet.shape[1] > 7 * 150 and sheet.std() > 20


def test_invalid_arguments_are_refused(arguments: list[str]) -> None:
    for words, said in ((["--method", "grad-cam", "--index", "0"], "'grad-cam' is unknown: expected all or one of"),
                        (["--index", "360"], "--index 360: expected 0 to 359"),
                        ([], "no images: name files, or test images by --index 0 1 2 or --count 12")):
        with pytest.raises(UserError, match=said):
            command("explain", *arguments, *words)


def test_ctrl_c_ends_it_with_130_and_leaves_what_was_done(arguments: list[str], tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def explain_one(*positional: object, **options: object) -> Explanation:
        if list(tmp_path.iterdir()):
            raise KeyboardInterrupt
        return explain(*positional, **options)

    monkeypatch.setattr("analysis.explain.gallery.explain", explain_one)
    ended = call("explain", *arguments, "--method", "gradcam", "--index", "0", "1", "--out", str(tmp_path),
                 code=130)
    assert ended.stderr == "interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["test_image_0_gradcam.npz"]
