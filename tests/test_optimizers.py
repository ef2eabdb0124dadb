"""The optimizers whose step is one compiled call against Paddle's own."""

from pathlib import Path

import numpy as np
import paddle
import pytest
from kernel_checks import assert_threads_change_no_bit, compiled
from paddle import nn
from paddle.regularizer import L2Decay

import kernels
from engine import optim
from engine.optim import ModelEma
from kernels import build
from kernels import optimizer as calls

SHAPES = [[3], [17], [5, 7], [513], [40, 250], [1], [300, 300], [8, 3, 3, 3]]
DECAY, MOMENTUM, BETAS, EPSILON = 0.05, 0.9, (0.9, 0.999), 1e-8
AVX512 = "avx512f" in Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else False
pytestmark = compiled


def _parameters() -> list[paddle.Tensor]:
    rng = np.random.default_rng(0)
    parameters = [paddle.create_parameter(shape, "float32") for shape in SHAPES]
    for parameter in parameters:
        parameter.set_value(rng.standard_normal(parameter.shape).astype("float32"))
    return parameters


def _optimizer(kind: str, parameters: list[paddle.Tensor], module=optim, clip: float = 0.0):
    """Build an optimizer that decays tensors of several dimensions; the third learns at 0.3 of the rate."""
    parameters[2].optimize_attr["learning_rate"] = 0.3
    options = {"parameters": parameters, "grad_clip": nn.ClipGradByGlobalNorm(clip) if clip else None}
    if kind == "adamw":
        decayed = {parameter.name for parameter in parameters if parameter.ndim > 1}
        return module.AdamW(1e-3, *BETAS, EPSILON, weight_decay=DECAY,
                            apply_decay_param_fun=lambda name: name in decayed, **options)
    for parameter in parameters:
        parameter.regularizer = L2Decay(DECAY) if parameter.ndim > 1 else None
    return module.Adam(1e-3, *BETAS, EPSILON, **options) if kind == "adam" else module.Momentum(
        1e-3, MOMENTUM, **options)


def _gradients(step: int) -> list[np.ndarray | None]:
    """Return gradients of all sizes; some parameters have none in some steps."""
    rng = np.random.default_rng([1, step])
    gradients = [(rng.standard_normal(shape) * 10 ** rng.uniform(-6, 1)).astype("float32") for shape in SHAPES]
    return [None if step % 7 == 3 and gradient.ndim == 1 else gradient for gradient in gradients]


def _train(optimizer, parameters: list[paddle.Tensor], steps: range) -> list[np.ndarray]:
    """Take steps and return the parameters and the optimizer's state."""
    for step in steps:
        for parameter, gradient in zip(parameters, _gradients(step), strict=True):
            if gradient is not None:
                (parameter * paddle.to_tensor(gradient)).sum().backward()
        optimizer.set_lr(1e-2 * (1.1 + np.cos(step)))
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
    state = optimizer.state_dict()
    return [*(parameter.numpy() for parameter in parameters), *(value.numpy() for value in state.values())]


