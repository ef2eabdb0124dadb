"""Label images: python tools/predict.py -w output/quickstart FOLDER, or --index 0 1 2"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import runtime
from errors import UserError, printable
from tools import cli
from utils.progress import batches

SHOWN = 36  # images of the grid, and whose five likeliest classes are printed
GUESSES = 5


def main(arguments: argparse.Namespace) -> None:
    """Print the five likeliest classes of images, draw the first ones as a grid, and write a CSV of all."""
    if not arguments.images and not arguments.index:
        raise UserError("no images: name files or folders, or test images by --index 0 1 2")
    config = cli.config_of(arguments.weights, arguments.override, arguments.config)
    runtime.prepare(config.RUNTIME.THREADS)

    import numpy as np

    from analysis.grids import RIGHT, UNKNOWN, WRONG, class_name, draw_grid
    from datasets import build_dataset, class_names
    from datasets.files import expand_images, read_image
    from engine.data import check_classes
    from engine.model import predict
    from utils.fileio import write_text

    runtime.start(config)
    paths = list(expand_images(arguments.images))
    titles = [printable(path.name if len(arguments.images) == len(paths) else path, 300) for path in paths]
    loaded = cli.load_network(config, arguments.weights, arguments.engine)
    names = loaded.classes or class_names(config.DATA.NAME, config.DATA.ROOT)
    truths: list[str] = [""] * len(paths)
    if arguments.index:
        dataset = build_dataset(config.DATA, "test")
        check_classes(loaded.path, dataset, loaded.classes)
        for index in arguments.index:
            if not 0 <= index < len(dataset):
                raise UserError(f"--index {index}: expected 0 to {len(dataset) - 1}, the test images of {dataset.name}")
            titles.append(f"test image {index}")
            truths.append(names[dataset.labels[index]])

    count, size = len(titles), config.DATA.EVAL_BATCH_SIZE
    shown, probabilities = [], []
    with batches("predict", count, "image") as bar:
        for start in range(0, count, size):
            images = [read_image(paths[i]) if i < len(paths) else dataset.images[arguments.index[i - len(paths)]]
                      for i in range(start, min(start + size, count))]
            probabilities.append(predict(config, loaded.network, images))
            shown += images[: max(SHOWN - start, 0)]
            bar.update(len(images))

    captions, colours, table = [], [], io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["image", "true", *(f"{what}_{i + 1}" for i in range(GUESSES) for what in ("class", "probability"))])
    for position, (title, truth, found) in enumerate(zip(titles, truths, np.concatenate(probabilities), strict=True)):
        best = [(class_name(names, index), found[index]) for index in found.argsort()[::-1][:GUESSES]]
        image = printable(paths[position], 4096) if position < len(paths) else title
        rows.writerow([image, truth, *(cell for name, value in best for cell in (name, f"{value:.6f}"))])
        if position < SHOWN:
            print(f"{title}{f' (true: {truth})' if truth else ''}")
            for name, probability in best:
                print(f"  {name:<12} {probability:7.2%}")
            guess, probability = best[0]
            captions.append(f"{title[-22:]}\n{guess} {probability:.0%}" + (f"\ntrue: {truth}" if truth else ""))
            colours.append(UNKNOWN if not truth else RIGHT if guess == truth else WRONG)
    out = Path(arguments.out)
    draw_grid(shown, captions, colours, out)
    print(f"wrote {out}" + (f": the first {SHOWN} images" if count > SHOWN else ""))
    write_text(out.with_suffix(".csv"), table.getvalue())
    print(f"wrote {out.with_suffix('.csv')}: {count:,} images")


def parser() -> argparse.ArgumentParser:
    result = cli.argument_parser(__doc__)
    cli.add_weights(result, exported=True)
    result.add_argument("images", nargs="*", metavar="IMAGE", help="image files, or folders of them")
    result.add_argument("--index", type=int, nargs="+", default=[], metavar="I", help="test images by number")
    result.add_argument("--out", default="predictions.png", metavar="PNG",
                        help=f"the first {SHOWN} images (default: predictions.png); the .csv beside it has all")
    return result


if __name__ == "__main__":
    cli.run(main, parser())
