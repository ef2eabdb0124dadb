"""Export a network for inference engines: python tools/export.py -w output/quickstart exported"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import runtime
from tools import cli


def main(arguments: argparse.Namespace) -> None:
    """Write the program, its weights and ``inference.yml``, and print how far its logits are from the network's."""
    config = cli.config_of(arguments.weights, [*arguments.override, "RUNTIME.DEVICE=cpu"], arguments.config)
    runtime.prepare(config.RUNTIME.THREADS)

    from datasets import class_names
    from deploy.export import export
    from engine.data import trained_classes
    from engine.model import find_weights, load_model

    runtime.start(config)
    weights = find_weights(arguments.weights)
    classes = trained_classes(weights) or class_names(config.DATA.NAME, config.DATA.ROOT)
    model, _ = load_model(config, weights)
    folder = Path(arguments.out)
    deviations = export(config, model, folder, classes, format=arguments.format, logits=arguments.logits,
                        overwrite=arguments.overwrite)
    for path in sorted(folder.iterdir()):
        print(f"wrote {path}: {path.stat().st_size:,} bytes")
    for engine, deviation in deviations.items():
        print(f"{engine} gives the network's logits to {deviation:.1e} of their standard deviation")


def parser() -> argparse.ArgumentParser:
    result = cli.argument_parser(__doc__)
    cli.add_weights(result)
    result.add_argument("out", metavar="OUT", help="the folder to write")
    result.add_argument("--format", default="paddle", choices=("paddle", "onnx", "int8"),
                        help="default: paddle; int8: ONNX, calibrated on training images")
    result.add_argument("--logits", action="store_true", help="end with logits, not with a softmax")
    result.add_argument("--overwrite", action="store_true", help="replace an exported model there")
    return result


if __name__ == "__main__":
    cli.run(main, parser())
