"""Label images: python tools/predict.py -w output/quickstart --index 0 1 2"""

from __future__ import annotations

import argparse
from pathlib import Path

import cli

from configs.load import load_config
from engine import runtime
from errors import UserError


def main(arguments: argparse.Namespace) -> None:
    """Print the five likeliest classes of image files or test images and draw them as a grid."""
    if not arguments.images and not arguments.index:
        raise UserError("no images: name files, or test images by --index 0 1 2")
    config = load_config(cli.config_of(arguments), arguments.override)
    runtime.prepare(config.RUNTIME.THREADS)

    from analysis.grids import RIGHT, UNKNOWN, WRONG, class_name, draw_grid
    from datasets import build_dataset, class_names
    from datasets.files import read_image
    from engine.data import check_classes, trained_classes
    from engine.model import find_weights, load_model, predict

    runtime.start(config)
    images = [read_image(Path(path)) for path in arguments.images]
    titles = [Path(path).name for path in arguments.images]
    truths: list[str | None] = [None] * len(images)
    weights = find_weights(arguments.weights)
    names = trained_classes(weights) or class_names(config.DATA.NAME, config.DATA.ROOT)
    if arguments.index:
        dataset = build_dataset(config.DATA, "test")
        check_classes(weights, dataset)
        for index in arguments.index:
            if not 0 <= index < len(dataset):
                raise UserError(f"--index {index}: expected 0 to {len(dataset) - 1}, the test images of {dataset.name}")
            images.append(dataset.images[index])
            titles.append(f"test image {index}")
            truths.append(names[dataset.labels[index]])
    model, _ = load_model(config, weights)
    probabilities = predict(config, model, images)

    captions, colours = [], []
    for title, truth, shares in zip(titles, truths, probabilities, strict=True):
        best = shares.argsort()[::-1][:5]
        guess = class_name(names, best[0])
        print(f"{title}{f' (true: {truth})' if truth else ''}")
        for index in best:
            print(f"  {class_name(names, index):<12} {shares[index]:7.2%}")
        captions.append(f"{title[:22]}\n{guess} {shares[best[0]]:.0%}" + (f"\ntrue: {truth}" if truth else ""))
        colours.append(UNKNOWN if truth is None else RIGHT if guess == truth else WRONG)
    print(f"wrote {draw_grid(images, captions, colours, Path(arguments.out))}")


def parser() -> argparse.ArgumentParser:
    """Return the arguments of this command."""
    result = cli.argument_parser(__doc__)
    cli.add_weights(result)
    result.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    result.add_argument("--index", type=int, nargs="+", default=[], metavar="I", help="test images by number")
    result.add_argument("--out", default="predictions.png", metavar="PNG", help="the grid (default: predictions.png)")
    return result


if __name__ == "__main__":
    cli.run(main, parser())
