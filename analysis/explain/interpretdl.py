"""InterpretDL 0.8.0 on today's packages; none of its modules is changed. What its LIME needs:

- ``from IPython.core.display import display``: IPython 9 has it in ``IPython.display``; it is lent during the import.
- ``paddle.fluid``: modules that nothing here uses need it; InterpretDL's message that Paddle is missing is hidden.
- ``Ridge(normalize=True)``: gone since scikit-learn 1.2. LIME's alpha is 0, so it is ``LinearRegression``.
- ``device="gpu:0"`` for the whole process: the present device is passed instead.
- ImageNet's mean and std, then softmax: ``FromImageNet`` undoes the normalisation and applies the config's.
- one forward pass for each perturbed image: ``forward`` computes them in batches, from the same random numbers.
"""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import paddle
from paddle import nn

from errors import UserError

INSTALL = "python -m pip install -r requirements-explain.txt && python -m pip install --no-deps interpretdl==0.8.0"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Forward = Callable[[np.ndarray], np.ndarray]
"""From masks ``[N, regions]`` of an image to class probabilities ``[N, num_classes]``."""


def load_interpretdl() -> ModuleType:
    """Import InterpretDL; raises UserError with the command that installs it where it or its packages are missing."""
    try:
        from IPython import display
        from IPython.core import display as old_module

        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with mock.patch.object(old_module, "display", display.display, create=True):
                return importlib.import_module("interpretdl")
    except ImportError as error:
        raise UserError(f"LIME needs InterpretDL 0.8.0 and its packages ({error}): {INSTALL}") from error


class FromImageNet(nn.Layer):
    """A network behind InterpretDL's normalisation: ``[N, 3, H, W]`` by ImageNet's mean and std to logits."""

    def __init__(self, network: nn.Layer, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        scale = np.float64(IMAGENET_STD) / np.float64(std)
        shift = (np.float64(IMAGENET_MEAN) - np.float64(mean)) / np.float64(std)
        self.scale, self.shift = (paddle.to_tensor(v.astype(np.float32).reshape(3, 1, 1)) for v in (scale, shift))

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        return self.network(images.astype("float32") * self.scale + self.shift)


def lime_interpreter(network: nn.Layer, segments: np.ndarray, forward: Forward | None, seed: int) -> Any:
    """Return InterpretDL's ``LIMECVInterpreter`` for a network that takes its normalisation (``FromImageNet``).

    ``segments`` ``[H, W]`` numbers the superpixels from 0. ``forward`` computes the perturbations; None leaves them to
    InterpretDL. ``lime_base.intercepts`` has the intercept of each class.
    """
    interpretdl = load_interpretdl()
    from interpretdl.interpreter._lime_base import LimeBase
    from sklearn.linear_model import LinearRegression
    from sklearn.metrics import pairwise_distances

    class AdaptedLimeBase(LimeBase):
        """InterpretDL's LIME with least squares, and with ``forward`` in place of its loop over perturbations."""

        def __init__(self) -> None:
            super().__init__(random_state=seed)
            self.segments = segments
            self.intercepts: dict[int, float] = {}

        def _fitting_data(self, data: np.ndarray, labels: np.ndarray, distances: np.ndarray, label: int,
                          ordered: bool = True, model_regressor: Any = None) -> Any:
            fitted = super()._fitting_data(data, labels, distances, label, ordered, LinearRegression())
            self.intercepts[int(label)] = float(fitted[0])
            return fitted

        def _data_labels(self, image: np.ndarray, segments: np.ndarray, classifier_fn: Any, num_samples: int,
                         batch_size: int, hide_color: Any, distance_metric: str) -> Any:
            if forward is None:
                return super()._data_labels(image, segments, classifier_fn, num_samples, batch_size, hide_color,
                                            distance_metric)
            count = int(segments.max()) + 1
            data = self.random_state.randint(0, 2, num_samples * count).reshape(num_samples, count)
            data[0, :] = 1
            return data, forward(data), pairwise_distances(data, data[:1], metric=distance_metric).ravel()

    with redirect_stdout(io.StringIO()):
        interpreter = interpretdl.LIMECVInterpreter(network, device=paddle.device.get_device())
    interpreter.lime_base = AdaptedLimeBase()
    return interpreter
