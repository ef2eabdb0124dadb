"""One pass over a dataset: exact means over images, per class and in all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import nn

from engine.losses import LabelSmoothingCrossEntropy
from engine.runtime import autocast


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
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    loss_function: LabelSmoothingCrossEntropy,
    precision: str = "float32",
    advance: Callable[[int], None] = lambda images: None,
    observe: Callable[[np.ndarray, np.ndarray, np.ndarray | None], None] = lambda *found: None,
) -> Evaluation:
    """Evaluate ``model`` on batches of images ``[B, 3, H, W]`` and labels ``[B]``.

    ``advance`` is told the number of images after each batch, ``observe`` what it found of each: the losses, which
    are classified correctly, and which within five guesses (None with fewer than five classes, as then ``top5``).
    """
    model.eval()
    started = time.perf_counter()
    losses, ranks, labels_seen, predictions = [], [], [], []
    classes = 0
    for images, labels in batches:
        target = paddle.to_tensor(labels)
        with autocast(precision):
            logits = model(paddle.to_tensor(images))
        classes = logits.shape[1]
        losses.append(loss_function(logits, target, reduction="none").numpy().astype(np.float64))
        scores = logits.astype("float32").numpy()
        own = scores[np.arange(len(labels)), labels][:, None]
        ranks.append((~(scores <= own)).sum(1))  # a logit that is nan ranks last
        predictions.append(scores.argmax(1))
        labels_seen.append(np.asarray(labels))
        observe(losses[-1], predictions[-1] == labels, ranks[-1] < 5 if classes >= 5 else None)
        advance(len(labels))
    labels, predictions, rank = (np.concatenate(part) for part in (labels_seen, predictions, ranks))
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, predictions), 1)
    counts = confusion.sum(1)
    return Evaluation(
        images=len(labels),
        loss=float(np.concatenate(losses).mean()),
        top1=float((predictions == labels).mean()),
        top5=float((rank < 5).mean()) if classes >= 5 else None,
        per_class=[float(confusion[k, k] / counts[k]) if counts[k] else None for k in range(classes)],
        confusion=confusion.tolist(),
        seconds=time.perf_counter() - started,
    )
