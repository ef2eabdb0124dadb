"""Muon against its definition in float64, and against AdamW for the parameters that are AdamW's."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import nn

import kernels
from configs.load import load_config
from engine import checkpoint
from engine.optim import Muon, build_optimizer, hidden_matrices, orthogonalize
from kernels import build
from models import create_model

DECAY, MOMENTUM, RATE = 0.05, 0.95, 2e-3
# Operands of bfloat16 are off by up to 1/256, which an iteration multiplies by its slope, up to 3.4 for small values.
TOLERANCE = {"stock": 1e-4, "auto": 0.1 if kernels.status().get("bfloat16") else 1e-4}


def _iterated(matrix: np.ndarray) -> np.ndarray:
    """Iterate as the authors do, in float64."""
    x = matrix.astype("float64") / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


@pytest.mark.parametrize("mode", kernels.MODES)
@pytest.mark.parametrize("shape", [(64, 64), (48, 200), (200, 48), (1, 30), (30, 1)])
def test_orthogonalized_is_the_authors_iteration(shape: tuple[int, int], mode: str) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape).astype("float32")
    with kernels.using(mode):
        found = orthogonalize(paddle.to_tensor(matrix)).numpy()
    expected = _iterated(matrix) if shape[0] <= shape[1] else _iterated(matrix.T).T
    assert np.linalg.norm(found - expected) < TOLERANCE[mode] * np.linalg.norm(expected)
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    inner = (found * (left @ right)).sum() / np.linalg.norm(found) / np.linalg.norm(left @ right)
    assert inner > 0.97
    if shape != (64, 64):  # a square matrix of noise has singular values near 0, which stay below
        values = np.linalg.svd(found, compute_uv=False)
        assert 0.65 < values.min() <= values.max() < 1.25


@pytest.mark.skipif(not kernels.status()["in_use"], reason="no compiled operators")
def test_processors_without_bfloat16_iterate_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.library(), "bfloat16", False)
    matrix = np.random.default_rng(0).standard_normal((48, 200)).astype("float32")
    found = orthogonalize(paddle.to_tensor(matrix)).numpy()
    assert np.linalg.norm(found - _iterated(matrix)) < TOLERANCE["stock"] * np.linalg.norm(found)


def test_hidden_matrices_are_all_weights_but_heads_tables_and_depthwise_filters() -> None:
    model = create_model("cdfformer_cifar", num_classes=10)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden = {names[id(parameter)] for parameter in hidden_matrices(model)}
    others = [(name, parameter) for name, parameter in model.named_parameters() if name not in hidden]
    assert {"downsample_layers.0.conv.weight", "stages.2.0.mlp.fc1.weight"} <= hidden
    for name, parameter in others:
        assert parameter.ndim in (0, 1) or name.startswith("head.") or any(
            part in name for part in ("dwconv.weight", "complex_weights")), name


def _model() -> nn.Layer:
    paddle.seed(0)
    return nn.Sequential(nn.Conv2D(3, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


def _pair(name: str, clip: float = 0.0) -> tuple[nn.Layer, paddle.optimizer.Optimizer]:
    model = _model()
    config = load_config(None, [f"OPTIMIZER.NAME={name}", f"OPTIMIZER.WEIGHT_DECAY={DECAY}",
                                "OPTIMIZER.DECAY_ALL=false", f"OPTIMIZER.MOMENTUM={MOMENTUM}"]).OPTIMIZER
    optimizer = build_optimizer(model, config, clip)
    optimizer.set_lr(RATE)
    return model, optimizer


def _take(model: nn.Layer, optimizer: paddle.optimizer.Optimizer, steps: range) -> None:
    """Take steps with gradients that do not depend on the weights."""
    for step in steps:
        rng = np.random.default_rng(step)
        sum((parameter * paddle.to_tensor(rng.standard_normal(parameter.shape).astype("float32"))).sum()
            for parameter in model.parameters()).backward()
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)


@pytest.mark.parametrize("mode", kernels.MODES)
def test_steps_are_momentum_orthogonalized_and_adamw_for_the_rest(mode: str) -> None:
    (model, muon), (twin, adamw) = _pair("muon"), _pair("adamw")
    matrices = [model[0].weight, model[2].weight]
    assert isinstance(muon, Muon) and [id(one) for one in hidden_matrices(model)] == [id(one) for one in matrices]
    expected = [matrix.numpy().astype("float64") for matrix in matrices]
    places = [[id(one) for one in model.parameters()].index(id(matrix)) for matrix in matrices]
    velocities = [np.zeros(matrix.shape) for matrix in matrices]
    for step in range(4):
        rng = np.random.default_rng(step)
        gradients = [rng.standard_normal(parameter.shape) for parameter in model.parameters()]
        for i, place in enumerate(places):
            velocities[i] = MOMENTUM * velocities[i] + gradients[place]
            rows = (gradients[place] + MOMENTUM * velocities[i]).reshape([len(velocities[i]), -1])
            update = _iterated(rows) if rows.shape[0] <= rows.shape[1] else _iterated(rows.T).T
            size = 0.2 * np.sqrt(max(rows.shape)) * RATE
            expected[i] = expected[i] * (1 - RATE * DECAY) - size * update.reshape(expected[i].shape)
    with kernels.using(mode):
        _take(model, muon, range(4))
        _take(twin, adamw, range(4))
    start = _model()
    for found, wanted, place in zip(matrices, expected, places, strict=True):
        moved = np.linalg.norm(wanted - start.parameters()[place].numpy())
        assert np.linalg.norm(found.numpy() - wanted) < TOLERANCE[mode] * moved
    for i, (one, other) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
        assert np.array_equal(one.numpy(), other.numpy()) == (i not in places)


def test_a_step_that_the_loss_scaler_gives_up_changes_nothing() -> None:
    model, optimizer = _pair("muon", clip=1.0)
    _take(model, optimizer, range(1))
    before = checkpoint.model_arrays(model), checkpoint.optimizer_arrays(optimizer, model)
    for parameter in model.parameters():
        (parameter * parameter.detach()).sum().backward()
    optimizer._set_auxiliary_var("found_inf", paddle.to_tensor(True))  # as GradScaler.step does on a GPU
    optimizer.step()
    np.testing.assert_equal((checkpoint.model_arrays(model), checkpoint.optimizer_arrays(optimizer, model)), before)
