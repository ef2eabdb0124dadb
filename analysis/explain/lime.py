"""LIME (Ribeiro et al. 2016, https://arxiv.org/abs/1602.04938) with InterpretDL's sampling and regression."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from analysis.explain.image_model import ImageModel, Regions
from analysis.explain.interpretdl import FromImageNet, lime_interpreter, load_interpretdl
from errors import UserError

SOURCE_SIDE = 224  # pixels a side for which InterpretDL's superpixels are made
SAMPLES = 10_000  # perturbed images, as in the source


def superpixels(image: np.ndarray, count: int = 0) -> np.ndarray:
    """Return the superpixels of an RGB image, uint8 ``[H, W, 3]``, as numbers from 0, int64 ``[H, W]``.

    ``count`` 0 is InterpretDL's default, quickshift with sigma 1. Smaller images than ``SOURCE_SIDE`` are segmented in
    a copy of that size (at 32 pixels there are 3 to 10 superpixels otherwise). A ``count`` above 0 makes about as many
    by SLIC (compactness 10).
    """
    load_interpretdl()  # raises UserError where scikit-image is missing too
    from skimage.segmentation import quickshift, slic

    height, width = image.shape[:2]
    if count:
        found = slic(image, n_segments=count, compactness=10, start_label=0)
    else:
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
    """Return an image, uint8 ``[H, W, 3]``, with each superpixel in its mean colour, rounded down as in InterpretDL."""
    means = np.stack([region_means(channel, segments) for channel in image.transpose(2, 0, 1)], axis=1)
    return means.astype(np.uint8)[segments]


def region_means(heat: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Return the mean of a map ``[H, W]`` over each superpixel, ``[superpixels]``."""
    flat = segments.ravel()
    return np.bincount(flat, weights=np.asarray(heat, np.float64).ravel()) / np.bincount(flat)


def explain_lime(model: ImageModel, image: np.ndarray, classes: Sequence[int], num_samples: int, segments: np.ndarray,
                 seed: int) -> dict[str, np.ndarray]:
    """Fit a linear model to the probabilities of ``num_samples`` images with superpixels hidden at random.

    A superpixel is hidden (in its mean colour) with probability 1/2; samples are weighted by their cosine similarity
    to the image. Returns ``segments`` ``[H, W]``, ``weights`` ``[classes, superpixels]`` (the change of the class's
    probability), and ``intercept`` and ``score`` (weighted R²) ``[classes]``. Raises UserError where InterpretDL is
    missing, and for fewer samples than superpixels.
    """
    regions = Regions(model.normalise(image), model.normalise(mean_colours(image, segments)), segments)
    if num_samples <= regions.count:
        raise UserError(f"LIME has {num_samples} samples, expected more than the {regions.count} superpixels")
    network = FromImageNet(model.network, tuple(model.config.AUGMENT.MEAN), tuple(model.config.AUGMENT.STD))
    interpreter = lime_interpreter(network, segments, lambda masks: regions.probabilities(model, masks), seed)
    found = interpreter.interpret(image, interpret_class=list(classes), num_samples=num_samples, visual=False)
    return {"segments": segments, "weights": np.array([[weight for _, weight in sorted(found[k])] for k in classes]),
            "intercept": np.array([interpreter.lime_base.intercepts[k] for k in classes]),
            "score": np.array([interpreter.lime_results["r2_scores"][k] for k in classes])}
