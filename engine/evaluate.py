"""One pass over a data set: loss, logits and label of every image, and metrics; the loss of all recipes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from datasets.loader import Batch, EvalLoader
from engine import distributed
from utils.fileio import csv_text, write_text

COLUMNS = ("batch", "images", "seconds", "mean_seconds", "images_per_second", "mean_images_per_second", "loss",
           "mean_loss", "acc1", "mean_acc1", "acc5", "mean_acc5")


class LabelSmoothingCrossEntropy(nn.Layer):
    """Cross entropy against a target of which ``label_smoothing`` is spread evenly over all classes.

    ``(1 - s) · nll + s · mean over classes of -log p`` (Szegedy et al., "Rethinking the Inception Architecture",
    2016, section 7). Logits ``[B, classes]``; targets are class indices ``[B]`` or distributions ``[B, classes]``
    (mixup, cutmix). Returns the mean over images, or the loss of each image ``[B]`` with ``reduction="none"``.
    """

    def __init__(self, label_smoothing: float = 0.1) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: paddle.Tensor, target: paddle.Tensor, reduction: str = "mean") -> paddle.Tensor:
        log_probabilities = F.log_softmax(logits.astype("float32"), axis=-1)
        if target.ndim == 1:
            likelihood = paddle.take_along_axis(log_probabilities, target.unsqueeze(1), axis=1).squeeze(1)
        else:
            likelihood = (target * log_probabilities).sum(-1)
        smooth = self.label_smoothing
        losses = -(1.0 - smooth) * likelihood - smooth * log_probabilities.mean(-1)
        return losses.mean() if reduction == "mean" else losses


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
        return float(self.losses.mean())

    @property
    def top1(self) -> float:
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


class EvaluationReport:
    """Rows of COLUMNS for every ``every``-th of ``batches`` batches, and for the first and the last.

    Each is passed to ``show``, if any, as a line in the form of PoolFormer's and timm's validation. Accuracies are in
    percent, means are over images so far. ``acc5`` is empty with fewer than five classes. The clock of the first batch
    starts with the constructor.
    """

    def __init__(self, batches: int, every: int = 10, show: Callable[[str], None] | None = print) -> None:
        self.rows: list[dict[str, float | None]] = []
        self._batches, self._every, self._show = batches, every, show
        self._seen = 0
        self._sums = np.zeros(4)  # images, losses, correct, correct within five
        self._started = self._last = time.perf_counter()

    def add(self, batch: Evaluation) -> None:
        """Add the evaluation of the next batch."""
        now = time.perf_counter()
        seconds, total, self._last = now - self._last, now - self._started, now
        five = batch.within_five
        sums = np.array([batch.images, batch.losses.sum(), (batch.predicted == batch.labels).sum(),
                         0 if five is None else five.sum()])
        self._sums += sums
        index, self._seen = self._seen, self._seen + 1
        if index % self._every and self._seen < self._batches:
            return
        (_, loss, acc1, acc5), (_, mean_loss, mean_acc1, mean_acc5) = (
            (part / part[0] * (1, 1, 100, 100)).tolist() for part in (sums, self._sums))
        if five is None:
            acc5 = mean_acc5 = None
        row = dict(zip(COLUMNS, (index, batch.images, seconds, total / self._seen, batch.images / seconds,
                                 float(self._sums[0] / total), loss, mean_loss, acc1, mean_acc1, acc5, mean_acc5),
                       strict=True))
        self.rows.append(row)
        if self._show:
            self._show(self._line(row))

    def _line(self, row: dict[str, float | None]) -> str:
        text = ("Test: [{batch:>{width}}/{batches}]  Time: {seconds:.3f}s ({mean_seconds:.3f}s)  "
                "Rate: {images_per_second:.2f}/s ({mean_images_per_second:.2f}/s)  Loss: {loss:.4f} ({mean_loss:.4f})  "
                "Acc@1: {acc1:.3f} ({mean_acc1:.3f})")
        if row["acc5"] is not None:
            text += "  Acc@5: {acc5:.3f} ({mean_acc5:.3f})"
        return text.format(width=len(str(self._batches)), batches=self._batches, **row)

    def summary(self) -> str:
        """Return the last line: accuracies and, in brackets, errors, in percent."""
        means = [(name, self.rows[-1][f"mean_acc{k}"]) for name, k in (("Acc@1", 1), ("Acc@5", 5))]
        return "* " + " ".join(f"{name} {mean:.3f} ({100 - mean:.3f})" for name, mean in means if mean is not None)

    def write(self, path: Path) -> None:
        """Write the rows as CSV."""
        write_text(path, csv_text(COLUMNS, self.rows))
