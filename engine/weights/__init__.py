"""Weights: load them into models, with names and layouts adapted and every name reported, and save them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.weights.read import Weights, read_weights
from errors import UserError, printable
from utils.fileio import write_atomically

if TYPE_CHECKING:
    import paddle

SHOWN = 8  # names in a message; the rest is counted
SUFFIXES = (".pdparams", ".safetensors")
RENAMED = {".running_mean": "._mean", ".running_var": "._variance"}  # PyTorch's, Paddle's
MAX_PREFIX = 8  # parts of a name that a wrapper may have put in front


@dataclass
class LoadReport:
    """What became of each name: `loaded`, `ignored` (counters, index tables), `fresh` (left as initialised) and
    `resampled` (name, shape found, shape made); and what the file was."""

    path: Path
    kind: str
    layout: str
    nested_under: str | None
    prefix: str = ""
    loaded: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    resampled: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    def lines(self, verbose: bool = False) -> list[str]:
        """Return the report for a reader: one line per category, with `verbose` also one per name."""
        nested = f", under {self.nested_under}" if self.nested_under else ""
        prefix = f", prefix {printable(self.prefix)} removed from all names" if self.prefix else ""
        lines = [f"{printable(self.path, 300)}: {self.kind}, {self.layout} layout{nested}{prefix}"]
        resampled = [f"{name}: {list(found)} to {list(made)}" for name, found, made in self.resampled]
        for title, names in (
            ("loaded", self.loaded),
            ("resampled to the model's size", resampled),
            ("left fresh (another number of classes)", self.fresh),
            ("ignored (counters and index tables)", self.ignored),
        ):
            if names or names is self.loaded:
                lines.append(f"{len(names):6d} {title}")
            if verbose or names is self.fresh:
                lines += [f"         {printable(name)}" for name in names]
        return lines


def convert_state(weights: Weights, model: paddle.nn.Layer) -> dict[str, np.ndarray]:
    """Return the arrays under the names and in the layouts of `model`'s state dict; nothing is checked or dropped.

    In PyTorch's layout, ``running_mean`` and ``running_var`` become ``_mean`` and ``_variance``, and the weights of
    fully connected layers, ``[out, in]``, are transposed.
    """
    weights = _fit_to(weights, model)
    if weights.layout == "paddle":
        return dict(weights.arrays)
    linear = linear_weights(model)
    converted = {}
    for found, array in weights.arrays.items():
        name = _paddle_name(found)
        if name in converted:
            raise UserError(f"{weights.path} holds {printable(name)} twice, in PyTorch's and in Paddle's spelling")
        converted[name] = array.T if name in linear and array.ndim == 2 else array
    return converted


def _paddle_name(name: str) -> str:
    stem, dot, last = name.rpartition(".")
    return stem + RENAMED.get(dot + last, dot + last)


def _fit_to(weights: Weights, model: paddle.nn.Layer) -> Weights:
    """Return the weights without a wrapper's prefix, and with a layout: that which fits, if the file does not tell."""
    targets = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = _wrapper_prefix([name for name, array in weights.arrays.items() if not _is_table(name, array)], targets)
    if prefix:
        arrays = {name.removeprefix(prefix): array for name, array in weights.arrays.items()}
        if len(arrays) < len(weights.arrays):
            raise UserError(f"{printable(weights.path, 300)} holds a name twice, with {printable(prefix)} and without")
        weights = replace(weights, arrays=arrays, prefix=prefix)
    if weights.layout is None:
        weights = replace(weights, layout=_layout_by_shapes(weights, {n: targets[n] for n in linear_weights(model)}))
    return weights


def _wrapper_prefix(names: list[str], targets: dict[str, tuple[int, ...]]) -> str:
    """Return the shortest prefix of all names (``module.``, Lightning's ``model.``, Paddle's ``_layers.``) without
    which some are in ``targets``; none where some are as they are, or none ever is."""
    parts = names[0].split(".")[:-1] if names else []
    for count in range(min(len(parts), MAX_PREFIX) + 1):
        prefix = "".join(f"{part}." for part in parts[:count])
        if not all(name.startswith(prefix) for name in names):
            break
        if any(_paddle_name(name.removeprefix(prefix)) in targets for name in names):
            return prefix
    return ""


