"""Explain predictions: python tools/explain.py -w output/quickstart --index 0"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import runtime
from errors import UserError
from tools import cli

FORWARD_ONLY = {"lime", "occlusion"}  # methods for exported networks


def main(arguments: argparse.Namespace) -> None:
    _check(arguments)
    config = cli.config_of(arguments.weights, arguments.override, arguments.config)
    runtime.prepare(config.RUNTIME.THREADS)

    from analysis.explain.faithfulness import curves_text
    from analysis.explain.gallery import Picture, Settings, explain_pictures
    from analysis.explain.image_model import ImageModel
    from analysis.explain.lime import load_interpretdl
    from analysis.explain.methods import method_names
    from datasets import build_dataset
    from datasets.files import read_image

    methods = method_names(arguments.method)
    if cli.exported_folder(arguments.weights) and not {*methods} <= FORWARD_ONLY:
        raise UserError(f"--method {arguments.method} needs gradients or feature maps, which the exported network of "
                        f"{arguments.weights} does not give: expected {' or '.join(sorted(FORWARD_ONLY))}")
    if "lime" in methods or arguments.curves:
        load_interpretdl()  # raises UserError before anything is computed
    runtime.start(config)
    pictures = [Picture(Path(path).name, read_image(Path(path))) for path in arguments.images]
    if arguments.index or arguments.count:
        dataset = build_dataset(config.DATA, "test")
        for index in [*arguments.index, *range(min(arguments.count, len(dataset)))]:
            if not 0 <= index < len(dataset):
                raise UserError(f"--index {index}: expected 0 to {len(dataset) - 1}, the test images of {dataset.name}")
            pictures.append(Picture(f"test image {index}", dataset.images[index], int(dataset.labels[index])))
    model = ImageModel(config, cli.load_network(config, arguments.weights, arguments.engine).network)
    settings = Settings(methods, arguments.samples, arguments.superpixels, arguments.layer, arguments.seed,
                        arguments.curves, arguments.cover)
    folder = Path(arguments.out) if arguments.out else cli.work_folder(arguments.weights, config) / "explain"
    summary = explain_pictures(model, pictures, settings, folder, arguments.method)
    if "curves" in summary:
        print(curves_text(summary["curves"]))
        print(f"wrote {folder / f'{arguments.method}_curves.png'}")
    print(f"wrote {folder / f'{arguments.method}.png'}")
    print(f"wrote {folder / f'{arguments.method}.json'}, and the arrays of each image as .npz")


def _check(arguments: argparse.Namespace) -> None:
    if not (arguments.images or arguments.index or arguments.count):
        raise UserError("no images: name files, or test images by --index 0 1 2 or --count 12")
    for name, smallest in (("count", 0), ("samples", 1), ("superpixels", 0), ("curves", 0), ("seed", 0)):
        if not smallest <= getattr(arguments, name) < 2**32:
            raise UserError(f"--{name} is {getattr(arguments, name)}, expected {smallest} or more")


def parser() -> argparse.ArgumentParser:
    result = cli.argument_parser(__doc__)
    cli.add_weights(result, exported=True)
    result.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    result.add_argument("--index", type=int, nargs="+", default=[], metavar="I", help="test images by number")
    result.add_argument("--count", type=int, default=0, metavar="N", help="the first N test images")
    result.add_argument("--method", default="lime", metavar="M",
                        help="lime gradcam scorecam ig smoothgrad occlusion all")
    result.add_argument("--samples", type=int, default=10_000, metavar="N",
                        help="LIME's perturbed images (default: 10000)")
    result.add_argument("--superpixels", type=int, default=0, metavar="N",
                        help="about N, by SLIC (default: quickshift)")
    result.add_argument("--layer", default="", metavar="L", help="of the CAMs (default: the last of 4×4 or more)")
    result.add_argument("--curves", type=int, nargs="?", const=10, default=0, metavar="R",
                        help="deletion, insertion, R random rankings (10)")
    result.add_argument("--cover", choices=("blur", "colour", "superpixels"), default="blur", metavar="C",
                        help="by which pixels: blur (default), colour, superpixels")
    result.add_argument("--seed", type=int, default=0, metavar="S", help="of LIME's samples and random rankings")
    result.add_argument("--out", metavar="FOLDER", help="default: explain/ in the run's folder")
    return result


if __name__ == "__main__":
    cli.run(main, parser())
