"""Explanations from gradients, activations and occlusion; 0 in the normalised image, the mean colour, is "nothing".

Of each, InterpretDL 0.8.0 has a version too. Where that holds up on today's packages the tests hold these against it;
docs/EXPLAIN.md says where it does not and what is done otherwise here. All return maps ``[len(classes), H, W]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import cv2
import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from analysis.explain.subject import Advance, Subject, ignore
from analysis.features import find_blocks, watching
from errors import UserError, nearest

SMALLEST_MAP = 4  # positions a side that a CAM's map must have, where any has
STEPS = 64  # of the integral of the gradients
NOISY_COPIES = 50
NOISE = 0.1  # standard deviation, as a share of the range of the image's values
GRADIENT_SHARE = 4  # images that a forward pass takes for each that one with gradients takes


def input_gradients(subject: Subject, images: np.ndarray, index: int, advance: Advance = ignore) -> np.ndarray:
    """Return the gradient of a class's probability with respect to normalised images ``[N, 3, H, W]``."""
    part = max(1, subject.batch_size // GRADIENT_SHARE)
    parts = []
    for start in range(0, len(images), part):
        batch = paddle.to_tensor(images[start : start + part], stop_gradient=False)
        parts.append(_gradient(subject, F.softmax(subject.logits(batch), axis=-1)[:, index].sum(), batch).numpy())
        advance(len(batch))
    return np.concatenate(parts)


def integrated_gradients(subject: Subject, image: np.ndarray, classes: Sequence[int], layer: str = "",
                         advance: Advance = ignore) -> np.ndarray:
    """Integrated gradients (Sundararajan et al. 2017, equation 1) of the probability, from the mean colour.

    A pixel's value is summed over its channels; the sum over pixels is the probability of the image minus that of the
    mean colour. The integral is taken by the midpoint rule with ``STEPS`` points, whose error falls with the square of
    their number; that of InterpretDL's sum, which counts both ends in full, falls with their number.
    """
    x = subject.normalise(image)
    points = ((np.arange(STEPS, dtype=np.float32) + 0.5) / STEPS)[:, None, None, None] * x
    return np.stack([(input_gradients(subject, points, index, advance).mean(0) * x).sum(0) for index in classes])


def smooth_grad(subject: Subject, image: np.ndarray, classes: Sequence[int], layer: str = "",
                advance: Advance = ignore) -> np.ndarray:
    """SmoothGrad (Smilkov et al. 2017): the mean gradient of the probability over ``NOISY_COPIES`` of the image.

    The noise is normal with ``NOISE`` of the image's range. A pixel's value is the sum of its channels' magnitudes:
    how much the probability depends on it, in which direction is not said.
    """
    x = subject.normalise(image)
    deviation = np.float32(NOISE) * (x.max() - x.min())
    noise = np.random.default_rng(0).standard_normal((NOISY_COPIES, *x.shape), dtype=np.float32)
    return np.stack([np.abs(input_gradients(subject, x + deviation * noise, index, advance).mean(0)).sum(0)
                     for index in classes])


def occlusion(subject: Subject, image: np.ndarray, classes: Sequence[int], layer: str = "",
              advance: Advance = ignore) -> np.ndarray:
    """Occlusion (Zeiler and Fergus 2014): the drop of the probability when a window is covered by the mean colour.

    The window is a seventh of each side (32 of 224 pixels), moved by half of itself; a pixel's value is the mean over
    the windows that cover it. InterpretDL takes the sum, which makes the border, under fewer windows, matter less.
    """
    x = subject.normalise(image)
    height, width = x.shape[1:]
    window = max(1, height // 7), max(1, width // 7)
    corners = [(top, left) for top in _positions(height, window[0]) for left in _positions(width, window[1])]

    def covered(start: int, stop: int) -> np.ndarray:
        images = np.repeat(x[None], stop - start, axis=0)
        for one, (top, left) in zip(images, corners[start:stop], strict=True):
            one[:, top : top + window[0], left : left + window[1]] = 0
        return images

    before = subject.probabilities_of(image)
    after = subject.probabilities(covered, len(corners), advance)
    drops, times = np.zeros((len(classes), height, width)), np.zeros((height, width))
    for (top, left), probabilities in zip(corners, after, strict=True):
        box = np.s_[..., top : top + window[0], left : left + window[1]]
        drops[box] += (before - probabilities)[list(classes)][:, None, None]
        times[box] += 1
    return drops / times


def _positions(side: int, window: int) -> list[int]:
    """Return where windows start so that they cover a side, half of one apart, the last at the end."""
    return sorted({*range(0, side - window, max(1, window // 2)), side - window})


def grad_cam(subject: Subject, image: np.ndarray, classes: Sequence[int], layer: str = "",
             advance: Advance = ignore) -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017, equations 1 and 2) on the maps of ``layer``, by default ``default_layer``.

    ReLU of the maps weighted by the mean gradient of the class's logit, in evaluation mode, scaled to the image's
    size. InterpretDL's fails with Paddle 3, which keeps no gradients of inner maps; it would also put the network
    into training mode for good, where stochastic depth is random, and take channels-last maps for channels-first.
    """
    name = layer or default_layer(subject, image)
    found = []
    for index in classes:
        x = paddle.to_tensor(subject.normalise(image)[None], stop_gradient=False)
        with _raw_and_turned(subject.model, name) as seen:
            logits = subject.logits(x)
        raw, turned = _the_map(seen, name)
        gradient = _gradient(subject, logits[0, index], raw)
        if gradient is None:
            raise UserError(f"--layer {name}: its maps do not lead to the logits")
        gradient = gradient if raw is turned else gradient.transpose([0, 3, 1, 2])
        cam = F.relu((gradient.mean([2, 3], keepdim=True) * turned).sum(1))
        found.append(_scaled(cam[0].numpy(), image.shape))
        advance(1)
    return np.stack(found)


def score_cam(subject: Subject, image: np.ndarray, classes: Sequence[int], layer: str = "",
              advance: Advance = ignore) -> np.ndarray:
    """Score-CAM (Wang et al. 2020) on the maps of ``layer``, by default ``default_layer``.

    ReLU of the sum of the scaled maps, each weighted by the class's probability when the image is multiplied by that
    map (scaled to 0 to 1), as the authors' code has it. InterpretDL leaves out the ReLU, takes channels-last maps for
    channels-first, and runs the network once for each channel.
    """
    name = layer or default_layer(subject, image)
    x = subject.normalise(image)
    with paddle.no_grad(), _raw_and_turned(subject.model, name) as seen:
        subject.logits(paddle.to_tensor(x[None]))
    maps = np.stack([_scaled(channel, image.shape) for channel in _the_map(seen, name)[1][0].numpy()])
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    masks = np.divide(maps - low, high - low, out=maps.copy(), where=high > low)
    weights = subject.probabilities(lambda start, stop: masks[start:stop, None] * x, len(masks), advance)
    return np.maximum(np.einsum("kc,khw->chw", weights[:, list(classes)], maps), 0)


def default_layer(subject: Subject, image: np.ndarray) -> str:
    """Return the network's last block whose map has ``SMALLEST_MAP`` positions a side, or the one of the largest map.

    At 224 pixels that is the last block of all (7×7 positions); at 32 pixels the last stages of most networks have one
    or two positions, which say nothing about where.
    """
    sizes: dict[str, int] = {}

    def see(name: str, found: paddle.Tensor) -> None:
        sizes[name] = min(found.shape[2:])

    with paddle.no_grad(), watching(subject.model, find_blocks(subject.model), see):
        subject.logits(paddle.to_tensor(subject.normalise(image)[None]))
    if not sizes:
        raise UserError(f"{subject.config.MODEL.NAME} has no blocks that put out maps: name a layer with --layer")
    fine = [name for name, side in sizes.items() if side >= SMALLEST_MAP]
    return fine[-1] if fine else max(sizes, key=sizes.get)


def _gradient(subject: Subject, value: paddle.Tensor, of: paddle.Tensor) -> paddle.Tensor | None:
    """Return the gradient of a number with respect to a tensor, None where it does not depend on it.

    ``paddle.grad`` cannot be asked: it fails at a PyLayer, which the compiled operators are, for whose parameters no
    gradient is wanted. Those of the parameters are computed here too, and dropped.
    """
    of.retain_grads()
    try:
        value.backward()
        return None if of.grad is None else of.grad.clone()
    finally:
        of.clear_gradient(set_to_zero=False)
        subject.model.clear_gradients(set_to_zero=False)


@contextmanager
def _raw_and_turned(model: nn.Layer, name: str) -> Iterator[list[paddle.Tensor]]:
    """Collect what a layer puts out while the block runs: its map as it is, and with channels first."""
    layers, seen = dict(model.named_sublayers()), []
    if name not in layers:
        raise UserError(f"--layer {name!r} is the name of no layer{nearest(name, layers)}")

    def keep(layer: nn.Layer, inputs: object, output: object) -> None:
        seen.append(output[0] if isinstance(output, (tuple, list)) else output)

    handle = layers[name].register_forward_post_hook(keep)
    try:
        with watching(model, [name], lambda _, found: seen.append(found)):
            yield seen
    finally:
        handle.remove()


def _the_map(seen: list[paddle.Tensor], name: str) -> tuple[paddle.Tensor, paddle.Tensor]:
    if len(seen) != 2:
        what = "puts out no map [B, C, H, W]" if len(seen) == 1 else "does not run once in a forward pass"
        raise UserError(f"--layer {name}: this layer {what}")
    return seen[0], seen[1]


def _scaled(heat: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return cv2.resize(heat, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)
