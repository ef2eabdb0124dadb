"""Grids of images with their predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from yacs.config import CfgNode

from analysis.figures import save_figure
from datasets import ImageDataset, build_dataset
from datasets.transforms import build_train_transforms
from engine.model import load_model, predict

RIGHT, WRONG, UNKNOWN = "#1a7f37", "#c62828", "#333333"


def draw_grid(images: Sequence[np.ndarray], captions: Sequence[str], colours: Sequence[str], path: Path,
              columns: int = 6, title: str = "") -> Path:
    """Write a grid of RGB images, uint8 ``[H, W, 3]`` each, with a coloured caption over each."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    lines = max(caption.count("\n") + 1 for caption in captions)
    figure = Figure(figsize=(1.75 * columns, (1.5 + 0.19 * lines) * rows + 0.4 * bool(title)), layout="constrained")
    figure.suptitle(title)
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
        if index < len(images):
            axes.imshow(images[index])
            axes.set_title(captions[index], color=colours[index], fontsize=9)
    return save_figure(figure, path)


def draw_augmented(config: CfgNode, dataset: ImageDataset, path: Path, count: int = 8, seed: int = 0) -> Path:
    """Write the first ``count`` images and, below each, one draw of its augmentation, in true colours."""
    transform, rng = build_train_transforms(config.AUGMENT, config.DATA.IMAGE_SIZE), np.random.default_rng(seed)
    mean, std = np.array(config.AUGMENT.MEAN), np.array(config.AUGMENT.STD)
    plain = [dataset.images[index] for index in range(count)]
    drawn = [transform(image, rng).transpose(1, 2, 0) * std + mean for image in plain]
    seen = [np.round(255 * image).clip(0, 255).astype(np.uint8) for image in drawn]
    captions = [dataset.class_names[label] for label in dataset.labels[:count]]
    height, width = seen[0].shape[:2]
    return draw_grid([*plain, *seen], [*captions, *[f"in training, {height}×{width}"] * count], 2 * count * [UNKNOWN],
                     path, columns=count)


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
