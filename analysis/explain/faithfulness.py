"""Deletion and insertion (Petsiuk et al. 2018): does a ranking of regions beat random rankings?

Superpixels are covered one after another, the most important first (deletion), or shown one after another on a covered
image (insertion). The probability of the predicted class is drawn against the share of pixels. A good ranking has a
small area under the deletion curve and a large one under the insertion curve. All methods rank the same superpixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure

from analysis.explain.image_model import ImageModel, Regions
from analysis.explain.lime import mean_colours, region_means
from analysis.explain.methods import METHODS, Explanation
from analysis.figures import save_figure

GRID = np.linspace(0, 1, 101)
COVERS: dict[str, Callable[[np.ndarray, np.ndarray, Sequence[float]], np.ndarray]] = {
    "blur": lambda image, segments, mean: cv2.GaussianBlur(image, (0, 0), min(image.shape[:2]) / 8),
    "colour": lambda image, segments, mean: np.broadcast_to(np.round(255 * np.array(mean)).astype(np.uint8),
                                                            image.shape),
    "superpixels": lambda image, segments, mean: mean_colours(image, segments),
}
"""The covered image, from an image (uint8 ``[H, W, 3]``), its segments and AUGMENT.MEAN.

Blur, the default, is the baseline of no method; the mean colour is that of gradients and occlusion, superpixels in
their mean colours that of LIME.
"""


@dataclass(frozen=True)
class Curves:
    """Probabilities ``[rankings, len(GRID)]`` of one image, by method (one ranking) or ``random``."""

    deletion: dict[str, np.ndarray]
    insertion: dict[str, np.ndarray]


def measure_curves(model: ImageModel, found: Sequence[Explanation], segments: np.ndarray, randoms: int = 10,
                   seed: int = 0, cover: str = "blur") -> Curves:
    """Return the curves of one image's explanations, for its predicted class and regions ``segments`` ``[H, W]``."""
    image = found[0].image
    hidden = np.ascontiguousarray(COVERS[cover](image, segments, model.config.AUGMENT.MEAN))
    regions = Regions(model.normalise(image), model.normalise(hidden), segments)
    rng = np.random.default_rng(seed)
    rankings = {one.method: np.argsort(-region_means(one.maps[0], segments), kind="stable")[None] for one in found}
    rankings["random"] = np.stack([rng.permutation(regions.count) for _ in range(randoms)])
    orders = np.concatenate(list(rankings.values()))
    ranks = np.argsort(orders, axis=1)  # of each region in each ranking
    first = ranks[:, None] < np.arange(regions.count + 1)[None, :, None]  # [rankings, steps, regions]
    masks = np.concatenate([~first, first]).reshape(-1, regions.count)
    probabilities = regions.probabilities(model, masks)[:, found[0].classes[0]]
    sizes = np.bincount(segments.ravel())[orders].cumsum(1) / segments.size
    shares = np.concatenate([np.zeros((len(orders), 1)), sizes], axis=1)
    both = probabilities.reshape(2, len(orders), -1)
    curves = [np.stack([np.interp(GRID, *pair) for pair in zip(shares, half, strict=True)]) for half in both]
    ends = np.cumsum([len(ranking) for ranking in rankings.values()])[:-1]
    deletion, insertion = (dict(zip(rankings, np.split(half, ends), strict=True)) for half in curves)
    return Curves(deletion, insertion)


def summarise(curves: Sequence[Curves]) -> dict[str, Any]:
    """Return the areas under the curves, means over images.

    ``random_mean`` and ``random_std`` are over random rankings, each of all images; ``better_than_random`` is the share
    of images where a method beats the mean of the random rankings.
    """
    result: dict[str, Any] = {"images": len(curves), "random_rankings": len(curves[0].deletion["random"])}
    for kind, sign in (("deletion", -1), ("insertion", 1)):
        areas = {name: np.stack([np.trapezoid(getattr(one, kind)[name], GRID, axis=1) for one in curves])
                 for name in curves[0].deletion}  # [images, rankings]
        random = areas.pop("random")
        result[kind] = {
            "random_mean": float(random.mean()),
            "random_std": float(random.mean(0).std(ddof=1)) if random.shape[1] > 1 else None,
            **{name: {"auc": float(area.mean()),
                      "better_than_random": float((sign * (area[:, 0] - random.mean(1)) > 0).mean())}
               for name, area in areas.items()},
        }
    return result


def curves_text(summary: dict[str, Any]) -> str:
    """Return the summary as text."""
    lines = []
    for kind, wanted in (("deletion", "smaller is better"), ("insertion", "larger is better")):
        part = summary[kind]
        spread = "" if part["random_std"] is None else f" ± {part['random_std']:.3f}"
        lines.append(f"{kind}, area under the curve ({wanted}): random {part['random_mean']:.3f}{spread}")
        lines += [f"  {METHODS[name].title:<20} {value['auc']:.3f}, better than random for "
                  f"{value['better_than_random']:.0%} of the images"
                  for name, value in part.items() if name in METHODS]
    return "\n".join(lines)


def draw_curves(curves: Sequence[Curves], path: Path, title: str = "") -> Path:
    """Write both curves, means over images, with one standard deviation of the random rankings in grey."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title)
    labels = {"deletion": "covered", "insertion": "shown"}
    highest = 0.0
    for axes, (kind, done) in zip(figure.subplots(1, 2, sharey=True), labels.items(), strict=True):
        means = {name: np.mean([getattr(one, kind)[name] for one in curves], axis=0) for name in curves[0].deletion}
        random = means.pop("random")
        mean, deviation = random.mean(0), random.std(0, ddof=1) if len(random) > 1 else 0.0
        axes.fill_between(100 * GRID, 100 * (mean - deviation), 100 * (mean + deviation), color="0.8", linewidth=0)
        axes.plot(100 * GRID, 100 * mean, color="0.3", linestyle="--",
                  label=f"{len(random)} random rankings ({np.trapezoid(mean, GRID):.3f})")
        for name, values in means.items():
            axes.plot(100 * GRID, 100 * values[0], label=f"{METHODS[name].title} ({np.trapezoid(values[0], GRID):.3f})")
        highest = max(highest, (mean + deviation).max(), *(values.max() for values in means.values()))
        axes.set(xlabel=f"pixels {done}, most important first, in %", xlim=(0, 100),
                 title=f"{kind} (area under the curve: {'small' if kind == 'deletion' else 'large'} is good)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper right" if kind == "deletion" else "lower right")
    figure.axes[0].set(ylabel="probability of the predicted class in %", ylim=(0, min(100, 105 * highest)))
    return save_figure(figure, path, dpi=100)
