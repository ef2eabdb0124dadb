"""Compare a network with the numbers of its reference implementation.

A fixture (``<name>.json`` and ``.npz``; see ``references``) has what the reference computes when each tensor is filled
by a fixed rule. Our network is filled by the same rule; compared are logits in float32 and float64, and the loss,
gradients and running statistics of one training step in float64 (in float32 a unit near the kink of a ReLU may fall on
the other side and change a gradient by a percent).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from engine.weights import linear_weights
from models import create_model, list_models
from references import fill
from utils import ROOT

REFERENCE = ROOT / "references"

# Fixtures whose reference was built with other arguments than the variant of that name.
ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "convmixer_768_32_gelu": ("convmixer_768_32", {"act_layer": "gelu"}),
    "mobileformer_26m_pvit_64": ("mobileformer_26m_pvit", {"lite_stride": 1}),
}
BARS = {"logits_float32": 1e-4, "logits_float64": 1e-8, "train_logits": 1e-6, "loss": 1e-6, "gradients": 1e-6,
        "running_stats": 1e-6}
"""The largest errors of a network that equals its reference.

Those of logits in evaluation are relative to each image's standard deviation over classes, all others to the
reference's value (arrays: to its largest magnitude).
"""


@dataclass(frozen=True)
class Parity:
    """The largest errors of one network, by the names of ``BARS``; None where the fixture holds no such numbers."""

    fixture: str
    parameters: int
    reference_parameters: int
    errors: dict[str, float | None]

    @property
    def missed(self) -> list[str]:
        """Return a phrase for each error beyond ``BARS``; empty for a network that equals its reference."""
        found = [f"{name} {value:.1e}, expected below {BARS[name]:.0e}" for name, value in self.errors.items()
                 if value is not None and not value < BARS[name]]
        if self.parameters != self.reference_parameters:
            found.insert(0, f"{self.parameters} trainable parameters, expected {self.reference_parameters}")
        return found


def fixture_names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.json") if path.with_suffix(".npz").exists())


def model_for(fixture_name: str) -> tuple[str, dict[str, Any]]:
    """Return a fixture's model and arguments; its name may end in an image size."""
    name, arguments = ARGUMENTS.get(fixture_name, (fixture_name, {}))
    return (name if name in list_models() else re.sub(r"_\d+$", "", name)), arguments


def build_for(fixture: dict[str, Any]) -> nn.Layer:
    name, arguments = model_for(fixture["name"])
    return create_model(name, num_classes=fixture["num_classes"], image_size=fixture["image_size"], **arguments)


def set_state(model: nn.Layer, arrays: dict[str, np.ndarray]) -> None:
    """Copy arrays of the reference's names and layouts into ``model``; raises KeyError where names differ."""
    arrays, turned = dict(arrays), linear_weights(model)
    for name, tensor in model.state_dict().items():
        array = arrays.pop(reference_name(name))
        tensor.set_value((array.T if name in turned else array).astype(tensor.numpy().dtype))
    if arrays:
        raise KeyError(f"the reference has more tensors: {sorted(arrays)}")


def reference_name(name: str) -> str:
    """Return PyTorch's name of a tensor of ours."""
    return re.sub(r"\._variance$", ".running_var", re.sub(r"\._mean$", ".running_mean", name))


def compare(name: str, folder: Path) -> Parity:
    """Return the errors for one fixture of ``folder``, of which only data is read."""
    fixture = fill.load(str(folder / name))
    arrays = {key: value.astype(np.float64) for key, value in fixture["arrays"].items()}
    state = fill.state(fixture)
    model = build_for(fixture)
    set_state(model, state)
    trainable = sum(parameter.size for parameter in model.parameters() if parameter.trainable)
    images = fill.inputs(fixture["eval"])
    deviation = np.asarray(fixture["eval"]["logits_std"])[:, None]

    def logits_error(dtype: str) -> float:
        model.to(dtype=dtype)
        model.eval()
        with paddle.no_grad():
            logits = model(paddle.to_tensor(images.astype(dtype))).numpy()
        return float(np.max(np.abs(logits - arrays["logits_float64"]) / deviation))

    errors = dict.fromkeys(BARS) | {f"logits_{dtype}": logits_error(dtype) for dtype in ("float32", "float64")}
    if fixture.get("train"):
        set_state(model, state)
        errors |= _training_errors(model, fixture["train"], arrays)
    return Parity(name, trainable, fixture["trainable_parameters"], errors)


def _training_errors(model: nn.Layer, train: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, float | None]:
    before = _as_reference(model, model.state_dict())
    model.train()
    logits = model(paddle.to_tensor(fill.inputs(train).astype("float64")))
    labels = F.one_hot(paddle.to_tensor(train["labels"]), logits.shape[1]).astype("float64")
    loss = F.cross_entropy(logits, F.label_smooth(labels, epsilon=train["label_smoothing"]), soft_label=True)
    loss.backward()
    gradients = _as_reference(model, {name: parameter.grad for name, parameter in model.named_parameters()
                                      if parameter.grad is not None})
    errors = [abs(np.linalg.norm(gradients[name]) / norm - 1) for name, norm in train["grad_norms"].items()]
    errors.append(abs(np.sqrt(sum((g**2).sum() for g in gradients.values())) / train["grad_norm_all"] - 1))
    errors += [_relative(gradients[name], arrays[f"grad:{name}"]) for name in train["full_gradients"]]
    after = _as_reference(model, model.state_dict())
    stats = [_relative(_as_pytorch(name, before[name], after[name], train), arrays[f"stat:{name}"])
             for name in train.get("running_stats", ())]
    return {"train_logits": _relative(logits.numpy(), arrays["train_logits_float64"]),
            "loss": abs(float(loss) / train["loss"] - 1),
            "gradients": float(max(errors)),
            "running_stats": max(stats, default=None)}


def _as_reference(model: nn.Layer, tensors: dict[str, paddle.Tensor]) -> dict[str, np.ndarray]:
    """Return tensors of ``model`` with the reference's names and layouts."""
    turned = linear_weights(model)
    return {reference_name(name): tensor.numpy().T if name in turned else tensor.numpy()
            for name, tensor in tensors.items()}


def _as_pytorch(name: str, old: np.ndarray, new: np.ndarray, train: dict[str, Any]) -> np.ndarray:
    """Return the running statistic that PyTorch would hold: its variance is unbiased, Paddle's biased."""
    if not name.endswith("running_var") or "unbiased" not in train["running_var_rule"]:
        return new
    count = train["running_stats_count"]
    count = count[name] if isinstance(count, dict) else count
    return 0.9 * old + (new - 0.9 * old) * count / (count - 1)


def _relative(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(value - reference).max() / np.abs(reference).max())