def _layout_by_shapes(weights: Weights, expected: dict[str, tuple[int, ...]]) -> str:
    """Return the layout in which more sides of the fully connected weights fit ``expected``, ``[in, out]``."""
    pairs = [(weights.arrays[name].shape, shape) for name, shape in expected.items()
             if name in weights.arrays and weights.arrays[name].ndim == 2]
    as_paddle = sum((a == rows) + (b == columns) for (a, b), (rows, columns) in pairs)
    as_torch = sum((b == rows) + (a == columns) for (a, b), (rows, columns) in pairs)
    if as_paddle == as_torch > 0 and weights.kind != "Paddle":
        raise UserError(f"{printable(weights.path, 300)} does not tell whether its fully connected weights are "
                        "[in, out] (Paddle) or [out, in] (PyTorch), and their shapes fit both: save it with the "
                        "metadata {'format': 'paddle'} or {'format': 'pt'}")
    return "paddle" if as_paddle > as_torch or (weights.kind == "Paddle" and as_paddle == as_torch) else "torch"


def load_weights(
    model: paddle.nn.Layer,
    path: str | os.PathLike,
    *,
    num_classes_mismatch: str = "refuse",
    ema: bool = False,
) -> LoadReport:
    """Load all of a file into `model`, or raise UserError with what does not fit and change nothing.

    Every name of the model's state dict must be in the file with its shape, and the file must hold no other but
    integer tables and counters, which are ignored. Where shapes differ, the model's
    ``resize_weights(name, array, shape) -> array | None``, if it has one, may resample float32 arrays of as many axes
    (position tables, filters). With ``num_classes_mismatch="fresh_head"`` a classifier for another number of classes
    than ``model.num_classes`` is left as initialised. `ema` loads the averaged weights of a training checkpoint.
    """
    if num_classes_mismatch not in ("refuse", "fresh_head"):
        raise ValueError(f"num_classes_mismatch is refuse or fresh_head, not {num_classes_mismatch!r}")
    weights = _fit_to(read_weights(path, ema), model)
    report = LoadReport(weights.path, weights.kind, weights.layout, weights.nested_under, weights.prefix)
    state = convert_state(weights, model)
    targets = model.state_dict()
    report.ignored = [name for name in state if name not in targets and _is_table(name, state[name])]
    unexpected = [name for name in state if name not in targets and not _is_table(name, state[name])]
    missing = [name for name in targets if name not in state]
    wrong = {}
    for name in targets:
        if name in state:
            try:
                fitted = _fit(model, name, state[name], tuple(targets[name].shape))
            except UserError as error:
                raise UserError(f"{printable(weights.path, 300)} does not fit {type(model).__name__}: "
                                f"{error}") from None
            if fitted is None:
                wrong[name] = state[name]
            elif fitted is not state[name]:
                report.resampled.append((name, state[name].shape, fitted.shape))
                state[name] = fitted
    head, classes = _head(model, wrong)
    if head and num_classes_mismatch == "fresh_head":
        report.fresh = head
        wrong = {name: array for name, array in wrong.items() if name not in head}
    problems = [
        _listed("missing", missing),
        _listed("not in the model", unexpected),
        _listed("of another shape", [f"{name}: found {list(array.shape)}, expected {list(targets[name].shape)}"
                                     for name, array in wrong.items()]),
    ]
    if any(problems):
        if head and num_classes_mismatch == "refuse":
            problems.append(f"its classifier has {classes} classes where the model was built for {model.num_classes} "
                            f"(NUM_CLASSES of a config, --num-classes of tools/convert.py: {classes})")
        raise UserError(f"{printable(weights.path, 300)} does not fit {type(model).__name__}: "
                        f"{'; '.join(filter(None, problems))}")
    report.loaded = [name for name in targets if name not in report.fresh]
    _set_values(targets, {name: state[name] for name in report.loaded}, weights.path)
    return report


