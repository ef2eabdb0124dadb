"""Grids of images in their true colours, labelled with what a network says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from yacs.config import CfgNode

from analysis.figures import save_figure
from datasets import build_dataset
from engine.predictor import load_model, predict

RIGHT, WRONG, UNKNOWN = "#1a7f37", "#c62828", "#333333"


def draw_grid(images: Sequence[np.ndarray], captions: Sequence[str], colours: Sequence[str], path: Path,
              columns: int = 6, title: str = "") -> Path:
    """Write a grid of RGB images, uint8 ``[H, W, 3]`` each, with a coloured caption over each."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    lines = max(caption.count("\n") + 1 for caption in captions)
    figure = Figure(figsize=(1.75 * columns, (1.5 + 0.19 * lines) * rows + 0.4 * bool(title)), layout="constrained")
    figure.suptitle(title)
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
        if place < len(images):
            axes.imshow(images[place])
            axes.set_title(captions[place], color=colours[place], fontsize=9)
    return save_figure(figure, path)


def draw_predictions(config: CfgNode, weights: str | Path, path: Path, count: int = 18) -> Path:
    """Write the first ``count`` test images with prediction and truth, green where they agree, red elsewhere."""
    dataset = build_dataset(config.DATA, "test")
    images = dataset.images[:count]
    model, _ = load_model(config, weights)
    probabilities = predict(config, model, images)
    predicted = probabilities.argmax(1)
    captions, colours = [], []
    for guess, share, label in zip(predicted, probabilities.max(1), dataset.labels[:count], strict=True):
        guessed = class_name(dataset.class_names, guess)
        captions.append(f"{guessed} {share:.0%}\ntrue: {dataset.class_names[label]}")
        colours.append(RIGHT if guess == label else WRONG)
    return draw_grid(list(images), captions, colours, path, title=f"{config.NAME}: first {count} test images")


def class_name(names: Sequence[str], index: int) -> str:
    """Return a class's name, or its number where the head has more outputs than the dataset classes."""
    return names[index] if index < len(names) else f"class {index}"
