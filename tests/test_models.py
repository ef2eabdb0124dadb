"""What every registered network must do. New papers are picked up by themselves.

All variants are built for 32 pixels and 42 classes; of each family and reference, the smallest variant stands for
the others where a check is dear.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn

from analysis.complexity import count
from errors import UserError
from models import create_model, list_models, model_info
from models.layers import resize_position_embedding

HUGE = 45_000_000
BASELINES = ["paddle/resnet18", "paddle/mobilenet_v3_small"]


def size_of(name: str) -> int:
    """Return the trainable parameters with 1,000 classes, as the registry has them."""
    return model_info(name).variant.parameters or 0


def representatives() -> list[str]:
    """Return the smallest variant of each family and reference."""
    smallest: dict[tuple[str, str], str] = {}
    for name in sorted(list_models(), key=size_of):
        info = model_info(name)
        smallest.setdefault((info.family, info.reference), name)
    return sorted(smallest.values(), key=list_models().index)


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


every_network = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if size_of(name) > HUGE else name for name in list_models()]
)
each_family = pytest.mark.parametrize("name", representatives())


@pytest.mark.parametrize("name", list_models())
def test_registry_knows_paper_and_reference(name: str) -> None:
    info = model_info(name)
    assert info.paper_url.startswith("https://")
    assert "@" in info.reference
    assert size_of(name) > 0


@every_network
def test_trains_evaluates_and_changes_its_head(name: str) -> None:
    paddle.seed(0)
    model = create_model(name, num_classes=42, image_size=32)
    x = images(4, 32)
    logits = train_step(model, x)
    assert logits.shape == [4, 42]
    assert np.isfinite(logits.numpy()).all()
    for key, parameter in trainable(model).items():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key

    logits = evaluate(model, x)
    assert logits.shape == (4, 42)
    assert np.isfinite(logits).all()
    assert (evaluate(model, x) == logits).all()

    model.reset_classifier(7)
    assert evaluate(model, x).shape == (4, 7)
    model.reset_classifier(0)
    features = evaluate(model, x)
    assert features.shape == (4, model.num_features)
    with paddle.no_grad():
        assert (model.forward_features(x).numpy() == features).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_counts_are_those_of_the_registry(name: str) -> None:
    variant = model_info(name).variant
    complexity = count(create_model(name), variant.image_size)
    assert complexity.parameters == variant.parameters
    if variant.macs is not None:
        assert complexity.macs == variant.macs


@each_family
def test_parameters_are_those_of_the_registry(name: str) -> None:
    parameters = sum(parameter.size for parameter in trainable(create_model(name)).values())
    assert parameters == size_of(name)


@each_family
def test_every_parameter_learns(name: str) -> None:
    """At 64 pixels no map is so small that attention over it, or a norm, has nothing to choose from."""
    paddle.seed(0)
    model = create_model(name, num_classes=42, image_size=64)
    train_step(model, images(4, 64))
    assert [key for key, parameter in trainable(model).items() if not float(parameter.grad.abs().max()) > 0] == []


@each_family
def test_built_without_a_head(name: str) -> None:
    model = create_model(name, num_classes=0, image_size=32)
    assert evaluate(model, images(2, 32)).shape == (2, model.num_features)
    model.reset_classifier(5)
    assert evaluate(model, images(2, 32)).shape == (2, 5)


@each_family
def test_state_round_trip(name: str, tmp_path: Path) -> None:
    model = create_model(name, num_classes=10, image_size=32)
    train_step(model, images(4, 32))  # running statistics that are not the initial ones
    paddle.save(model.state_dict(), str(tmp_path / "model.pdparams"))
    fresh = create_model(name, num_classes=10, image_size=32)
    missing, unexpected = fresh.set_state_dict(paddle.load(str(tmp_path / "model.pdparams")))
    assert (missing, unexpected) == ([], [])
    assert (evaluate(fresh, images(2, 32)) == evaluate(model, images(2, 32))).all()


@each_family
def test_drop_path_drops_and_trains(name: str) -> None:
    model = create_model(name, num_classes=10, image_size=32, drop_path_rate=0.1)
    optimizer = paddle.optimizer.Momentum(1e-3, parameters=list(trainable(model).values()))
    before = {key: parameter.numpy() for key, parameter in trainable(model).items()}
    assert np.isfinite(train_step(model, images(4, 32)).numpy()).all()
    optimizer.step()
    assert any((parameter.numpy() != before[key]).any() for key, parameter in trainable(model).items())

    for rate, drops in ((0.0, False), (0.5, True)):
        model = create_model(name, num_classes=10, image_size=32, drop_path_rate=rate)
        model.train()
        with paddle.no_grad():
            first, second = model(images(4, 32)).numpy(), model(images(4, 32)).numpy()
        assert (first != second).any() == drops
    with pytest.raises(UserError, match="drop_path_rate"):
        create_model(name, num_classes=10, image_size=32, drop_path_rate=1.5)


def runs_or_refuses(build: Callable[[], nn.Layer], size: tuple[int, int]) -> None:
    try:
        logits = evaluate(build(), images(2, *size))
    except UserError as refusal:
        assert any(str(side) in str(refusal) for side in size) or "use larger images" in str(refusal)
    else:
        assert logits.shape == (2, 3)
        assert np.isfinite(logits).all()


@each_family
@pytest.mark.parametrize("size", [(33, 33), (36, 52), (8, 8)])
def test_builds_for_other_sizes(name: str, size: tuple[int, int]) -> None:
    runs_or_refuses(lambda: create_model(name, num_classes=3, image_size=size), size)


@each_family
def test_takes_other_sizes(name: str) -> None:
    model = create_model(name, num_classes=3, image_size=32)
    for size in [(64, 64), (33, 33), (36, 52), (40, 56), (31, 45), (8, 8)]:
        runs_or_refuses(lambda: model, size)


@each_family
def test_other_channels(name: str) -> None:
    model = create_model(name, num_classes=3, image_size=32, in_chans=1)
    assert evaluate(model, images(2, 32, channels=1)).shape == (2, 3)


@each_family
def test_mistakes_are_told(name: str) -> None:
    argument = next(key for key in inspect.signature(model_info(name).build).parameters
                    if key not in ("num_classes", "image_size", "in_chans", "drop_path_rate"))
    with pytest.raises(UserError, match=rf"no argument '{argument}z' \(nearest: .*\b{argument}\b"):
        create_model(name, **{f"{argument}z": 1})
    with pytest.raises(UserError, match="num_classes is -1"):
        create_model(name, num_classes=-1)
    with pytest.raises(UserError, match=rf"unknown model '{name}x' \(nearest: .*\b{name}\b"):
        create_model(f"{name}x")


@pytest.mark.parametrize(("argument", "value"), [("mlp_ratio", 0.0), ("pos_embed_stages", [1, 9])])
def test_iformer_refuses_what_it_would_pass_over(argument: str, value: object) -> None:
    with pytest.raises(UserError, match=re.escape(f"{argument} of iFormer is {value}")):
        create_model("iformer_cifar", **{argument: value})


@pytest.mark.parametrize("name", BASELINES)
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


@pytest.mark.parametrize("size", [(36, 36), (40, 56)])
def test_iformer_on_odd_maps(size: tuple[int, int]) -> None:
    """Maps of 9 and 7 do not divide into the 2 × 2 windows of the low-frequency mixer."""
    model = create_model("iformer_small", num_classes=10, image_size=size)
    logits = train_step(model, images(2, *size))
    assert np.isfinite(logits.numpy()).all()
    assert model.pos_embed1.shape[1:3] == [size[0] // 4, size[1] // 4]


def test_iformer_resamples_its_tables() -> None:
    small = create_model("iformer_small", num_classes=10, image_size=32)
    large = create_model("iformer_small", num_classes=10, image_size=64)
    state = small.state_dict()
    for stage, side in enumerate((16, 8, 4, 2), start=1):
        state[f"pos_embed{stage}"] = resize_position_embedding(state[f"pos_embed{stage}"], side, side)
    large.set_state_dict(state)
    np.testing.assert_allclose(evaluate(small, images(2, 64)), evaluate(large, images(2, 64)), rtol=0, atol=1e-6)
