"""One pass over a data set: loss, logits and label of every image, and metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import paddle
from paddle import nn

from datasets.loader import Batch, EvalLoader
from engine import distributed
from engine.losses import LabelSmoothingCrossEntropy


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The outputs of a network for N images and K classes; accuracies are fractions of 1.

    ``losses`` float64 ``[N]``, ``logits`` float32 ``[N, K]``, ``labels`` int64 ``[N]``, in the data set's order.
    """

    losses: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    seconds: float

    @property
    def images(self) -> int:
        """Return N."""
        return len(self.labels)

    @property
    def images_per_second(self) -> float:
        """Return the rate, data loading included."""
        return self.images / self.seconds

    @cached_property
    def predicted(self) -> np.ndarray:
        """Return the most likely class of each image, int64 ``[N]``."""
        return self.logits.argmax(1)

    @property
    def loss(self) -> float:
        """Return the mean loss."""
        return float(self.losses.mean())

    @property
    def top1(self) -> float:
        """Return the accuracy."""
        return float((self.predicted == self.labels).mean())

    @cached_property
    def within_five(self) -> np.ndarray | None:
        """Return which images have their class among the five most likely, bool ``[N]``; None for K < 5."""
        if self.logits.shape[1] < 5:
            return None
        own = self.logits[np.arange(self.images), self.labels][:, None]
        return (~(self.logits <= own)).sum(1) < 5  # a logit that is NaN ranks before its class

    @property
    def top5(self) -> float | None:
        """Return the top-5 accuracy, None with fewer than five classes."""
        return None if self.within_five is None else float(self.within_five.mean())

    @cached_property
    def confusion(self) -> np.ndarray:
        """Return how many images of each true class (row) were predicted as each class (column), int64 ``[K, K]``."""
        counts = np.zeros(2 * [self.logits.shape[1]], np.int64)
        np.add.at(counts, (self.labels, self.predicted), 1)
        return counts

    @property
    def per_class(self) -> list[float | None]:
        """Return the accuracy of each class, None for classes without images."""
        counts = self.confusion.sum(1)
        return [float(self.confusion[k, k] / counts[k]) if counts[k] else None for k in range(len(counts))]

    def figures(self) -> dict[str, Any]:
        """Return the metrics that depend on the weights alone, not on the time."""
        return {"images": self.images, "loss": self.loss, "top1": self.top1, "top5": self.top5}


@paddle.no_grad()
def evaluate(
    model: nn.Layer,
    batches: EvalLoader | Iterable[Batch],
    loss_function: LabelSmoothingCrossEntropy,
    advance: Callable[[int], None] = lambda images: None,
    observe: Callable[[Evaluation], None] = lambda batch: None,
) -> Evaluation:
    """Evaluate ``model`` in float32 on batches of images ``[B, 3, H, W]`` and labels ``[B]``.

    After each batch ``advance`` gets its number of images and ``observe`` its own Evaluation. With several processes
    ``batches`` is an EvalLoader, ``advance`` is called equally often in each of them, and all return the whole.
    """
    model.eval()
    started = time.perf_counter()
    found: list[Evaluation] = []
    for images, labels in batches:
        begun = time.perf_counter()
        logits = model(paddle.to_tensor(images))
        losses = loss_function(logits, paddle.to_tensor(labels), reduction="none").numpy().astype(np.float64)
        batch = Evaluation(losses, logits.astype("float32").numpy(), labels, time.perf_counter() - begun)
        found.append(batch)
        observe(batch)
        advance(len(labels))
    if distributed.world_size() > 1:
        if len(found) < len(batches):
            advance(0)
        return _gather(found, batches, started)
    losses, logits, labels = (np.concatenate([getattr(batch, name) for batch in found])
                              for name in ("losses", "logits", "labels"))
    return Evaluation(losses, logits, labels, time.perf_counter() - started)


def _gather(found: list[Evaluation], batches: EvalLoader, started: float) -> Evaluation:
    """Return the evaluation of all images from the batches of each process; one may have none."""
    classes = max(distributed.all_gather_object(found[0].logits.shape[1] if found else 0))
    parts = [np.zeros((1 + classes, 0))]
    parts += [np.vstack([batch.losses, batch.logits.T]) for batch in found]
    whole = distributed.gather(np.concatenate(parts, axis=1), batches.positions(), len(batches.dataset))
    logits = np.ascontiguousarray(whole[1:].T, dtype=np.float32)
    return Evaluation(whole[0], logits, batches.dataset.labels, time.perf_counter() - started)