def _fit(model: paddle.nn.Layer, name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the array if it has the shape, or what the model makes of it; None where it cannot fit."""
    if array.shape == shape:
        return array
    if not hasattr(model, "resize_weights") or array.ndim != len(shape) or not array.size or array.dtype.kind != "f":
        return None
    resized = model.resize_weights(name, np.ascontiguousarray(array, dtype="float32"), shape)
    return resized if resized is not None and resized.shape == shape else None


def linear_weights(model: paddle.nn.Layer) -> set[str]:
    """Return the names of the weights that PyTorch has transposed: those of fully connected layers."""
    import paddle

    layers = model.named_sublayers(include_self=True)
    return {f"{name}.weight".lstrip(".") for name, layer in layers if isinstance(layer, paddle.nn.Linear)}


def _is_table(name: str, array: np.ndarray) -> bool:
    return name.endswith("num_batches_tracked") or array.dtype.kind in "iub"


def _head(model: paddle.nn.Layer, wrong: dict[str, np.ndarray]) -> tuple[list[str], int]:
    """Return the names that differ from the model only in the number of classes, and the file's number.

    These are the arrays whose outputs are ``model.num_classes`` in the model and one other number in the file.
    """
    linear, targets = linear_weights(model), model.state_dict()
    heads: dict[str, int] = {}
    for name, array in wrong.items():
        found, expected = list(array.shape), list(targets[name].shape)
        axis = 1 if name in linear else 0
        if len(found) == len(expected) > axis and expected[axis] == getattr(model, "num_classes", None):
            classes, found[axis] = found[axis], expected[axis]
            if found == expected:
                heads[name] = classes
    if len(set(heads.values())) != 1:
        return [], 0
    return list(heads), next(iter(heads.values()))


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what} ({', '.join(printable(name, 200) for name in names[:SHOWN])}{rest})"


def _set_values(targets: dict[str, paddle.Tensor], state: dict[str, np.ndarray], path: Path) -> None:
    import paddle

    values = {}
    for name, array in state.items():
        kind = str(targets[name].dtype).removeprefix("paddle.")
        floats = kind in ("bfloat16", "float16", "float32", "float64")
        if (array.dtype.kind == "f") != floats:
            raise UserError(f"{path} holds {printable(name)} as {array.dtype}, and {kind} was expected")
        with np.errstate(over="ignore"):
            values[name] = np.ascontiguousarray(array, dtype="float32" if kind == "bfloat16" else kind)
        if floats and not np.isfinite(values[name]).all():
            raise UserError(f"{path} holds {printable(name)} with values that are not finite: the file is damaged, or "
                            "the training had diverged")
    for name, array in values.items():
        targets[name].set_value(paddle.to_tensor(array.reshape(state[name].shape)).astype(targets[name].dtype))


def check_suffix(path: str | os.PathLike) -> Path:
    """Return the path, with ``~`` expanded; raises UserError if weights cannot be written under such a name."""
    path = Path(os.path.expanduser(path))
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}, expected {' or '.join(SUFFIXES)}")
    return path


def save_weights(path: str | os.PathLike, state: dict[str, paddle.Tensor | np.ndarray]) -> None:
    """Write a state dict atomically: ``.pdparams`` (as ``paddle.save``) or ``.safetensors`` by the suffix.

    The metadata of a safetensors file are ``{"format": "paddle"}``, its layout. Raises UserError for another suffix,
    and where the file cannot be written.
    """
    path = check_suffix(path)
    write_atomically(path, lambda partial: _write(partial, path.suffix, state))


def _write(path: Path, suffix: str, state: dict[str, paddle.Tensor | np.ndarray]) -> None:
    import paddle
    from safetensors.numpy import save

    if suffix == ".pdparams":
        tensors = {name: paddle.to_tensor(value) if isinstance(value, np.ndarray) else value
                   for name, value in state.items()}
        paddle.save(tensors, str(path))
    else:
        path.write_bytes(save({name: _array(value) for name, value in state.items()}, {"format": "paddle"}))


def _array(value: paddle.Tensor | np.ndarray) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        value = (value.astype("float32") if "bfloat16" in str(value.dtype) else value).numpy()
    return np.ascontiguousarray(value).reshape(value.shape)
