"""All figures of a network on a split in one pass: accuracy and loss as `engine/evaluate.py` has them, calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from yacs.config import CfgNode

from analysis.error_analysis import calibration_of
from datasets.loader import EvalLoader
from datasets.origin import origin, pixels_sha256
from engine.evaluate import Evaluation, evaluate
from engine.losses import LabelSmoothingCrossEntropy


@dataclass(frozen=True)
class Assessment:
    """What a network does on a split.

    ``calibration`` is that of `error_analysis.calibration`, None where a probability is no number. ``data`` says
    what the images are, ``pixels`` which (see ``datasets/origin.py``). ``predicted`` int64 ``[N]``.
    """

    evaluation: Evaluation
    calibration: dict[str, Any] | None
    data: str
    pixels: str | None
    predicted: np.ndarray

    def figures(self) -> dict[str, Any]:
        """Return what a file of results keeps."""
        found = {"data": self.data, "pixels_sha256": self.pixels, **self.evaluation.figures()}
        if self.calibration:
            found |= {key: self.calibration[key] for key in ("ece", "mce", "brier", "negative_log_likelihood")}
        return found


def assess(config: CfgNode, model: nn.Layer, loader: EvalLoader, advance: Callable[[int], None] = lambda images: None,
           observe: Callable[..., None] = lambda *found: None) -> Assessment:
    """Evaluate a network on the batches of a split; ``advance`` and ``observe`` are those of ``evaluate``."""
    logits: list[np.ndarray] = []  # of the present batch
    found: list[np.ndarray] = []  # of each image: confidence, probability of its class, sum of squares, prediction
    labels = loader.dataset.labels

    def keep(layer: nn.Layer, inputs: Any, outputs: paddle.Tensor) -> None:
        logits.append(F.softmax(outputs.astype("float64"), axis=-1).numpy())

    def take(losses: np.ndarray, right: np.ndarray, within: np.ndarray | None) -> None:
        probabilities = logits.pop()
        start = sum(part.shape[1] for part in found)
        own = probabilities[np.arange(len(losses)), labels[start : start + len(losses)]]
        found.append(np.stack([probabilities.max(1), own, (probabilities**2).sum(1), probabilities.argmax(1)]))
        observe(losses, right, within)

    hook = model.register_forward_post_hook(keep)
    try:
        result = evaluate(model, loader, LabelSmoothingCrossEntropy(config.LOSS.LABEL_SMOOTHING), advance, take)
    finally:
        hook.remove()
    confidence, own, squares, predicted = np.concatenate(found, axis=1)
    figures = None
    if np.isfinite(confidence).all():
        figures = calibration_of(confidence, predicted == labels, own, squares)
    return Assessment(result, figures, origin(config.DATA), pixels_sha256(loader.dataset), predicted.astype(np.int64))


def beside_recorded(found: Assessment, recorded: Sequence[Mapping[str, Any]]) -> str:
    """Return how top-1 accuracy compares with what a released checkpoint's ``results.json`` has under ``test``."""
    for row in recorded:
        if row["pixels_sha256"] == found.pixels:
            images = round((found.evaluation.top1 - row["top1"]) * row["images"])
            told = "the same here" if not images else f"{abs(images)} images {'fewer' if images < 0 else 'more'} here"
            return f"released with {row['top1']:.2%} on these images ({row['data']}): {told}"
    told = "; ".join(f"{row['top1']:.2%} on {row['data']}, {row['images']:,} images" for row in recorded)
    return f"released with {told}: other images than these"
