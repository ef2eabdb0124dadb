"""Explain many images: arrays of each, one sheet, one JSON file, and the curves that compare the methods."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.explain.faithfulness import draw_curves, measure_curves, summarise
from analysis.explain.image_model import ImageModel
from analysis.explain.lime import SAMPLES, superpixels
from analysis.explain.methods import METHODS, Explanation, explain
from analysis.explain.sheet import draw_explanations
from utils.fileio import write_json
from utils.progress import batches


@dataclass(frozen=True)
class Picture:
    """An image to explain: its name, RGB uint8 ``[H, W, 3]`` of any size, and its class where known."""

    name: str
    image: np.ndarray
    label: int | None = None


@dataclass(frozen=True)
class Settings:
    """How to explain (see `methods.explain`); ``curves`` counts random rankings, ``cover`` is one of ``COVERS``."""

    methods: tuple[str, ...] = ("lime",)
    num_samples: int = SAMPLES
    superpixels: int = 0  # 0: InterpretDL's own
    layer: str = ""
    seed: int = 0
    curves: int = 0
    cover: str = "blur"


def explain_pictures(model: ImageModel, pictures: Sequence[Picture], settings: Settings, folder: Path,
                     name: str) -> dict[str, Any]:
    """Explain pictures; write ``<picture>_<method>.npz`` of each, ``<name>.png``, ``<name>.json`` and the curves.

    Returns the content of the JSON file. An interruption leaves the arrays of what was done.
    """
    found, records, curves = [], [], []
    config, titles = model.config, ", ".join(METHODS[method].title for method in settings.methods)
    print(f"{len(pictures)} images, {titles}, into {folder}", flush=True)
    for number, (picture, stem) in enumerate(zip(pictures, _stems(pictures), strict=True), start=1):
        image = model.prepare(picture.image)
        segments = superpixels(image, settings.superpixels) if settings.curves or "lime" in settings.methods else None
        found.append([])
        seconds = {}
        for method in settings.methods:
            started = time.perf_counter()
            with batches(f"{METHODS[method].title} {number}/{len(pictures)}, {picture.name}",
                         settings.num_samples if method == "lime" else 0, "image") as bar:
                model.advance = bar.update
                one = explain(model, image, method, picture.label, num_samples=settings.num_samples,
                              segments=segments, layer=settings.layer, seed=settings.seed)
            seconds[method] = round(time.perf_counter() - started, 3)
            one.save(folder / f"{stem}_{method}.npz")
            found[-1].append(one)
        model.advance = lambda images: None
        records.append(_report(model, picture.name, stem, found[-1]) | {"seconds": seconds})
        if settings.curves:
            curves.append(measure_curves(model, found[-1], segments, settings.curves, settings.seed, settings.cover))
    summary = {"config": config.NAME, "model": config.MODEL.NAME, "precision": config.RUNTIME.EVAL_PRECISION,
               "methods": list(settings.methods), "samples": settings.num_samples,
               "superpixels": settings.superpixels, "seed": settings.seed, "images": records}
    if curves:
        summary["curves"] = {"cover": settings.cover, **summarise(curves)}
        draw_curves(curves, folder / f"{name}_curves.png",
                    f"{config.NAME}: mean of {len(curves)} images, covered by {settings.cover}")
    write_json(folder / f"{name}.json", summary)
    draw_explanations(model, found, [picture.name for picture in pictures], folder / f"{name}.png",
                      f"{config.NAME}: {titles}" if len(settings.methods) == 1 else config.NAME)
    return summary


def _stems(pictures: Sequence[Picture]) -> list[str]:
    """Return the first part of the pictures' file names, each once."""
    stems: list[str] = []
    for picture in pictures:
        stem = re.sub(r"[^\w.-]+", "_", Path(picture.name).stem)
        again = sum(other == stem or other.startswith(f"{stem}~") for other in stems)
        stems.append(f"{stem}~{again + 1}" if again else stem)
    return stems


def _report(model: ImageModel, name: str, stem: str, explanations: Sequence[Explanation]) -> dict[str, Any]:
    """Return the JSON record of an image and print its line."""
    one = explanations[0]
    record = {"name": name, "files": stem, "predicted": model.class_name(one.classes[0]),
              "probability": float(one.probabilities[one.classes[0]]),
              "true": None if one.label is None else model.class_name(one.label)}
    line = f"{name}: {record['predicted']} {record['probability']:.1%}"
    line += f" (true: {record['true']})" if record["true"] else ""
    arrays = {name: array for each in explanations for name, array in each.arrays.items()}
    if "segments" in arrays:
        count, scores = int(arrays["segments"].max()) + 1, arrays["score"].tolist()
        record["lime"] = {"superpixels": count, "score": scores, "intercept": arrays["intercept"].tolist()}
        line += f"; LIME: {count} superpixels, R² {scores[0]:.2f}"
    if "layer" in arrays:
        record["layer"] = str(arrays["layer"])
        line += f"; CAM of {record['layer']}"
    print(line, flush=True)
    return record
