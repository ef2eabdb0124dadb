"""Errors of a network: class by class, calibration, and its most confident errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from yacs.config import CfgNode

from analysis.figures import save_figure
from analysis.grids import class_name, draw_guesses
from datasets import ImageDataset, origin, pixels_sha256
from engine.data import build_eval_loader, check_classes
from engine.evaluate import Evaluation, LabelSmoothingCrossEntropy, evaluate
from engine.model import load_model
from utils.fileio import csv_text, write_text

BINS = 15  # of the reliability diagram, as in Guo et al.
Advance = Callable[[int], None]
"""Called with the number of images after each batch."""


@dataclass(frozen=True, eq=False)
class Predictions(Evaluation):
    """The evaluation of a whole split, in the order of ``dataset``."""

    dataset: ImageDataset

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Return class probabilities, float64 ``[N, num_classes]``."""
        return softmax(self.logits)

    @property
    def confidence(self) -> np.ndarray:
        """Return the probability of the predicted class, ``[N]``."""
        return self.probabilities.max(1)

    @property
    def names(self) -> list[str]:
        return [class_name(self.dataset.class_names, index) for index in range(self.logits.shape[1])]

    def errors(self) -> np.ndarray:
        """Return the indices of wrong images, the most confident first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities, float64 ``[N, num_classes]``."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def predict_split(config: CfgNode, weights: str | Path, split: str = "test",
                  advance: Advance = lambda images: None) -> Predictions:
    """Return the predictions of the weights of a file or run folder for a split.

    Raises UserError where the run folder of the weights records other classes.
    """
    loader = build_eval_loader(config, split)
    model, report = load_model(config, weights)
    check_classes(report.path, loader.dataset)
    found = evaluate(model, loader, LabelSmoothingCrossEntropy(config.LOSS.LABEL_SMOOTHING), advance)
    return Predictions(found.losses, found.logits, found.labels, found.seconds, loader.dataset)


def class_table(predictions: Predictions) -> list[dict[str, Any]]:
    """Return a row for each class that has images: recall, precision, F1 (of 1), and its most frequent error."""
    confusion, names = predictions.confusion, predictions.names
    rows = []
    for index in np.flatnonzero(confusion.sum(1)):
        hits, images, guesses = confusion[index, index], confusion[index].sum(), confusion[:, index].sum()
        others = confusion[index].copy()
        others[index] = 0
        rows.append({"class": names[index], "images": int(images), "recall": float(hits / images),
                     "precision": float(hits / guesses) if guesses else None,
                     "f1": float(2 * hits / (images + guesses)),
                     "most_taken_for": names[others.argmax()] if others.any() else "",
                     "most_taken_for_images": int(others.max(initial=0))})
    return rows


def calibration(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """Return ECE, MCE, Brier score, negative log likelihood and the bins, from ``[N, num_classes]`` and ``[N]``.

    Bins of equal width over the confidence, each open below and closed above. ECE is the mean over images, MCE the
    largest, of |accuracy - confidence| of a bin (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
    equations 3 and 5). The Brier score sums squared errors over classes.
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    own, count = probabilities[np.arange(len(labels)), labels], len(labels)
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts, confidences, hits = (np.bincount(bin_of, values, bins) for values in (np.ones(count), confidence, right))
    rows = [{"low": index / bins, "high": (index + 1) / bins, "images": int(counts[index]),
             "confidence": float(confidences[index] / counts[index]) if counts[index] else None,
             "accuracy": float(hits[index] / counts[index]) if counts[index] else None} for index in range(bins)]
    gaps = [(abs(row["accuracy"] - row["confidence"]), row["images"]) for row in rows if row["images"]]
    return {"ece": sum(gap * images for gap, images in gaps) / count, "mce": max(gap for gap, _ in gaps),
            "brier": float(((probabilities**2).sum(1) - 2 * own + 1).mean()),
            "negative_log_likelihood": float(-np.log(np.maximum(own, np.finfo(np.float64).tiny)).mean()),
            "mean_confidence": float(confidence.mean()), "accuracy": float(right.mean()), "bins": rows}


def metrics_of(config: CfgNode, found: Evaluation, dataset: ImageDataset) -> dict[str, Any]:
    """Return what a file of results keeps: data set, accuracies, loss, and calibration unless a logit is not finite."""
    metrics = {"data": origin(config.DATA), "pixels_sha256": pixels_sha256(dataset), **found.figures()}
    if np.isfinite(found.logits).all():
        measured = calibration(softmax(found.logits), found.labels)
        metrics |= {key: measured[key] for key in ("ece", "mce", "brier", "negative_log_likelihood")}
    return {**metrics, "per_class": dict(zip(dataset.class_names, found.per_class, strict=False))}


def draw_reliability(figures: dict[str, Any], path: Path, title: str = "") -> Path:
    """Write the reliability diagram of ``calibration``: accuracy against confidence, and images in each bin."""
    rows, width = [row for row in figures["bins"] if row["images"]], 100 / len(figures["bins"])
    lows, accuracies, confidences, images = (100 * np.array([row[key] for row in rows], float)
                                             for key in ("low", "accuracy", "confidence", "images"))
    figure = Figure(figsize=(4.6, 5.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.bar(lows, accuracies, width, align="edge", color="tab:blue", edgecolor="white", label="accuracy")
    upper.hlines(confidences, lows, lows + width, color="tab:red", linewidth=1.6, label="mean confidence")
    upper.vlines(lows + width / 2, accuracies, confidences, color="tab:red", linewidth=0.8)
    upper.plot([0, 100], [0, 100], color="0.4", linestyle="--", linewidth=0.8, label="perfectly calibrated")
    upper.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy in %", title=title)
    upper.text(0.97, 0.05, f"ECE {100 * figures['ece']:.2f} %", transform=upper.transAxes, ha="right",
               bbox={"facecolor": "white", "edgecolor": "0.7"})
    upper.legend(loc="upper left", fontsize=8)
    lower.bar(lows, 100 * images / images.sum(), width, align="edge", color="0.6", edgecolor="white")
    lower.set(xlabel="confidence in %", ylabel="images in %")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return save_figure(figure, path)


def draw_errors(predictions: Predictions, path: Path, count: int = 18, title: str = "") -> Path | None:
    """Write a grid of the most confident errors; None where there is no error."""
    chosen = predictions.errors()[:count]
    if not len(chosen):
        return None
    images = [predictions.dataset.images[int(index)] for index in chosen]
    return draw_guesses(images, predictions.probabilities[chosen], predictions.labels[chosen], predictions.names, path,
                        title)


def write_errors(predictions: Predictions, path: Path) -> Path:
    """Write ``mistakes.csv``: index in the split, true and predicted class, confidence; the most confident first."""
    names, found = predictions.names, predictions
    rows = ({"index": index, "true": names[found.labels[index]], "predicted": names[found.predicted[index]],
             "confidence": round(float(found.confidence[index]), 6)} for index in found.errors())
    write_text(path, csv_text(("index", "true", "predicted", "confidence"), rows))
    return path
