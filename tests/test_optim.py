"""Loss, schedules, optimizers and the EMA against Paddle's own, hand-computed numbers, and Muon's definition."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn
from yacs.config import CfgNode

import kernels
from configs.load import load_config
from engine import checkpoint
from engine.checkpoint import optimizer_arrays
from engine.evaluate import LabelSmoothingCrossEntropy
from engine.model import build_model
from engine.optim import ModelEma, Muon, build_optimizer, hidden_matrices, learning_rate, orthogonalize
from engine.state import RunningMean
from errors import UserError
from kernels import build
from models import create_model

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_paddles_cross_entropy(smoothing: float) -> None:
    logits = paddle.to_tensor(RNG.standard_normal((16, 10)).astype("float32"))
    labels = paddle.to_tensor(RNG.integers(0, 10, 16))
    loss = LabelSmoothingCrossEntropy(smoothing)
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none").numpy().ravel()
    np.testing.assert_allclose(loss(logits, labels, reduction="none").numpy(), expected, rtol=1e-5)
    soft = F.one_hot(labels, 10)
    np.testing.assert_allclose(float(loss(logits, soft)), expected.mean(), rtol=1e-5)


def test_loss_of_a_mixture_is_the_mixture_of_losses() -> None:
    logits = paddle.to_tensor(RNG.standard_normal((4, 10)).astype("float32"))
    a, b = paddle.to_tensor([0, 1, 2, 3]), paddle.to_tensor([4, 5, 6, 7])
    loss = LabelSmoothingCrossEntropy(0.1)
    mixed = 0.3 * F.one_hot(a, 10) + 0.7 * F.one_hot(b, 10)
    expected = 0.3 * float(loss(logits, a)) + 0.7 * float(loss(logits, b))
    assert float(loss(logits, mixed)) == pytest.approx(expected, rel=1e-6)


def test_cosine_is_paddles_annealing_stepped_every_iteration() -> None:
    schedule = load_config(None).SCHEDULE
    paddles = paddle.optimizer.lr.CosineAnnealingDecay(1e-3, T_max=390 * 100)
    for iteration in range(2000):
        assert learning_rate(iteration, 390, 100, 1e-3, schedule) == pytest.approx(paddles(), rel=1e-9)
        paddles.step()
    assert learning_rate(39_000, 390, 100, 1e-3, schedule) == pytest.approx(0.0, abs=1e-18)
    assert learning_rate(19_500, 390, 100, 1e-3, schedule) == pytest.approx(5e-4)


def test_warm_up_and_piecewise_linear() -> None:
    warm = load_config(None, ["SCHEDULE.WARMUP_EPOCHS=2", "SCHEDULE.WARMUP_LR=0.1", "SCHEDULE.MIN_LR=0.01"]).SCHEDULE
    rates = [learning_rate(i, 10, 12, 1.1, warm) for i in (0, 10, 20, 70, 120)]
    assert rates == pytest.approx([0.1, 0.6, 1.1, (1.1 + 0.01) / 2, 0.01])
    points = load_config(None, ["SCHEDULE.NAME=piecewise_linear"]).SCHEDULE  # the CIFAR-10 recipe of ConvMixer
    rates = [learning_rate(i, 100, 25, 0.05, points) for i in (0, 500, 1000, 1500, 2000, 2250, 2500)]
    assert rates == pytest.approx([0.0, 0.025, 0.05, 0.02625, 0.0025, 0.00125, 0.0])


def _one_layer() -> nn.Layer:
    paddle.seed(0)
    return nn.Linear(3, 2)


def _config(*overrides: str) -> CfgNode:
    return load_config(None, overrides).OPTIMIZER


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_weight_decay_spares_biases_where_asked(name: str) -> None:
    for decay_all in (True, False):
        layer = _one_layer()
        layer.bias.set_value(paddle.ones([2]))
        overrides = [f"OPTIMIZER.NAME={name}", "OPTIMIZER.WEIGHT_DECAY=0.1"]
        optimizer = build_optimizer(layer, _config(*overrides, f"OPTIMIZER.DECAY_ALL={str(decay_all).lower()}"))
        optimizer.set_lr(0.1)
        (0.0 * layer(paddle.ones([1, 3]))).sum().backward()
        before = layer.weight.numpy()
        optimizer.step()
        assert bool((layer.bias.numpy() < 1).all()) == decay_all
        assert not np.array_equal(layer.weight.numpy(), before)


@pytest.mark.parametrize("mode", kernels.MODES)
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon"])
def test_the_clipped_norm_is_that_of_all_gradients(name: str, mode: str) -> None:
    """Seen in the first moments after one step; Muon keeps one kind for its matrix, AdamW's for the rest."""
    paddle.seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    overrides = [f"OPTIMIZER.NAME={name}", "OPTIMIZER.DECAY_ALL=false", "OPTIMIZER.WEIGHT_DECAY=0"]
    optimizer = build_optimizer(model, _config(*overrides), 1.0)
    optimizer.set_lr(1.0)
    (model(paddle.ones([1, 4])) * paddle.to_tensor([[30.0, -40.0]])).sum().backward()
    gradients = {key: parameter.grad.numpy() for key, parameter in model.named_parameters()}
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
    with kernels.using(mode):
        optimizer.step()
    factors = {"moment1_0": 0.1, "velocity_0": 1.0, "momentum_0": 1.0}  # of the gradient in the first step
    moments = {tuple(key.split("/")): array for key, array in optimizer_arrays(optimizer, model).items()}
    found = {key: array / factors[kind] for (key, kind), array in moments.items() if kind in factors}
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        np.testing.assert_allclose(found[key], gradient / norm, rtol=1e-5)


