"""Deletion and insertion (Petsiuk et al. 2018): does a ranking of regions beat random rankings?

Superpixels are covered one after another, the most important first (deletion), or shown one after another on a covered
image (insertion). The probability of the predicted class is drawn against the share of pixels. A good ranking has a
small area under the deletion curve and a large one under the insertion curve. All methods rank the same superpixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure

from analysis.explain.image_model import ImageModel
from analysis.explain.lime import mean_colours, region_means
from analysis.explain.methods import METHODS, Explanation
from analysis.figures import save_figure

GRID = np.linspace(0, 1, 101)
Curves = dict[str, dict[str, np.ndarray]]
"""Probabilities of one image at ``GRID``: by ``deletion`` or ``insertion``, then by method ``[1, len(GRID)]`` or
``random`` ``[rankings, len(GRID)]``."""
COVERS: dict[str, Callable[[np.ndarray, np.ndarray, Sequence[float]], np.ndarray]] = {
    "blur": lambda image, segments, mean: cv2.GaussianBlur(image, (0, 0), min(image.shape[:2]) / 8),
    "colour": lambda image, segments, mean: np.full_like(image, np.round(255 * np.array(mean))),
    "superpixels": lambda image, segments, mean: mean_colours(image, segments),
}
"""The covered image, from an image (uint8 ``[H, W, 3]``), its segments and AUGMENT.MEAN.

Blur, the default, is the baseline of no method; the mean colour is that of gradients and occlusion, superpixels in
their mean colours that of LIME.
"""


def measure_curves(model: ImageModel, found: Sequence[Explanation], segments: np.ndarray, randoms: int = 10,
                   seed: int = 0, cover: str = "blur") -> Curves:
    """Return the curves of one image's explanations, for its predicted class and regions ``segments`` ``[H, W]``."""
    image, sizes, rng = found[0].image, np.bincount(segments.ravel()), np.random.default_rng(seed)
    orders = np.stack([*(rng.permutation(len(sizes)) for _ in range(randoms)),
                       *(np.argsort(-region_means(one.maps[0], segments), kind="stable") for one in found)])
    ranks = np.argsort(orders, axis=1)  # of each region in each ranking
    first = ranks[:, None] < np.arange(len(sizes) + 1)[None, :, None]  # [rankings, steps, regions]
    masks = np.concatenate([~first, first]).reshape(-1, len(sizes))
    covered = COVERS[cover](image, segments, model.config.AUGMENT.MEAN)
    probabilities = model.region_probabilities(image, covered, segments, masks)[:, found[0].classes[0]]
    shares = np.pad(sizes[orders].cumsum(1) / segments.size, ((0, 0), (1, 0)))
    curves: Curves = {}
    for kind, half in zip(("deletion", "insertion"), probabilities.reshape(2, len(orders), -1), strict=True):
        values = np.stack([np.interp(GRID, *pair) for pair in zip(shares, half, strict=True)])
        curves[kind] = {"random": values[:randoms]}
        curves[kind] |= {one.method: row[None] for one, row in zip(found, values[randoms:], strict=True)}
    return curves


def area(curves: np.ndarray) -> np.ndarray:
    """Return the areas under curves ``[..., len(GRID)]``, by the trapezoidal rule."""
    return (curves[..., 1:] + curves[..., :-1]).mean(-1) / 2


def summarise(curves: Sequence[Curves]) -> dict[str, Any]:
    """Return the areas under the curves, means over images.

    ``random_mean`` and ``random_std`` are over random rankings, each of all images; ``better_than_random`` is the share
    of images where a method beats the mean of the random rankings.
    """
    result: dict[str, Any] = {"images": len(curves), "random_rankings": len(curves[0]["deletion"]["random"])}
    for kind, sign in (("deletion", -1), ("insertion", 1)):
        areas = {name: area(np.stack([one[kind][name] for one in curves])) for name in curves[0][kind]}
        random = areas.pop("random")  # [images, rankings]
        result[kind] = {
            "random_mean": float(random.mean()),
            "random_std": float(random.mean(0).std(ddof=1)) if random.shape[1] > 1 else None,
            **{name: {"auc": float(own.mean()),
                      "better_than_random": float((sign * (own[:, 0] - random.mean(1)) > 0).mean())}
               for name, own in areas.items()},
        }
    return result


def curves_text(summary: dict[str, Any]) -> str:
    lines = []
    for kind, good in (("deletion", "smaller"), ("insertion", "larger")):
        part = summary[kind]
        spread = "" if part["random_std"] is None else f" ± {part['random_std']:.3f}"
        lines.append(f"{kind}, area under the curve ({good} is better): random {part['random_mean']:.3f}{spread}")
        lines += [f"  {METHODS[name].title:<20} {value['auc']:.3f}, better than random for "
                  f"{value['better_than_random']:.0%} of the images"
                  for name, value in part.items() if name in METHODS]
    return "\n".join(lines)


def draw_curves(curves: Sequence[Curves], path: Path, title: str = "") -> Path:
    """Write both curves, means over images, with one standard deviation of the random rankings in grey."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title)
    sides = (("deletion", "covered", "small", "upper right"), ("insertion", "shown", "large", "lower right"))
    for axes, (kind, done, good, corner) in zip(figure.subplots(1, 2, sharey=True), sides, strict=True):
        for name in curves[0][kind]:
            found = 100 * np.mean([one[kind][name] for one in curves], axis=0)  # [rankings, len(GRID)]
            mean, random = found.mean(0), name == "random"
            label = f"{len(found)} random rankings" if random else METHODS[name].title
            axes.plot(100 * GRID, mean, label=f"{label} ({area(mean) / 100:.3f})",
                      **({"color": "0.3", "linestyle": "--"} if random else {}))
            if len(found) > 1:
                deviation = found.std(0, ddof=1)
                axes.fill_between(100 * GRID, mean - deviation, mean + deviation, color="0.8", linewidth=0)
        axes.set(xlabel=f"pixels {done}, most important first, in %", xlim=(0, 100),
                 title=f"{kind} (area under the curve: {good} is good)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc=corner)
    figure.axes[0].set(ylabel="probability of the predicted class in %", ylim=(0, min(100, axes.get_ylim()[1])))
    return save_figure(figure, path, dpi=100)
