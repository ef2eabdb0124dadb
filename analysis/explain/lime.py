"""LIME (Ribeiro et al. 2016, https://arxiv.org/abs/1602.04938) with InterpretDL, as fast as the network allows."""

from __future__ import annotations

import cv2
import numpy as np

from analysis.explain.explanation import Explanation
from analysis.explain.interpretdl import FromImageNet, lime_interpreter, load_interpretdl
from analysis.explain.subject import Advance, Regions, Subject, ignore
from errors import UserError

SOURCE_SIDE = 224  # pixels a side for which InterpretDL's superpixels are made
SAMPLES = 10_000  # the source's number of perturbed images


def superpixels(image: np.ndarray, count: int = 0) -> np.ndarray:
    """Return the superpixels of an RGB image, uint8 ``[H, W, 3]``, as numbers from 0, int64 ``[H, W]``.

    ``count`` 0 is InterpretDL's default, quickshift with sigma 1 (kernel size 5, distance 10). It is meant for images
    of 224 pixels a side: of an image whose shorter side is less, a copy of that size is segmented (as the source
    scales CIFAR-10 to 224 pixels before anything else), and each pixel takes the superpixel at its centre. An image
    of 32 pixels has 3 to 10 superpixels otherwise. A ``count`` above 0 makes about as many by SLIC (compactness 10).
    """
    load_interpretdl()  # which brings scikit-image along, or says how to get both
    height, width = image.shape[:2]
    if count:
        from skimage.segmentation import slic

        found = slic(image, n_segments=count, compactness=10, start_label=0)
    else:
        from skimage.segmentation import quickshift

        scale = max(1.0, SOURCE_SIDE / min(height, width))
        if scale > 1:
            size = (round(width * scale), round(height * scale))
            image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        found = quickshift(image, sigma=1)
        rows = ((np.arange(height) + 0.5) * found.shape[0] / height).astype(int)
        columns = ((np.arange(width) + 0.5) * found.shape[1] / width).astype(int)
        found = found[np.ix_(rows, columns)]
    return np.unique(found, return_inverse=True)[1].reshape(height, width)


def mean_colours(image: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Return an image, uint8 ``[H, W, 3]``, with each superpixel in its mean colour, rounded down as InterpretDL does.

    That is what LIME puts in place of a superpixel that it hides.
    """
    flat, pixels = segments.ravel(), image.reshape(-1, 3)
    sums = np.stack([np.bincount(flat, weights=channel) for channel in pixels.T.astype(np.float64)], axis=1)
    means = sums / np.bincount(flat)[:, None]
    return means.astype(np.uint8)[segments]


def explain_lime(subject: Subject, image: np.ndarray, label: int | None = None, num_samples: int = SAMPLES,
                 segments: np.ndarray | None = None, seed: int = 0, advance: Advance = ignore) -> Explanation:
    """Explain what the network predicts for a prepared image, and the true class ``label`` where it is known.

    A linear model is fitted to the probabilities of ``num_samples`` images in which each superpixel is hidden (shown
    in its mean colour) with probability 1/2, weighted by their cosine similarity to the image. A superpixel's weight
    is the change of the class's probability that showing it makes in that model. ``arrays`` of what is returned:
    ``segments`` ``[H, W]``; for each class explained ``weights`` ``[classes, superpixels]``, ``intercept`` and
    ``score`` (weighted R²).

    Raises UserError where InterpretDL is not installed, and for fewer samples than superpixels.
    """
    if segments is None:
        segments = superpixels(image)
    regions = Regions(subject.normalise(image), subject.normalise(mean_colours(image, segments)), segments)
    if num_samples <= regions.count:
        raise UserError(f"LIME has {num_samples} samples, expected more than the {regions.count} superpixels")
    probabilities = subject.probabilities_of(image)
    classes = explained_classes(probabilities, label)
    augment = subject.config.AUGMENT
    interpreter = lime_interpreter(FromImageNet(subject.model, tuple(augment.MEAN), tuple(augment.STD)), segments,
                                   lambda masks: regions.probabilities(subject, masks, advance), seed)
    found = interpreter.interpret(image, interpret_class=list(classes), num_samples=num_samples, visual=False)
    weights = np.zeros((len(classes), regions.count))
    for row, index in zip(weights, classes, strict=True):
        for superpixel, weight in found[index]:
            row[superpixel] = weight
    arrays = {
        "segments": segments,
        "weights": weights,
        "intercept": np.array([interpreter.lime_base.intercepts[index] for index in classes]),
        "score": np.array([interpreter.lime_results["r2_scores"][index] for index in classes]),
    }
    return Explanation("lime", image, classes, weights[:, segments], probabilities, label, arrays)


def explained_classes(probabilities: np.ndarray, label: int | None) -> tuple[int, ...]:
    """Return the predicted class and, where it is known and another, the true one."""
    predicted = int(probabilities.argmax())
    return (predicted,) if label is None or label == predicted else (predicted, int(label))


def region_means(heat: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Return the mean of a map ``[H, W]`` over each superpixel, ``[superpixels]``."""
    flat = segments.ravel()
    return np.bincount(flat, weights=np.asarray(heat, np.float64).ravel()) / np.bincount(flat)
