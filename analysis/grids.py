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
    """Write the first ``count`` test images with prediction and truth."""
    dataset = build_dataset(config.DATA, "test")
    images = list(dataset.images[:count])
    probabilities = predict(config, load_model(config, weights)[0], images)
    return draw_guesses(images, probabilities, dataset.labels[:count], dataset.class_names, path,
                        f"{config.NAME}: first {count} test images")


def draw_guesses(images: Sequence[np.ndarray], probabilities: np.ndarray, labels: np.ndarray, names: Sequence[str],
                 path: Path, title: str = "") -> Path:
    """Write a grid of images with prediction (``probabilities`` ``[N, num_classes]``) and truth, green where equal."""
    guesses = probabilities.argmax(1)
    captions = [f"{class_name(names, guess)} {share:.0%}\ntrue: {names[label]}"
                for guess, share, label in zip(guesses, probabilities.max(1), labels, strict=True)]
    return draw_grid(images, captions, [RIGHT if right else WRONG for right in guesses == labels], path, title=title)


def class_name(names: Sequence[str], index: int) -> str:
    """Return a class's name, or its number where the head has more outputs than the dataset classes."""
    return names[index] if index < len(names) else f"class {index}"
