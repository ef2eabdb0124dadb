"""Does a ranking of regions say what matters? Deletion and insertion (Petsiuk et al. 2018) against random rankings.

Regions (superpixels) are covered one after another, the most important first (deletion), or shown one after another
on an image that is covered (insertion); the probability of the predicted class is drawn against the share of pixels
covered or shown. A ranking that knows what matters has a small area under the curve of deletion and a large one under
that of insertion. Every method and the random rankings rank the same superpixels: single pixels covered at random make
noise that hurts a network more than what any explanation points at. ``COVERS`` says what stands where a region is
covered; blur, the default, is none of the methods' own idea of "nothing", so that it favours none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure

from analysis.explain.explanation import Explanation
from analysis.explain.lime import mean_colours, region_means
from analysis.explain.methods import METHODS
from analysis.explain.subject import Advance, Regions, Subject, ignore
from analysis.figures import save_figure

RANDOM_RANKINGS = 10
GRID = np.linspace(0, 1, 101)


def blurred(image: np.ndarray, segments: np.ndarray, colour: Sequence[float]) -> np.ndarray:
    """Return the image under a Gaussian blur whose deviation is an eighth of its shorter side."""
    return cv2.GaussianBlur(image, (0, 0), min(image.shape[:2]) / 8)


def one_colour(image: np.ndarray, segments: np.ndarray, colour: Sequence[float]) -> np.ndarray:
    """Return an image of the config's mean colour, which gradients and occlusion take for nothing."""
    return np.broadcast_to(np.round(255 * np.array(colour)).astype(np.uint8), image.shape)


def superpixel_colours(image: np.ndarray, segments: np.ndarray, colour: Sequence[float]) -> np.ndarray:
    """Return the image with each superpixel in its mean colour, which LIME takes for nothing."""
    return mean_colours(image, segments)


COVERS = {"blur": blurred, "colour": one_colour, "superpixels": superpixel_colours}
"""What stands where a region is covered: of an image, uint8 ``[H, W, 3]``, its segments, and AUGMENT.MEAN."""


@dataclass(frozen=True)
class Curves:
    """Deletion and insertion of one image, of the explanations and of random rankings.

    ``deletion[name]`` and ``insertion[name]`` are probabilities ``[rankings, len(GRID)]`` at the shares of pixels of
    ``GRID``; ``name`` is a method (one ranking) or ``random``.
    """

    deletion: dict[str, np.ndarray]
    insertion: dict[str, np.ndarray]


def measure_curves(subject: Subject, found: Sequence[Explanation], segments: np.ndarray, randoms: int = RANDOM_RANKINGS,
                   seed: int = 0, cover: str = "blur", advance: Advance = ignore) -> Curves:
    """Return the curves of one image's explanations for its predicted class, its ``segments`` ``[H, W]`` as regions."""
    image = found[0].image
    hidden = np.ascontiguousarray(COVERS[cover](image, segments, subject.config.AUGMENT.MEAN))
    regions = Regions(subject.normalise(image), subject.normalise(hidden), segments)
    rng = np.random.default_rng(seed)
    rankings = {one.method: np.argsort(-region_means(one.maps[0], segments), kind="stable")[None] for one in found}
    rankings["random"] = np.stack([rng.permutation(regions.count) for _ in range(randoms)])
    orders = np.concatenate(list(rankings.values()))
    places = np.argsort(orders, axis=1)  # of each region in each ranking
    first = places[:, None] < np.arange(regions.count + 1)[None, :, None]  # [rankings, steps, regions]
    masks = np.concatenate([~first, first]).reshape(-1, regions.count)
    probabilities = regions.probabilities(subject, masks, advance)[:, found[0].predicted]
    sizes = np.bincount(segments.ravel())[orders].cumsum(1) / segments.size
    shares = np.concatenate([np.zeros((len(orders), 1)), sizes], axis=1)
    both = probabilities.reshape(2, len(orders), -1)
    curves = [np.stack([np.interp(GRID, *pair) for pair in zip(shares, half, strict=True)]) for half in both]
    ends = np.cumsum([len(ranking) for ranking in rankings.values()])[:-1]
    deletion, insertion = (dict(zip(rankings, np.split(half, ends), strict=True)) for half in curves)
    return Curves(deletion, insertion)


def summarise(curves: Sequence[Curves]) -> dict[str, Any]:
    """Return the areas under the curves, means over images.

    For each of ``deletion`` and ``insertion``: of each method ``auc``, ``random_mean`` and ``random_std`` (mean and
    deviation over random rankings, each of which ranks all images), and ``better_than_random``, the share of images
    where the method beats the mean of the random rankings.
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
    """Return the summary as lines to print."""
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
    """Write both curves, means over images; the grey band is one standard deviation of the random rankings."""
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
