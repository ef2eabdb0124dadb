"""Explain what a network sees in an image: one entry for every method.

In a notebook::

    subject = Subject(config, load_model(config, run)[0])
    image = subject.prepare(dataset.images[3])
    found = explain(subject, image, "lime", label=dataset.labels[3])
    draw_explanations(subject, [[found]], ["test image 3"], Path("lime.png"))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.explain import attributions
from analysis.explain.explanation import Explanation
from analysis.explain.lime import SAMPLES, explain_lime, explained_classes
from analysis.explain.subject import Advance, Subject, ignore
from errors import UserError, nearest


@dataclass(frozen=True)
class Method:
    """How a method is called, what a value of its maps is, and whether that has a sign."""

    title: str
    unit: str
    signed: bool
    function: Callable[..., np.ndarray] | None = None  # None: LIME, which gives more than maps
    uses_layer: bool = False


METHODS: dict[str, Method] = {
    "lime": Method("LIME", "change of probability, a superpixel", True),
    "gradcam": Method("Grad-CAM", "weighted activation", False, attributions.grad_cam, uses_layer=True),
    "scorecam": Method("Score-CAM", "weighted activation", False, attributions.score_cam, uses_layer=True),
    "ig": Method("integrated gradients", "share of probability, a pixel", True, attributions.integrated_gradients),
    "smoothgrad": Method("SmoothGrad", "|gradient of probability|", False, attributions.smooth_grad),
    "occlusion": Method("occlusion", "drop of probability", True, attributions.occlusion),
}


def method_names(method: str) -> tuple[str, ...]:
    """Return the methods that a name stands for: itself, or every one for ``all``; UserError for an unknown name."""
    if method == "all":
        return tuple(METHODS)
    if method not in METHODS:
        raise UserError(f"--method {method!r} is unknown: expected all or one of {', '.join(METHODS)}"
                        f"{nearest(method, METHODS)}")
    return (method,)


def explain(subject: Subject, image: np.ndarray, method: str = "lime", label: int | None = None, *,
            num_samples: int = SAMPLES, segments: np.ndarray | None = None, layer: str = "", seed: int = 0,
            advance: Advance = ignore) -> Explanation:
    """Explain a prepared image (``Subject.prepare``) by one of ``METHODS``, for the predicted and the true class.

    ``label`` is the true class where it is known. LIME alone takes ``num_samples``, ``segments`` and ``seed``, the
    CAMs alone ``layer``. ``advance`` is told how many images the network has seen.
    """
    (name,) = method_names(method)
    chosen = METHODS[name]
    if chosen.function is None:
        return explain_lime(subject, image, label, num_samples, segments, seed, advance)
    probabilities = subject.probabilities_of(image)
    classes = explained_classes(probabilities, label)
    if chosen.uses_layer and not layer:
        layer = attributions.default_layer(subject, image)
    maps = chosen.function(subject, image, classes, layer, advance)
    arrays = {"layer": np.array(layer)} if chosen.uses_layer else {}
    return Explanation(name, image, classes, maps, probabilities, label, arrays)

