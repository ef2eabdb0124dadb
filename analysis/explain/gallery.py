"""Many images explained in one go: arrays of each, one sheet, one table, and the curves that judge it all."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from analysis.explain.explanation import Explanation
from analysis.explain.faithfulness import draw_curves, measure_curves, summarise
from analysis.explain.figures import draw_explanations
from analysis.explain.lime import SAMPLES, superpixels
from analysis.explain.methods import METHODS, explain
from analysis.explain.subject import Subject
from utils.fileio import write_json

PLAIN_LINE_SECONDS = 15.0


@dataclass(frozen=True)
class Picture:
    """An image to explain: RGB uint8 ``[H, W, 3]`` of any size, what it is called, and its class where known."""

    name: str
    image: np.ndarray
    label: int | None = None


@dataclass(frozen=True)
class Settings:
    """How to explain: see `methods.explain`; ``curves`` counts random rankings (0: no curves), ``cover`` is
    one of `faithfulness.COVERS`.
    """

    methods: tuple[str, ...] = ("lime",)
    num_samples: int = SAMPLES
    superpixels: int = 0  # 0: InterpretDL's own
    layer: str = ""
    seed: int = 0
    curves: int = 0
    cover: str = "blur"


def say_now(line: str) -> None:
    """Print a line at once, into a pipe too."""
    print(line, flush=True)


def explain_pictures(subject: Subject, pictures: Sequence[Picture], settings: Settings, folder: Path, name: str,
                     say: Callable[[str], None] = say_now) -> dict[str, Any]:
    """Explain pictures, and write ``<picture>_<method>.npz`` of each, ``<name>.png``, ``<name>.json`` and the curves.

    Returns what stands in the JSON file. An interruption leaves the arrays of what was done.
    """
    config = subject.config
    found: list[list[Explanation]] = []
    records, curves = [], []
    stems = _stems([picture.name for picture in pictures])
    say(f"{len(pictures)} images, {', '.join(METHODS[method].title for method in settings.methods)}, into {folder}")
    for place, picture in enumerate(pictures, start=1):
        image = subject.prepare(picture.image)
        needed = "lime" in settings.methods or settings.curves
        segments = superpixels(image, settings.superpixels) if needed else None
        explanations, rates = [], {}
        for method in settings.methods:
            total = settings.num_samples if method == "lime" else None
            with Progress(f"{METHODS[method].title} {place}/{len(pictures)}, {picture.name}", total) as progress:
                explanations.append(explain(subject, image, method, picture.label, num_samples=settings.num_samples,
                                            segments=segments, layer=settings.layer, seed=settings.seed,
                                            advance=progress.advance))
            rates[method] = progress.seconds
            explanations[-1].save(folder / f"{stems[place - 1]}_{method}.npz")
        found.append(explanations)
        records.append(_record(subject, picture, stems[place - 1], explanations, rates))
        say(_line(records[-1]))
        if settings.curves:
            curves.append(measure_curves(subject, explanations, segments, settings.curves, settings.seed,
                                         settings.cover))
    summary = {"config": config.NAME, "model": config.MODEL.NAME, "methods": list(settings.methods),
               "samples": settings.num_samples, "superpixels": settings.superpixels, "seed": settings.seed,
               "images": records}
    if curves:
        summary["curves"] = {"cover": settings.cover, **summarise(curves)}
        draw_curves(curves, folder / f"{name}_curves.png",
                    f"{config.NAME}: mean of {len(curves)} images, covered by {settings.cover}")
    write_json(folder / f"{name}.json", summary)
    title = f"{config.NAME}: {METHODS[settings.methods[0]].title}" if len(settings.methods) == 1 else config.NAME
    draw_explanations(subject, found, [picture.name for picture in pictures], folder / f"{name}.png", title)
    return summary


def _stems(names: Sequence[str]) -> list[str]:
    """Return what the files of pictures of these names begin with, no two the same."""
    stems: list[str] = []
    for name in names:
        stem = re.sub(r"[^\w.-]+", "_", Path(name).stem)
        again = sum(other == stem or other.startswith(f"{stem}~") for other in stems)
        stems.append(f"{stem}~{again + 1}" if again else stem)
    return stems


def _record(subject: Subject, picture: Picture, stem: str, explanations: Sequence[Explanation],
            seconds: dict[str, float]) -> dict[str, Any]:
    one = explanations[0]
    record = {"name": picture.name, "files": stem, "predicted": subject.class_name(one.predicted),
              "probability": float(one.probabilities[one.predicted]),
              "true": None if picture.label is None else subject.class_name(picture.label),
              "seconds": {method: round(value, 3) for method, value in seconds.items()}}
    for explanation in explanations:
        if "layer" in explanation.arrays:
            record["layer"] = str(explanation.arrays["layer"])
        if explanation.method == "lime":
            record["lime"] = {"superpixels": int(explanation.arrays["segments"].max()) + 1,
                              "score": [float(value) for value in explanation.arrays["score"]],
                              "intercept": [float(value) for value in explanation.arrays["intercept"]]}
    return record


def _line(record: dict[str, Any]) -> str:
    true = f" (true: {record['true']})" if record["true"] else ""
    line = f"{record['name']}: {record['predicted']} {record['probability']:.1%}{true}"
    if "lime" in record:
        line += f"; LIME: {record['lime']['superpixels']} superpixels, R² {record['lime']['score'][0]:.2f}"
    if "layer" in record:
        line += f"; CAM of {record['layer']}"
    return line


class Progress:
    """Images seen, rate and time left: a bar in a terminal, elsewhere a line every 15 seconds."""

    def __init__(self, title: str, total: int | None) -> None:
        self.title, self.total = title, total
        self.done, self.seconds = 0, 0.0

    def __enter__(self) -> Progress:
        self._started = self._shown = time.perf_counter()
        self._bar = tqdm(total=self.total, desc=self.title, unit="image", leave=False, dynamic_ncols=True,
                         disable=not sys.stderr.isatty())
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self.seconds = time.perf_counter() - self._started

    def advance(self, images: int) -> None:
        """Count images."""
        self.done += images
        self._bar.update(images)
        now = time.perf_counter()
        if not self._bar.disable or now - self._shown < PLAIN_LINE_SECONDS:
            return
        self._shown, rate = now, self.done / (now - self._started)
        text = f"{self.title}: {self.done} images, {rate:.1f} images/s"
        if self.total is not None:
            text += f", {timedelta(seconds=round((self.total - self.done) / rate))} left of {self.total} images"
        print(text, file=sys.stderr, flush=True)