def test_adam_takes_coupled_decay_and_adamw_decoupled() -> None:
    for name in ("adam", "adamw"):
        layer, reference = _one_layer(), _one_layer()
        optimizer = build_optimizer(layer, _config(f"OPTIMIZER.NAME={name}", "OPTIMIZER.WEIGHT_DECAY=0.1"))
        kind = paddle.optimizer.Adam if name == "adam" else paddle.optimizer.AdamW
        paddles = kind(learning_rate=1e-3, parameters=reference.parameters(), weight_decay=0.1)
        for _ in range(3):
            for model, step in ((layer, optimizer), (reference, paddles)):
                (model(paddle.ones([4, 3])) ** 2).mean().backward()
                step.step()
                step.clear_grad()
        np.testing.assert_array_equal(layer.weight.numpy(), reference.weight.numpy())


def test_ema_follows_its_formula_and_leaves_the_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1D(2))
    ema = ModelEma(model, 0.5)
    expected = model[0].weight.numpy().astype("float64")
    for n in range(20):
        model[0].weight.set_value(paddle.full([2, 2], float(n)))
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    np.testing.assert_allclose(ema.state["0.weight"].numpy(), expected, rtol=1e-5)
    with ema.applied_to(model):
        np.testing.assert_array_equal(model[0].weight.numpy(), ema.state["0.weight"].numpy())
    np.testing.assert_array_equal(model[0].weight.numpy(), np.full((2, 2), 19.0, "float32"))


def test_running_mean_weighs_images_not_batches() -> None:
    mean = RunningMean()
    for size, loss in ((128, 1.0), (16, 2.0)):
        mean.add(paddle.to_tensor(loss), paddle.to_tensor(16.0 if size == 16 else 0.0), size)
    assert mean.means() == pytest.approx(((128 + 32) / 144, 16 / 144))
    assert RunningMean(mean.sums()).sums() == mean.sums()


@pytest.mark.parametrize(("override", "said"), [
    ("depths=3", "build no iformer_small: TypeError"), ("mlp_ratio=.inf", "OverflowError"),
    ("num_heads=[0, 2, 2, 2]", "ZeroDivisionError"), ("embed_dims=[32, 64, 96, '128']", "TypeError"),
    ("num_classes=5", "MODEL.NUM_CLASSES"), ("in_chans=1", "three channels"), ("drop_rate=2", "0 <= value < 1"),
])
def test_arguments_that_build_no_network_are_refused(override: str, said: str) -> None:
    config = load_config("configs/quickstart.yaml", [f"MODEL.ARGS.{override}"])
    with pytest.raises(UserError, match=said) as caught:
        build_model(config)
    assert "MODEL.ARGS" in str(caught.value) and "\n" not in str(caught.value)


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
