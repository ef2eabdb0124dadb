"""InterpretDL 0.8.0 on today's packages: what it needs changed, and nothing else.

InterpretDL asks for scikit-learn 0.24 or older, IPython before 9 and Paddle before 2.5. What stands in the way of its
LIME, and what is done about it here:

- ``from IPython.core.display import display``: IPython 9 has it in ``IPython.display`` alone. The name is lent to the
  module for the length of the import, and taken away again.
- ``paddle.fluid`` is no more: the import of what needs it (NormLIME, GLIME and training dynamics, which nothing here
  uses) fails, and InterpretDL prints that Paddle is missing. That one message is not shown.
- ``Ridge(normalize=True)`` is no more since scikit-learn 1.2: ``NormalizedRidge`` is the same estimator.
- ``device="gpu:0"`` by default, and set for the whole process: Paddle's present device is passed.
- images are normalised by ImageNet's mean and deviation, and logits go through a softmax: ``FromImageNet`` gives the
  network what its config says, and returns logits.
- perturbed images are made one by one, and equal ones computed again and again: ``AdaptedLimeBase`` takes the same
  random numbers to the same weights, but makes images in batches and computes equal ones once.

No module of InterpretDL is changed: the adaptation stands in subclasses and in one argument.
"""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from types import ModuleType
from typing import Any

import numpy as np
import paddle
from paddle import nn

from errors import UserError

INSTALL = "python -m pip install -r requirements-explain.txt && python -m pip install --no-deps interpretdl==0.8.0"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Forward = Callable[[np.ndarray], np.ndarray]
"""Class probabilities ``[N, num_classes]`` of an image's perturbations, given as masks ``[N, regions]``."""


def load_interpretdl() -> ModuleType:
    """Import InterpretDL; raises UserError with the command that installs it where it or its packages are missing."""
    try:
        with _display_in_its_old_place(), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("interpretdl")
    except ImportError as error:
        raise UserError(f"LIME needs InterpretDL 0.8.0 and its packages ({error}): {INSTALL}") from error


@contextmanager
def _display_in_its_old_place() -> Iterator[None]:
    """Let ``from IPython.core.display import display`` succeed within the block."""
    from IPython import display as new_place

    old_place = importlib.import_module("IPython.core.display")
    lent = "display" not in vars(old_place)
    if lent:
        old_place.display = new_place.display
    try:
        yield
    finally:
        if lent:
            del old_place.display


class NormalizedRidge:
    """scikit-learn's former ``Ridge(alpha, fit_intercept=True, normalize=True)``.

    Columns are centred by their weighted mean and divided by the weighted norm of what remains (1 for a constant
    column), and the coefficients scaled back: scikit-learn 1.0 and 1.1. Versions up to 0.24 took the unweighted norm;
    with alpha 0, LIME's, both are the weighted least squares solution wherever that is unique.
    """

    def __init__(self, alpha: float = 0.0) -> None:
        self.alpha = alpha

    def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None = None) -> NormalizedRidge:
        """Fit samples ``[N, K]`` to values ``[N]``, each of weight ``sample_weight`` (1 where None)."""
        from sklearn.linear_model import Ridge

        X, y = np.asarray(X, np.float64), np.asarray(y, np.float64)
        weights = np.ones(len(X)) if sample_weight is None else np.asarray(sample_weight, np.float64)
        mean, offset = np.average(X, axis=0, weights=weights), np.average(y, weights=weights)
        centred = X - mean
        norm = np.sqrt((weights[:, None] * centred**2).sum(0))
        smallest = 10 * np.finfo(np.float64).eps * np.sqrt(weights.sum()) * np.maximum(np.abs(mean), 1)
        centred[:, norm <= smallest] = 0.0  # what rounding leaves of a constant column is not data
        norm[norm <= smallest] = 1.0
        ridge = Ridge(alpha=self.alpha, fit_intercept=False).fit(centred / norm, y - offset, sample_weight=weights)
        self.coef_ = ridge.coef_ / norm
        self.intercept_ = offset - mean @ self.coef_
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Return the values ``[N]`` of samples ``[N, K]``."""
        return np.asarray(X) @ self.coef_ + self.intercept_

    def score(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None = None) -> float:
        """Return R², the weighted share of the variance of ``y`` ``[N]`` that the prediction explains."""
        from sklearn.metrics import r2_score

        return float(r2_score(y, self.predict(X), sample_weight=sample_weight))


class FromImageNet(nn.Layer):
    """A network behind InterpretDL's normalisation: ``[N, 3, H, W]`` by ImageNet's mean and deviation to logits."""

    def __init__(self, model: nn.Layer, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        scale = np.float64(IMAGENET_STD) / np.float64(std)
        shift = (np.float64(IMAGENET_MEAN) - np.float64(mean)) / np.float64(std)
        self.scale, self.shift = (paddle.to_tensor(v.astype(np.float32).reshape(3, 1, 1)) for v in (scale, shift))

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        return self.model(images.astype("float32") * self.scale + self.shift)


def lime_interpreter(model: nn.Layer, segments: np.ndarray, forward: Forward | None, seed: int) -> Any:
    """Return InterpretDL's ``LIMECVInterpreter`` for a network that takes its normalisation (``FromImageNet``).

    ``segments`` ``[H, W]`` are the superpixels, numbered from 0. ``forward`` computes the perturbations; None leaves
    them to InterpretDL. The intercept of each class is then in ``lime_base.intercepts``.
    """
    interpretdl = load_interpretdl()
    from interpretdl.interpreter._lime_base import LimeBase

    class AdaptedLimeBase(LimeBase):
        """InterpretDL's LIME with the former Ridge, and with ``forward`` in place of its loop over perturbations."""

        def __init__(self) -> None:
            super().__init__(random_state=seed)
            self.segments = segments
            self.intercepts: dict[int, float] = {}

        def _fitting_data(self, neighborhood_data: np.ndarray, neighborhood_labels: np.ndarray, distances: np.ndarray,
                          label: int, ordered: bool = True, model_regressor: Any = None) -> Any:
            fitted = super()._fitting_data(neighborhood_data, neighborhood_labels, distances, label, ordered,
                                           model_regressor or NormalizedRidge())
            self.intercepts[int(label)] = float(fitted[0])
            return fitted

        def _data_labels(self, image: np.ndarray, segments: np.ndarray, classifier_fn: Any, num_samples: int,
                         batch_size: int, hide_color: Any, distance_metric: str) -> Any:
            if forward is None:
                return super()._data_labels(image, segments, classifier_fn, num_samples, batch_size, hide_color,
                                            distance_metric)
            from sklearn.metrics import pairwise_distances

            count = int(segments.max()) + 1
            data = self.random_state.randint(0, 2, num_samples * count).reshape(num_samples, count)
            data[0, :] = 1
            distances = pairwise_distances(data, data[:1], metric=distance_metric).ravel()
            return data, forward(data), distances

    with redirect_stdout(io.StringIO()):
        interpreter = interpretdl.LIMECVInterpreter(model, device=paddle.device.get_device())
    interpreter.lime_base = AdaptedLimeBase()
    return interpreter
