"""One pass over a dataset: exact means over images, per class and in all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import nn

from datasets.loader import EvalLoader
from engine import distributed
from engine.losses import LabelSmoothingCrossEntropy


@dataclass(frozen=True)
class Evaluation:
    """The figures of one evaluation; shares are of 1, ``confusion[label][prediction]`` counts images."""

    images: int
    loss: float
    top1: float
    top5: float | None
    per_class: list[float | None]
    confusion: list[list[int]]
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Return the rate, data loading included."""
        return self.images / self.seconds

    def figures(self) -> dict[str, Any]:
        """Return what is a property of the weights alone, without the time it took."""
        return {"images": self.images, "loss": self.loss, "top1": self.top1, "top5": self.top5}


@paddle.no_grad()
def evaluate(
    model: nn.Layer,
    batches: EvalLoader,
    loss_function: LabelSmoothingCrossEntropy,
    advance: Callable[[int], None] = lambda images: None,
    observe: Callable[[np.ndarray, np.ndarray, np.ndarray | None], None] = lambda *found: None,
) -> Evaluation:
    """Evaluate ``model`` on batches of images ``[B, 3, H, W]`` and labels ``[B]`` (in one process, any list of them).

    It computes in float32 whatever the precision of the training, so that the figures are those of the weights.

    ``advance`` is told the number of images after each batch, equally often in every process that takes part. What
    each has found comes together image by image, so that the figures are those of one process. ``observe`` is told
    what a batch of this process found of each image: the losses, which are classified correctly, and which within
    five guesses (None with fewer than five classes, as then ``top5``).
    """
    model.eval()
    started = time.perf_counter()
    found = [np.zeros((4, 0))]  # of each image: loss, label, prediction, how many classes stand before its own
    classes = 0
    for images, labels in batches:
        target = paddle.to_tensor(labels)
        logits = model(paddle.to_tensor(images))
        classes = logits.shape[1]
        losses = loss_function(logits, target, reduction="none").numpy().astype(np.float64)
        scores = logits.astype("float32").numpy()
        own = scores[np.arange(len(labels)), labels][:, None]
        before = (~(scores <= own)).sum(1)  # a logit that is nan comes last
        found.append(np.stack([losses, labels, scores.argmax(1), before]))
        observe(losses, scores.argmax(1) == labels, before < 5 if classes >= 5 else None)
        advance(len(labels))
    figures = np.concatenate(found, axis=1)
    if distributed.world_size() > 1:
        if len(found) <= len(batches):
            advance(0)
        classes = max(distributed.all_gather_object(classes))
        figures = distributed.gather(figures, batches.positions(), len(batches.dataset))
    losses, (labels, predictions, before) = figures[0], figures[1:].astype(np.int64)
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, predictions), 1)
    counts = confusion.sum(1)
    return Evaluation(
        images=len(labels),
        loss=float(losses.mean()),
        top1=float((predictions == labels).mean()),
        top5=float((before < 5).mean()) if classes >= 5 else None,
        per_class=[float(confusion[k, k] / counts[k]) if counts[k] else None for k in range(classes)],
        confusion=confusion.tolist(),
        seconds=time.perf_counter() - started,
    )
