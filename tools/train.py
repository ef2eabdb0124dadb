"""Train a network: python tools/train.py -c configs/quickstart.yaml"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs.load import load_config
from engine import runtime
from errors import UserError
from tools import cli


def main(arguments: argparse.Namespace) -> int:
    """Train the run of a config; returns 0, or 129, 130 or 143 when a signal stopped it after saving."""
    resumed = Path(arguments.resume) if arguments.resume else None
    if not arguments.config and not resumed:
        raise UserError("no config: name one with -c, for example -c configs/quickstart.yaml")
    if arguments.resume is not None and (arguments.overwrite or arguments.weights):
        raise UserError(f"--resume continues a run: give it without "
                        f"{'--overwrite' if arguments.overwrite else '--weights'}")
    if resumed and not (resumed / "config.yaml").is_file():
        raise UserError(f"{resumed} holds no run to resume: it has no config.yaml")
    config = load_config(arguments.config or resumed / "config.yaml", arguments.override)
    settings = runtime.prepare(config.RUNTIME.THREADS)

    from analysis.curves import draw_curves
    from analysis.grids import draw_predictions
    from engine.interrupts import Interrupted
    from engine.train import train

    try:
        train(config, resume=arguments.resume is not None, overwrite=arguments.overwrite, weights=arguments.weights,
              folder=resumed, settings=settings, after_epoch=draw_curves,
              at_end=lambda run: draw_predictions(config, run / "best_model.pdparams", run / "predictions.png"))
    except Interrupted as interrupted:
        return 128 + interrupted.signum
    return 0


def parser() -> argparse.ArgumentParser:
    result = cli.argument_parser(__doc__)
    result.add_argument("--resume", nargs="?", const="", metavar="RUN",
                        help="continue the run of the config, or the run in the folder RUN")
    result.add_argument("--overwrite", action="store_true", help="delete the run that is in the folder already")
    result.add_argument("--weights", default="", metavar="W",
                        help="start from the weights of a file, a run or a released checkpoint")
    return result


if __name__ == "__main__":
    cli.run(main, parser(), several_processes=True)