def _assert_paddles(got: np.ndarray, want: np.ndarray) -> None:
    """Compare with Paddle's: to the bit where both multiply and add in one, else but for rounding."""
    if AVX512:
        np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the compiled calls that were made."""
    names: list[str] = []
    original = calls.run
    monkeypatch.setattr(calls, "run", lambda name, *rest: names.append(name) or original(name, *rest))
    return names


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_fifty_steps_are_paddles(kind: str, clip: float, taken: list[str]) -> None:
    ours, theirs = _parameters(), _parameters()
    found = _train(_optimizer(kind, ours, clip=clip), ours, range(50))
    assert sum(name in ("adam", "momentum") for name in taken) == 50
    expected = _train(_optimizer(kind, theirs, paddle.optimizer, clip), theirs, range(50))
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        if not clip:
            _assert_paddles(got, want)
        else:  # the norm is a sum in float64 here
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_each_goes_on_from_the_others_state(kind: str) -> None:
    modules = {"ours": optim, "theirs": paddle.optimizer}
    results = []
    for first, second in (("ours", "theirs"), ("theirs", "ours"), ("theirs", "theirs")):
        before, after = _parameters(), _parameters()
        optimizer = _optimizer(kind, before, modules[first])
        _train(optimizer, before, range(6))
        state, names = optimizer.state_dict(), {b.name: a.name for b, a in zip(before, after, strict=True)}
        renamed = {key.replace(old, new): value for key, value in state.items() for old, new in names.items()
                   if key.startswith(f"{old}_")}
        for old, new in zip(before, after, strict=True):
            new.set_value(old.numpy())
        optimizer = _optimizer(kind, after, modules[second])
        optimizer.set_state_dict({key: paddle.to_tensor(value.numpy()) for key, value in renamed.items()})
        results.append(_train(optimizer, after, range(6, 12)))
        assert len(renamed) == len(SHAPES) * (1 if kind == "sgd" else 4)
    for result in results[:2]:
        for got, want in zip(result, results[2], strict=True):
            _assert_paddles(got, want)


def test_state_can_be_set_between_steps() -> None:
    parameters = _parameters()
    optimizer = _optimizer("adamw", parameters, clip=1.0)
    _train(optimizer, parameters, range(3))
    state = {key: paddle.to_tensor(value.numpy()) for key, value in optimizer.state_dict().items()}
    weights = [parameter.numpy() for parameter in parameters]
    expected = _train(optimizer, parameters, range(3, 8))
    optimizer.set_state_dict(state)
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.set_value(weight)
    np.testing.assert_equal(_train(optimizer, parameters, range(3, 8)), expected)


def test_threads_change_no_bit() -> None:
    def train() -> list[np.ndarray]:
        parameters = _parameters()
        return _train(_optimizer("adamw", parameters, clip=0.5), parameters, range(5))

    assert_threads_change_no_bit(train)


def test_stock_mode_other_precisions_and_no_compiler_are_left_to_paddle(
        taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = _parameters()
    optimizer = _optimizer("adam", parameters)
    with kernels.using("stock"):
        _train(optimizer, parameters, range(2))
    assert not taken
    _train(optimizer, parameters, range(2, 4))
    assert taken == ["adam"] * 2
    monkeypatch.setattr(build, "_library", build.Unavailable("none here"))
    _train(optimizer, parameters, range(4, 6))
    monkeypatch.undo()
    double = paddle.create_parameter([3, 4], "float64")
    optimizer = optim.Adam(0.1, *BETAS, EPSILON, [double])
    before = double.numpy()
    (double * 2).sum().backward()
    optimizer.step()
    assert len(taken) == 2 and not np.array_equal(double.numpy(), before)


def test_gradients_that_are_strided(taken: list[str]) -> None:
    results = []
    for mode in ("auto", "stock"):
        weight = paddle.create_parameter([6, 5], "float32")
        weight.set_value(np.arange(30, dtype="float32").reshape(6, 5))
        optimizer = optim.Adam(0.1, *BETAS, EPSILON, [weight])
        with kernels.using(mode):
            for _ in range(3):
                (weight.t() * paddle.arange(30, dtype="float32").reshape([5, 6])).sum().backward()
                optimizer.step()
                optimizer.clear_grad(set_to_zero=False)
        results.append(weight.numpy())
    assert taken == ["adam"] * 3
    _assert_paddles(*results)


def test_gradients_that_are_no_numbers_are_seen(taken: list[str]) -> None:
    big = paddle.full([3, 5000], 1e38)
    assert np.isfinite(calls.sum_squares([big, big]))
    for value in (np.nan, np.inf, -np.inf):
        assert not np.isfinite(calls.sum_squares([big, paddle.to_tensor([1.0, value])]))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(size).astype("float32") for size in (1, 5, 16, 8192, 70_001)]
    expected = sum((array.astype("float64") ** 2).sum() for array in arrays)
    assert calls.sum_squares([paddle.to_tensor(array) for array in arrays]) == pytest.approx(expected, rel=1e-13)


def test_ema_is_the_stock_operators(taken: list[str]) -> None:
    model = nn.Sequential(nn.Conv2D(3, 40, 3), nn.BatchNorm2D(40), nn.Linear(300, 301))
    model[2].bias.stop_gradient = True
    ours, theirs = ModelEma(model, 0.9), ModelEma(model, 0.9)
    for _ in range(12):
        for tensor in model.state_dict().values():
            tensor.set_value(paddle.randn(tensor.shape))
        ours.update(model)
        with kernels.using("stock"):
            theirs.update(model)
    assert taken == ["average"] * 12
    for name, average in ours.state.items():
        np.testing.assert_array_equal(average.numpy(), theirs.state[name].numpy())
    for name in ("1._mean", "1._variance", "2.bias"):
        np.testing.assert_array_equal(ours.state[name].numpy(), model.state_dict()[name].numpy())
