"""What every registered network must do, at 32 pixels; new papers are picked up automatically.

Checks that take time run on the smallest variant of each family and reference.
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
import yaml
from paddle import nn

from analysis.complexity import count
from analysis.features import describe_blocks
from configs.load import load_config
from engine import runtime
from engine.checkpoint import model_arrays
from engine.model import build_model
from engine.sync_batch_norm import convert_sync_batch_norm
from errors import UserError
from models import create_model, list_models, model_info
from models.coatnet import relative_bias, table_rows
from models.layers import DropPath, NormAct
from utils import pair


def size_of(name: str) -> int:
    return model_info(name).variant.parameters or 0


def representatives() -> list[str]:
    """Return the smallest variant of each family and reference."""
    smallest: dict[tuple[str, str], str] = {}
    for name in sorted(list_models(), key=size_of):
        info = model_info(name)
        smallest.setdefault((info.family, info.reference), name)
    return sorted(smallest.values(), key=list_models().index)


# What makes the larger of these small.
COATNET = {"depths": [1, 1, 2, 1], "embed_dims": [32, 32, 64, 96], "stem_dim": 16}
SMALLER: dict[str, dict[str, Any]] = {
    "coatnet_0": COATNET, "coatnet_0_simple": COATNET,
    "dfformer_s18": {"depths": [1, 1], "embed_dims": [4, 8], "token_mixers": ["dynamic_filter", "global_filter"]},
    "poolformer_s12": {"depths": [1, 2, 1, 1], "embed_dims": [16, 24, 32, 48]},
}
MOBILEFORMER: dict[str, Any] = {
    "stem_channels": 8, "lite_exp_size": 16, "lite_channels": 8, "blocks": [[24, 8, 1], [16, 16, 2, 5], [32, 16, 1]],
    "token_num": 2, "token_dim": 16, "head_channels": 32, "num_features": 24, "groups": 2,
}
COMMON = ("num_classes", "image_size", "in_chans", "drop_path_rate")


def small(name: str, num_classes: int, image_size: int | tuple[int, int], **arguments: object) -> nn.Layer:
    return create_model(name, num_classes, image_size, **{**SMALLER.get(name, {}), **arguments})


def arguments_of(name: str) -> list[str]:
    return [key for key in inspect.signature(model_info(name).build).parameters if key not in COMMON]


def images(batch: int, height: int, width: int | None = None, channels: int = 3) -> paddle.Tensor:
    shape = (batch, channels, height, width or height)
    return paddle.to_tensor(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))


def train_step(model: nn.Layer, x: paddle.Tensor) -> paddle.Tensor:
    """Return the logits in training mode, after the backward pass of their cross entropy."""
    model.train()
    logits = model(x)
    F.cross_entropy(logits, paddle.arange(len(x)) % logits.shape[1]).backward()
    return logits


def evaluate(model: nn.Layer, x: paddle.Tensor) -> np.ndarray:
    model.eval()
    with paddle.no_grad():
        return model(x).numpy()


def trainable(model: nn.Layer) -> dict[str, paddle.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.trainable}


REPRESENTATIVES = representatives()
PVIT = "mobileformer_26m_pvit"
BOTH_FORMS = ("mobileformer_26m", PVIT)
each_family = pytest.mark.parametrize("name", REPRESENTATIVES)
every_network = pytest.mark.parametrize(
    "name", [name if name in REPRESENTATIVES else pytest.param(name, marks=pytest.mark.slow) for name in list_models()]
)


def test_registry_knows_paper_reference_and_parameters() -> None:
    for name in list_models():
        info = model_info(name)
        assert info.paper_url.startswith("https://") and "@" in info.reference and size_of(name) > 0, name


@every_network
def test_trains_evaluates_and_changes_its_head(name: str) -> None:
    """At 64 pixels no map is so small that attention over it, or a norm, has nothing to choose from."""
    paddle.seed(0)
    side = 64 if name in REPRESENTATIVES else 32
    model = small(name, num_classes=42, image_size=side)
    x = images(4, side)
    logits = train_step(model, x)
    assert logits.shape == [4, 42] and np.isfinite(logits.numpy()).all()
    for key, parameter in trainable(model).items():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), key
        without_effect = name.startswith("poolformer") and key.endswith("norm1.bias")  # the token mixer takes it away
        assert side == 32 or without_effect or float(parameter.grad.abs().max()) > 0, key

    x = images(2, side)
    logits = evaluate(model, x)
    assert logits.shape == (2, 42) and np.isfinite(logits).all()
    assert (evaluate(model, x) == logits).all()
    model.reset_classifier(7)
    assert evaluate(model, x).shape == (2, 7)
    model.reset_classifier(0)
    features = evaluate(model, x)
    assert features.shape == (2, model.num_features)
    with paddle.no_grad():
        assert (model.forward_features(x).numpy() == features).all()


@every_network
def test_counts_are_those_of_the_registry(name: str) -> None:
    variant = model_info(name).variant
    complexity = count(create_model(name), variant.image_size)
    assert complexity.parameters == variant.parameters
    assert variant.macs is None or complexity.macs == variant.macs


@each_family
def test_built_without_a_head_and_for_other_channels(name: str) -> None:
    model = small(name, num_classes=0, image_size=32, in_chans=1)
    x = images(2, 32, channels=1)
    assert evaluate(model, x).shape == (2, model.num_features)
    model.reset_classifier(5)
    assert evaluate(model, x).shape == (2, 5)


@each_family
def test_state_round_trip(name: str, tmp_path: Path) -> None:
    model = small(name, num_classes=10, image_size=32)
    train_step(model, images(4, 32))  # running statistics that are not the initial ones
    paddle.save(model.state_dict(), str(tmp_path / "model.pdparams"))
    fresh = small(name, num_classes=10, image_size=32)
    missing, unexpected = fresh.set_state_dict(paddle.load(str(tmp_path / "model.pdparams")))
    assert (missing, unexpected) == ([], [])
    assert (evaluate(fresh, images(2, 32)) == evaluate(model, images(2, 32))).all()


@pytest.mark.parametrize(("name", "expected"), [
    ("iformer_cifar", np.linspace(0, 0.9, 6)), ("dfformer_cifar", np.linspace(0, 0.9, 6)),
    ("coatnet_cifar", np.linspace(0, 0.9, 7)), ("coatnet_0_simple", np.linspace(0, 0.9, 5)),
    ("convmixer_256_8", np.linspace(0, 0.9, 8)), ("poolformer_s12", np.linspace(0, 0.9, 5)),
    ("mobileformer_26m", np.linspace(0.2, 0.9, 8)), ("mobileformer_26m_pvit", [0.9])])
def test_drop_path_rates_of_the_blocks(name: str, expected: np.ndarray) -> None:
    model = small(name, 3, 32, drop_path_rate=0.9)
    rates = {round(layer.rate, 6) for layer in model.sublayers() if isinstance(layer, DropPath)}
    assert sorted(rates) == pytest.approx(list(expected), abs=1e-6)


@each_family
def test_each_dropout_drops_in_training_alone(name: str) -> None:
    x = images(4, 32)
    for rate in ("none", "drop_path_rate", *(key for key in arguments_of(name) if key.endswith("drop_rate"))):
        model = small(name, 10, 32, **({} if rate == "none" else {rate: 0.5}))
        assert (model(x) != model(x)).any() == (rate != "none"), rate
        assert (evaluate(model, x) == evaluate(model, x)).all()


def runs_or_refuses(build: Callable[[], nn.Layer], size: tuple[int, int]) -> None:
    try:
        logits = evaluate(build(), images(2, *size))
    except UserError as refusal:
        assert any(str(side) in str(refusal) for side in size) or "use larger images" in str(refusal)
    else:
        assert logits.shape == (2, 3)
        assert np.isfinite(logits).all()


@each_family
def test_other_image_sizes_run_or_are_refused(name: str) -> None:
    """Built for the size, and built for another."""
    model = small(name, num_classes=3, image_size=32)
    for size in [(36, 52), (31, 45), (8, 8)]:
        runs_or_refuses(lambda: model, size)
        runs_or_refuses(lambda size=size: small(name, num_classes=3, image_size=size), size)


@each_family
def test_whole_architecture_in_yaml(name: str, tmp_path: Path) -> None:
    """Every argument written out, below a name whose own are others."""
    info = model_info(name)
    defaults = {key: inspect.signature(info.build).parameters[key].default for key in arguments_of(name)}
    whole = {key: list(value) if isinstance(value, tuple) else value
             for key, value in {**defaults, **info.variant.arguments, **SMALLER.get(name, {})}.items()}
    other = [key for key in list_models() if model_info(key).build is info.build][-1]
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump({
        "MODEL": {"NAME": other, "NUM_CLASSES": 3, "ARGS": whole}, "DATA": {"IMAGE_SIZE": 32}, "RUNTIME": {"SEED": 5}}))
    written = build_model(load_config(tmp_path / "whole.yaml"))
    runtime.seed_everything(5)
    np.testing.assert_equal(model_arrays(written), model_arrays(small(name, 3, 32)))


@each_family
def test_unknown_names_and_arguments_are_refused(name: str) -> None:
    argument = arguments_of(name)[0]
    with pytest.raises(UserError, match=rf"no argument '{argument}z' \(nearest: .*\b{argument}\b"):
        create_model(name, **{f"{argument}z": 1})
    with pytest.raises(UserError, match="num_classes is -1"):
        create_model(name, num_classes=-1)
    with pytest.raises(UserError, match="drop_path_rate"):
        small(name, num_classes=10, image_size=32, drop_path_rate=1.5)
    with pytest.raises(UserError, match=rf"unknown model '{name}x' \(nearest: .*\b{name}\b"):
        create_model(f"{name}x")


@pytest.mark.parametrize(("name", "arguments"), [
    *[(name, {"block_types": types}) for name in ("coatnet_0", "coatnet_0_simple")
      for types in ("CCCC", ["C", "T", "T", "T"])],
    ("iformer_cifar", {"image_size": (18, 14)}),  # maps of 9 and 7 do not divide into the 2 × 2 windows of its mixer
    ("poolformer_s12", {"depths": [1, 2], "embed_dims": [8, 12], "pool_size": 5}),
    *[(name, {**MOBILEFORMER, "stem_stride": 1, "lite_stride": 1}) for name in BOTH_FORMS], (PVIT, {"dyrelu_k": 3}),
])
def test_other_architectures_train(name: str, arguments: dict[str, Any]) -> None:
    model = small(name, **{"num_classes": 3, "image_size": 32, **arguments})
    logits = train_step(model, images(2, *pair(arguments.get("image_size", 32))))
    assert logits.shape == [2, 3] and np.isfinite(logits.numpy()).all()
    assert all(parameter.grad is not None for parameter in trainable(model).values())


@pytest.mark.parametrize(("name", "arguments", "pattern"), [
    ("poolformer_s12", {"layer_scale_init_value": None}, "layer_scale"), (PVIT, {"use_dyrelu": False}, r"\.project\."),
    (PVIT, {"qkv_bias": False}, r"(heads_[qkv]|qkv)_proj.*\.bias$")])
def test_parts_that_are_left_out_have_no_parameters(name: str, arguments: dict[str, Any], pattern: str) -> None:
    whole, rest = (set(small(name, 3, 32, **given).state_dict()) for given in ({}, arguments))
    assert rest == {key for key in whole if not re.search(pattern, key)} < whole


IFORMER, DFFORMER = "iformer_cifar", "dfformer_s18"
MISTAKES = [
    (IFORMER, {"pos_embed_stages": [1, 9]}, "pos_embed_stages of iFormer is [1, 9], expected stages from 1 to 4"),
    (IFORMER, {"attention_heads": [1, 2]}, "has 2 numbers, expected one for each of the 6 blocks"),
    (IFORMER, {"attention_heads": [1, 2, 2, 4, 4, 8]}, "an entry of attention_heads is 8, expected one of 1, 2, 3, 4"),
    (IFORMER, {"num_heads": [3, 4, 6, 8]}, "the width of iFormer's high-frequency mixer is 43, expected a multiple of"),
    (IFORMER, {"strides": [2, 1, 1]}, "strides of iFormer is [2, 1, 1], expected [4 or 2 or 1, "),
    (IFORMER, {"strides": [2, 1, 0, 1]}, "strides of iFormer is [2, 1, 0, 1], expected [4 or 2 or 1, "),
    (IFORMER, {"mlp_ratio": 0.0}, "iformer_cifar with {'mlp_ratio': 0.0} has blocks1.0.mlp.fc1.weight of shape"),
    ("iformer_small_p2", {"image_size": (32, 16)}, "image_size is (32, 16), expected 32 or more a side"),
    (DFFORMER, {"reweight_expansion_ratio": 0.001}, "token_mixer.reweight.fc1.weight of shape [4, 0], expected no 0"),
    (DFFORMER, {"token_mixers": ["sep_conv", "dynamic_filters"]},
     "a token mixer of DFFormer is 'dynamic_filters', expected one of dynamic_filter, global_filter"),
    (DFFORMER, {"act_layer": "starrelu"},
     "act_layer of DFFormer is 'starrelu', expected one of star_relu, gelu, relu (nearest: star_relu"),
    (DFFORMER, {"strides": [4, 3]}, "strides of DFFormer is [4, 3], expected [4 or 2 or 1, 2 or 1]"),
    *[(name, *rest) for name in ("coatnet_0", "coatnet_0_simple") for rest in (
        ({"depths": [0, 1, 1, 1]}, "depths of CoAtNet is [0, 1, 1, 1], expected 1 or more for each stage"),
        ({"block_types": "CCTX"}, "a block type of CoAtNet is 'X', expected one of C, T"),
        ({"block_types": "CCT"}, "block_types is ['C', 'C', 'T'], expected 4 entries, as depths is [1, 1, 2, 1]"),
        ({"image_size": 0}, f"image_size is 0, expected 1 or more a side for {name}"))],
    ("coatnet_0", {"strides": [2, 2, 2, 3, 2]}, "strides of CoAtNet is [2, 2, 2, 3, 2], expected [2 or 1, "),
    ("coatnet_0", {"embed_dims": [32, 32, 100, 96]}, "a width of CoAtNet is 100, expected a multiple of head_dim, 32"),
    ("coatnet_0_simple", {"stem_depth": 0}, "stem_depth of CoAtNet is 0, expected 1 or more"),
    ("convmixer_256_8", {"act_layer": "rellu"}, "an activation is 'rellu', expected one of None, gelu, relu, relu6"),
    ("convmixer_256_8", {"patch_size": 40}, "image_size is 32, expected 40 or more a side for convmixer_256_8"),
    ("poolformer_s12", {"pool_size": 4}, "pool_size of PoolFormer is 4, expected an odd number"),
    ("poolformer_s12", {"image_size": 2}, "image_size is 2, expected 3 or more a side for poolformer_s12"),
    *[(name, *rest) for name in BOTH_FORMS for rest in (
        ({"blocks": [[36, 12, 3]]}, "a row of Mobile-Former is [36, 12, 3], expected [exp_size, channels, stride]"),
        ({"blocks": [[36, 12, 1, 4]]}, "a row of Mobile-Former is [36, 12, 1, 4], expected"),
        ({"lite_stride": 4}, "a row of Mobile-Former is [24, 12, 4], expected"),
        ({"stem_stride": 0}, "stem_stride of Mobile-Former is 0, expected one of 1, 2"),
        ({"blocks": [[38, 12, 1]]}, "a width of Mobile-Former is 38, expected a multiple of groups, 4"),
        ({"head_channels": 578}, "a width of Mobile-Former is 578, expected a multiple of groups, 4"),
        ({"groups": 1, "lite_channels": 9}, "a width of Mobile-Former is 9, expected a multiple of num_heads"),
        ({"token_dim": 126}, "token_dim of Mobile-Former is 126, expected a multiple of"),
        ({"image_size": (32, -1)}, "image_size is (32, -1), expected 1 or more a side for mobileformer_26m"))],
    (BOTH_FORMS[0], {"blocks": [[80, 12, 2]]}, "exp_size of Mobile-Former is 80, expected a multiple of the width"),
    (PVIT, {"lite_act": "rleu"}, "an activation is 'rleu', expected one of None, gelu, relu, relu6"),
]


@pytest.mark.parametrize(("name", "wrong", "message"), MISTAKES)
def test_impossible_architectures_are_refused(name: str, wrong: dict[str, Any], message: str) -> None:
    """Also those whose arguments would be ignored, or fail in the first forward pass."""
    with pytest.raises(UserError, match=re.escape(message)):
        small(name, **{"num_classes": 3, "image_size": 32, **wrong})


@pytest.mark.parametrize("name", ["paddle/resnet18", "paddle/mobilenet_v3_small"])
def test_baselines_of_paddle(name: str) -> None:
    model = create_model(name, num_classes=42, image_size=32)
    logits = train_step(model, images(4, 32))
    assert logits.shape == [4, 42]
    assert all(parameter.grad is not None for parameter in trainable(model).values())
    assert evaluate(model, images(4, 32)).shape == (4, 42)
    with pytest.raises(UserError, match=re.escape("drop_path_rate=0.1")):
        create_model(name, drop_path_rate=0.1)
    with pytest.raises(UserError, match=f"unknown model '{name}x' .*nearest: .*{name}"):
        create_model(f"{name}x")


@pytest.mark.parametrize("size", [2, 4])
def test_even_kernels_of_convmixer_pad_one_more_at_the_end(size: int) -> None:
    model = create_model("convmixer_256_8", 3, 20, dim=8, depth=1, kernel_size=size, patch_size=3)
    convolution, x = getattr(model, "3")[0].fn[0], images(2, 5, 7, channels=8)
    padded = F.pad(x, [(size - 1) // 2, size // 2] * 2)
    expected = F.conv2d(padded, convolution.weight, convolution.bias, groups=8)
    np.testing.assert_allclose(convolution(x).numpy(), expected.numpy(), rtol=0, atol=1e-6)


def test_bias_of_a_pair_in_coatnet_is_that_of_its_offset() -> None:
    height, width = size = (3, 4)
    table = np.random.default_rng(0).standard_normal((table_rows(size), 2))
    grid = table.reshape(5, 7, 2)
    bias = relative_bias(paddle.to_tensor(table), size, *size).numpy().reshape(2, height, width, height, width)
    for y, x, other_y, other_x in np.ndindex(height, width, height, width):
        assert (bias[:, y, x, other_y, other_x] == grid[y - other_y + 2, x - other_x + 3]).all()


@pytest.mark.parametrize("name", ["iformer_cifar", "coatnet_cifar", "dfformer_cifar", "cdfformer_cifar"])
def test_maps_of_the_networks_for_small_images(name: str) -> None:
    model = create_model(name, num_classes=10, image_size=32)
    for size, sides in ((32, [(16, 16), (8, 8), (4, 4)]), ((37, 30), [(19, 15), (10, 8), (5, 4)])):
        rows = describe_blocks(model, size)
        assert list(dict.fromkeys((row["height"], row["width"]) for row in rows)) == sides


@pytest.mark.parametrize(("name", "size", "tables", "tolerance"), [
    ("iformer_cifar", 64, 4, 1e-6), ("dfformer_s18", (48, 64), 2, 1e-6), ("coatnet_0", (40, 67), 3, 1e-5),
    ("coatnet_0_simple", (40, 67), 3, 1e-5)])
def test_tables_and_filters_of_another_image_size(name: str, size: Any, tables: int, tolerance: float) -> None:
    """They are resampled in the forward pass as when weights are loaded, and what they hold matters."""
    paddle.seed(0)
    model, other = small(name, 3, 32), small(name, 3, size)
    x = images(2, *pair(size))
    of_a_size = {key: value for key, value in model.named_parameters() if re.search("_table|pos_embed|complex", key)}
    assert len(of_a_size) == tables
    for value in of_a_size.values():  # which start close to 0
        value.set_value(paddle.randn(value.shape))
    state = {}
    for key, target in other.state_dict().items():
        array = model.state_dict()[key].numpy()
        resized = other.resize_weights(key, array, target.shape)
        assert (resized is None) == (key not in of_a_size)
        state[key] = array if resized is None else resized
    other.set_state_dict(state)
    logits = evaluate(model, x)
    np.testing.assert_allclose(evaluate(other, x), logits, rtol=0, atol=tolerance)
    for value in of_a_size.values():
        value.set_value(paddle.zeros_like(value))
    assert np.abs(evaluate(model, x) - logits).max() > 1e-2 * logits.std()


@pytest.mark.parametrize(("name", "key", "shape", "expected"), [
    ("dfformer_s18", "complex_weights", (8, 5, 4, 2), (8, 5, 2, 2)), ("coatnet_0", "bias_table", (45, 2), (49, 2)),
    ("coatnet_0_simple", "bias_table", (45, 8), (49, 8))])
def test_tables_of_another_kind_are_not_resampled(name: str, key: str, shape: tuple, expected: tuple) -> None:
    """Filters of another number; a table that is of no square image."""
    model = small(name, 3, 64)
    [key, *_] = [own for own, _ in model.named_parameters() if own.endswith(key)]
    assert model.resize_weights(key, np.zeros(shape, "float32"), expected) is None


@pytest.mark.parametrize("synchronised", [False, True])
@pytest.mark.parametrize("activations", [{}, {"before": "gelu"}, {"after": "relu6"}, {"after": "hardswish"}])
def test_norm_act_is_norm_activation_and_residual(activations: dict, synchronised: bool,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paddle.distributed, "all_reduce", lambda tensor: None)
    paddle.seed(0)
    model, paddles = nn.Sequential(NormAct(6, **activations)), nn.BatchNorm2D(6)
    if synchronised:
        convert_sync_batch_norm(model)
        assert type(model[0]) is not NormAct
    assert set(model[0].state_dict()) == set(paddles.state_dict())
    x, residual = paddle.randn([4, 6, 5, 7]), paddle.randn([4, 6, 5, 7])
    keep_scale = paddle.to_tensor([0.0, 1.0, 2.0, 3.0]).reshape([4, 1, 1, 1])
    before, after = (getattr(F, activations.get(name, ""), lambda x: x) for name in ("before", "after"))
    for training in (True, False):
        model.training = model[0].training = paddles.training = training
        expected = after(paddles(before(x))) * keep_scale + residual
        np.testing.assert_allclose(model[0](x, residual, keep_scale).numpy(), expected.numpy(), rtol=0, atol=5e-5)
        np.testing.assert_allclose(model[0]._variance.numpy(), paddles._variance.numpy(), rtol=1e-5)


def test_norm_act_residual_gradient_is_its_own() -> None:
    """Whoever keeps the gradient of the result sees that one, though the residual's goes on to be summed."""
    x = paddle.randn([2, 6, 3, 3])
    x.stop_gradient = False
    hidden = x * 2
    y = NormAct(6)(hidden * 3, residual=hidden)
    y.retain_grads()
    y.backward(paddle.full_like(y, 5.0))
    assert bool((y.grad == 5.0).all())
