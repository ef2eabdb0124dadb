"""The table of explanation methods, and one call for all of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from analysis.explain import attributions
from analysis.explain.image_model import ImageModel
from analysis.explain.lime import SAMPLES, explain_lime, superpixels
from errors import UserError, nearest
from utils.fileio import write_atomically


@dataclass(frozen=True)
class Method:
    """A method's title, the unit of its maps, and whether these have a sign; ``function`` is None for LIME."""

    title: str
    unit: str
    signed: bool
    function: Callable[..., np.ndarray] | None = None
    uses_layer: bool = False


METHODS: dict[str, Method] = {
    "lime": Method("LIME", "change of probability, a superpixel", True),
    "gradcam": Method("Grad-CAM", "weighted activation", False, attributions.grad_cam, uses_layer=True),
    "scorecam": Method("Score-CAM", "weighted activation", False, attributions.score_cam, uses_layer=True),
    "ig": Method("integrated gradients", "share of probability, a pixel", True, attributions.integrated_gradients),
    "smoothgrad": Method("SmoothGrad", "|gradient of probability|", False, attributions.smooth_grad),
    "occlusion": Method("occlusion", "drop of probability", True, attributions.occlusion),
}


@dataclass(frozen=True)
class Explanation:
    """One image, uint8 ``[H, W, 3]`` at the network's size, explained by one method.

    ``classes`` are the predicted class and, where known and different, the true one (``label``). ``maps``
    ``[classes, H, W]`` are in the method's unit; ``arrays`` is what the method gives besides.
    """

    method: str
    image: np.ndarray
    classes: tuple[int, ...]
    maps: np.ndarray
    probabilities: np.ndarray  # [num_classes]
    label: int | None = None
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        """Write all of it as ``.npz``, atomically: the fields' names, and those of ``arrays``; label -1 for none."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, image=self.image, classes=self.classes, maps=self.maps.astype(np.float32),
                            probabilities=self.probabilities, label=-1 if self.label is None else self.label,
                            **self.arrays)
        write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))
        return path


def method_names(method: str) -> tuple[str, ...]:
    """Return the methods that a name stands for: itself, or every one for ``all``; UserError for an unknown name."""
    if method == "all":
        return tuple(METHODS)
    if method not in METHODS:
        raise UserError(f"--method {method!r} is unknown: expected all or one of {', '.join(METHODS)}"
                        f"{nearest(method, METHODS)}")
    return (method,)


def explain(model: ImageModel, image: np.ndarray, method: str = "lime", label: int | None = None, *,
            num_samples: int = SAMPLES, segments: np.ndarray | None = None, layer: str = "",
            seed: int = 0) -> Explanation:
    """Explain a prepared image by one of ``METHODS``, for the predicted class and the true one (``label``, if known).

    LIME alone uses ``num_samples``, ``segments`` and ``seed``; the CAMs alone ``layer``.
    """
    (name,) = method_names(method)
    chosen, probabilities = METHODS[name], model.probabilities_of(image)
    predicted = int(probabilities.argmax())
    classes = (predicted,) if label is None or label == predicted else (predicted, int(label))
    if name == "lime":
        segments = superpixels(image) if segments is None else segments
        arrays = explain_lime(model, image, classes, num_samples, segments, seed)
        maps = arrays["weights"][:, arrays["segments"]]
    elif chosen.uses_layer:
        arrays = {"layer": np.array(layer or attributions.default_layer(model))}
        maps = chosen.function(model, image, classes, str(arrays["layer"]))
    else:
        arrays, maps = {}, chosen.function(model, image, classes)
    return Explanation(name, image, classes, maps, probabilities, label, arrays)
