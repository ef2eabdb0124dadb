"""LIME (Ribeiro et al. 2016, https://arxiv.org/abs/1602.04938) with the kernel and the regression of InterpretDL 0.8.0.

None of InterpretDL's modules is changed. What its LIME needs on today's packages:

- ``from IPython.core.display import display``: IPython 9 has it in ``IPython.display``; it is lent during the import.
- ``paddle.fluid``: modules that nothing here uses need it; InterpretDL's message that Paddle is missing is hidden.
- ``Ridge(normalize=True)``: gone since scikit-learn 1.2. LIME's alpha is 0, so it is ``LinearRegression``.
- ImageNet's mean and std, ``device="gpu:0"`` and one forward pass for each perturbed image: these are of its
  ``LIMECVInterpreter``. Here ``LimeBase`` gets the config's own probabilities, from the same random numbers.
"""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from types import ModuleType
from unittest import mock

import cv2
import numpy as np

from analysis.explain.image_model import ImageModel
from errors import UserError

INSTALL = "python -m pip install -r requirements-explain.txt && python -m pip install --no-deps interpretdl==0.8.0"
SOURCE_SIDE = 224  # pixels a side for which InterpretDL's superpixels are made
SAMPLES = 10_000  # perturbed images, as in the source


def load_interpretdl(module: str = "interpretdl") -> ModuleType:
    """Import InterpretDL or a module of it; UserError with the command that installs it where a package is missing."""
    try:
        from IPython import display
        from IPython.core import display as old_module

        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with mock.patch.object(old_module, "display", display.display, create=True):
                return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"LIME needs InterpretDL 0.8.0 and its packages ({error}): {INSTALL}") from error


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
        found = quickshift(cv2.resize(image, (round(width * scale), round(height * scale))), sigma=1)
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
    lime = load_interpretdl("interpretdl.interpreter._lime_base").LimeBase(random_state=seed)
    from sklearn.linear_model import LinearRegression
    from sklearn.metrics import pairwise_distances

    count = int(segments.max()) + 1
    if num_samples <= count:
        raise UserError(f"LIME has {num_samples} samples, expected more than the {count} superpixels")
    masks = lime.random_state.randint(0, 2, num_samples * count).reshape(num_samples, count)
    masks[0] = 1
    probabilities = model.region_probabilities(image, mean_colours(image, segments), segments, masks)
    distances = pairwise_distances(masks, masks[:1], metric="cosine").ravel()
    fits = [lime._fitting_data(masks, probabilities, distances, index, False, LinearRegression()) for index in classes]
    intercepts, weights, scores, _ = zip(*fits, strict=True)
    return {"segments": segments, "weights": np.array([[weight for _, weight in found] for found in weights]),
            "intercept": np.array(intercepts), "score": np.array(scores)}
