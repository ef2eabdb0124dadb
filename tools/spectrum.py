"""Fourier analysis of a network's feature maps: python tools/spectrum.py -w output/quickstart"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from yacs.config import CfgNode

from engine import runtime
from engine.released import find_released
from errors import UserError
from tools import cli
from utils.progress import batches


def main(arguments: argparse.Namespace) -> None:
    if arguments.count < 1:
        raise UserError(f"--count is {arguments.count}, expected 1 or more test images")
    runs = [(each, cli.config_of(each, arguments.override, arguments.config)) for each in arguments.weights]
    out = Path(arguments.out) if arguments.out else _default_out(runs)
    runtime.prepare(runs[0][1].RUNTIME.THREADS)

    from analysis.spectrum import analyse, draw_spectra
    from datasets import build_dataset
    from engine.model import load_model
    from utils.fileio import write_json

    spectra = []
    for weights, config in runs:
        runtime.start(config)
        model, _ = load_model(config, weights)
        dataset = build_dataset(config.DATA, "test")
        images = list(dataset.images[: arguments.count])
        title = config.NAME if len({each.NAME for _, each in runs}) == len(runs) else str(weights)
        with batches(title, len(images), "image") as bar:
            spectra.append(analyse(config, model, images, title, arguments.layers, advance=bar.update))
    for model in spectra:
        print(f"{model.title}: Δ log amplitude at the highest frequency, {arguments.count} test images")
        for row in model.rows():
            value = f"{row['relative_log_amplitude'][-1]:7.3f}" if len(row["frequencies"]) > 1 else "  one pixel"
            print(f"  stage {row['stage']}  {row['block']:<24} {row['map'][0]:>3}×{row['map'][1]:<3} {value}")
    print(f"wrote {draw_spectra(spectra, out)}")
    write_json(out.with_suffix(".json"), {model.title: model.rows() for model in spectra})
    print(f"wrote {out.with_suffix('.json')}")


def _default_out(runs: list[tuple[str, CfgNode]]) -> Path:
    weights, config = runs[0]
    if len(runs) > 1 or not (Path(weights).is_dir() or find_released(weights)):
        return Path("spectrum.png")
    return cli.work_folder(weights, config) / "spectrum.png"


def parser() -> argparse.ArgumentParser:
    result = cli.argument_parser(__doc__)
    result.add_argument("-w", "--weights", required=True, nargs="+", metavar="W",
                        help="run folders, .pdparams, .safetensors, PyTorch files, names in checkpoints/; several make "
                        "one figure")
    result.add_argument("--count", type=int, default=256, metavar="N", help="test images (default: the first 256)")
    result.add_argument("--layers", default="", metavar="REGEX", help="layers to look at (default: all blocks)")
    result.add_argument("--out", metavar="PNG", help="default: spectrum.png in the run's folder; a .json beside it")
    return result


if __name__ == "__main__":
    cli.run(main, parser())
