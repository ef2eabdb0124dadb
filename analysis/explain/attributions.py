"""Explanations from gradients, activations and occlusion; the baseline is 0 of the normalised image, the mean colour.

InterpretDL 0.8.0 has a version of each; docs/EXPLAIN.md lists the differences. All return maps ``[classes, H, W]``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import cv2
import numpy as np
import paddle
import paddle.nn.functional as F

from analysis.explain.image_model import ImageModel
from analysis.features import describe_blocks, watching
from errors import UserError, nearest

SMALLEST_MAP = 4  # positions a side of the map that a CAM uses, if any map has them
STEPS = 64  # of the integral of the gradients
NOISY_COPIES = 50
NOISE = 0.1  # standard deviation, of the range of the image's values
GRADIENT_COST = 4  # memory of an image with gradients, in images without


def input_gradients(model: ImageModel, images: np.ndarray, index: int) -> np.ndarray:
    """Return the gradient of a class's probability with respect to normalised images ``[N, 3, H, W]``."""
    size, parts = max(1, model.batch_size // GRADIENT_COST), []
    for start in range(0, len(images), size):
        batch = paddle.to_tensor(images[start : start + size], stop_gradient=False)
        parts += [each.numpy() for each in paddle.grad(F.softmax(model.logits(batch), axis=-1)[:, index].sum(), batch)]
    return np.concatenate(parts)


def integrated_gradients(model: ImageModel, image: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Integrated gradients (Sundararajan et al. 2017, equation 1) of the probability, by the midpoint rule.

    A pixel's value is summed over channels; the sum over pixels is the probability minus that of the baseline.
    """
    x = model.normalise(image)
    points = ((np.arange(STEPS, dtype=np.float32) + 0.5) / STEPS)[:, None, None, None] * x
    return np.stack([(input_gradients(model, points, index).mean(0) * x).sum(0) for index in classes])


def smooth_grad(model: ImageModel, image: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """SmoothGrad (Smilkov et al. 2017): the mean gradient of the probability over noisy copies, its magnitude."""
    x = model.normalise(image)
    deviation = np.float32(NOISE) * (x.max() - x.min())
    noise = np.random.default_rng(0).standard_normal((NOISY_COPIES, *x.shape), dtype=np.float32)
    return np.stack([np.abs(input_gradients(model, x + deviation * noise, index).mean(0)).sum(0) for index in classes])


def occlusion(model: ImageModel, image: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Occlusion (Zeiler and Fergus 2014): the drop of the probability when a window is covered by the baseline.

    The window is a seventh of each side (32 of 224 pixels), moved by half of itself; a pixel's value is the mean over
    the windows that cover it (InterpretDL: the sum, which is smaller at the border).
    """
    x = model.normalise(image)
    height, width = x.shape[1:]
    rows, columns = (
        [slice(first, first + size) for first in sorted({*range(0, side - size, max(1, size // 2)), side - size})]
        for side, size in ((side, max(1, side // 7)) for side in (height, width)))
    windows = np.zeros((len(rows) * len(columns), height, width), bool)
    for window, (row, column) in zip(windows, itertools.product(rows, columns), strict=True):
        window[row, column] = True
    after = model.probabilities(lambda start, stop: np.where(windows[start:stop, None], 0, x), len(windows))
    drops = (model.probabilities_of(image) - after)[:, list(classes)]
    return np.einsum("nc,nhw->chw", drops, windows) / windows.sum(0)


def grad_cam(model: ImageModel, image: np.ndarray, classes: Sequence[int], layer: str) -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017, equations 1 and 2) on the maps of ``layer``."""
    found, (logits, maps, output) = [], _map_of(model, layer, image)
    for index in classes:
        (gradient,) = paddle.grad(logits[0, index], output, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise UserError(f"--layer {layer}: its maps do not lead to the logits")
        gradient = gradient if output is maps else gradient.transpose([0, 3, 1, 2])
        heat = F.relu((gradient.mean([2, 3], keepdim=True) * maps).sum(1))[0].numpy()
        found.append(cv2.resize(heat, image.shape[1::-1]))
    return np.stack(found)


def score_cam(model: ImageModel, image: np.ndarray, classes: Sequence[int], layer: str) -> np.ndarray:
    """Score-CAM (Wang et al. 2020) on the maps of ``layer``.

    ReLU of the sum of the scaled maps, each weighted by the class's probability for the image times that map (scaled
    to 0 to 1), as in the authors' code.
    """
    with paddle.no_grad():
        _, found, _ = _map_of(model, layer, image)
    maps = np.stack([cv2.resize(channel, image.shape[1::-1]) for channel in found[0].numpy()])
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    masks = np.divide(maps - low, high - low, out=maps.copy(), where=high > low)
    weights = model.probabilities(lambda start, stop: masks[start:stop, None] * model.normalise(image), len(masks))
    return np.maximum(np.einsum("kc,khw->chw", weights[:, list(classes)], maps), 0)


def default_layer(model: ImageModel) -> str:
    """Return the last block whose map has ``SMALLEST_MAP`` positions a side, or the block of the largest map.

    At 224 pixels that is the last block (7×7); at 32 pixels the last stages of most networks have one or two positions.
    """
    sizes = {row["block"]: min(row["height"], row["width"]) for row in describe_blocks(model.network, model.size)}
    if not sizes:
        raise UserError(f"{model.config.MODEL.NAME} has no blocks that output maps: name a layer with --layer")
    fine = [name for name, side in sizes.items() if side >= SMALLEST_MAP]
    return fine[-1] if fine else max(sizes, key=sizes.get)


def _map_of(model: ImageModel, layer: str, image: np.ndarray) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Return the logits of an image, the layer's map with channels first, and the layer's own output."""
    layers, seen = dict(model.network.named_sublayers()), []
    if layer not in layers:
        raise UserError(f"--layer {layer!r} is not the name of a layer{nearest(layer, layers)}")
    with watching(model.network, [layer], lambda name, *found: seen.append(found)):
        logits = model.logits(paddle.to_tensor(model.normalise(image)[None], stop_gradient=False))
    if len(seen) != 1:
        raise UserError(f"--layer {layer} outputs {len(seen)} maps [B, C, H, W] in a forward pass, expected 1")
    return logits, *seen[0]
