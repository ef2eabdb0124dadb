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
    """What a network does on a split: ``losses`` float64 ``[N]``, ``logits`` float32 ``[N, K]``, ``labels`` ``[N]``."""

    losses: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    seconds: float

    @property
    def images(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @property
    def loss(self) -> float:
        """Return the mean loss."""
        return float(self.losses.mean())

    @property
    def top1(self) -> float:
        """Return the share of images whose label has the largest logit."""
        return float((self.logits.argmax(1) == self.labels).mean())

    @property
    def top5(self) -> float | None:
        """Return the share of images whose label is among the five largest logits; None below five classes."""
        if self.logits.shape[1] < 5:
            return None
        own = self.logits[np.arange(self.images), self.labels][:, None]
        return float(((~(self.logits <= own)).sum(1) < 5).mean())  # a NaN logit counts as larger

    @property
    def per_class(self) -> list[float | None]:
        """Return the accuracy of each class, None where it has no images."""
        counts = np.asarray(self.confusion)
        return [float(row[k] / row.sum()) if row.sum() else None for k, row in enumerate(counts)]

    @property
    def confusion(self) -> list[list[int]]:
        """Return ``confusion[label][prediction]``, counts of images."""
        counts = np.zeros(2 * [self.logits.shape[1]], np.int64)
        np.add.at(counts, (self.labels, self.logits.argmax(1)), 1)
        return counts.tolist()

    @property
    def images_per_second(self) -> float:
        """Return the rate, data loading included."""
        return self.images / self.seconds

    def figures(self) -> dict[str, Any]:
        """Return the metrics that depend on the weights alone."""
        return {"images": self.images, "loss": self.loss, "top1": self.top1, "top5": self.top5}


@paddle.no_grad()
def evaluate(model: nn.Layer, batches: EvalLoader, loss_function: LabelSmoothingCrossEntropy,
             advance: Callable[[int], None] = lambda images: None,
             observe: Callable[[np.ndarray, np.ndarray, np.ndarray | None], None] = lambda *found: None) -> Evaluation:
    """Evaluate ``model`` on batches of images ``[B, 3, H, W]`` and labels ``[B]``, in float32.

    ``advance`` gets the number of images after each batch, equally often in every process. Results of all processes
    are gathered image by image. ``observe`` gets each batch's losses, correct images and images correct within five.
    """
    model.eval()
    started = time.perf_counter()
    found: list[np.ndarray] = []  # of each batch [B, 2 + classes]: loss, label, logits
    for images, labels in batches:
        logits = model(paddle.to_tensor(images))
        losses = loss_function(logits, paddle.to_tensor(labels), reduction="none").numpy().astype(np.float64)
        scores = logits.astype("float32").numpy()
        own = scores[np.arange(len(labels)), labels][:, None]
        found.append(np.concatenate([losses[:, None], labels[:, None], scores], axis=1))
        observe(losses, scores.argmax(1) == labels, (~(scores <= own)).sum(1) < 5 if scores.shape[1] >= 5 else None)
        advance(len(labels))
    if distributed.world_size() > 1:
        if len(found) < len(batches):
            advance(0)
        columns = max(distributed.all_gather_object(found[0].shape[1] if found else 2))
        part = np.concatenate([np.zeros((0, columns)), *found])
        rows = distributed.gather(part.T, batches.positions(), len(batches.dataset)).T
    else:
        rows = np.concatenate(found)
    return Evaluation(rows[:, 0], rows[:, 2:].astype(np.float32), rows[:, 1].astype(np.int64),
                      time.perf_counter() - started)
