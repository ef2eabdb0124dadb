"""Convert released weights, without PyTorch: python tools/convert.py poolformer_s12 s12.pth.tar s12.pdparams"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import runtime
from tools import cli

EPILOG = """SRC is PyTorch's (.pth, .pt, .pth.tar), .safetensors or .pdparams, recognised by its content; nothing in
it is executed. All must fit: what is missing, too much or of another shape is listed, and then nothing is written."""


def main(arguments: argparse.Namespace) -> None:
    runtime.prepare()

    from engine.weights import check_suffix, load_weights, save_weights
    from models import create_model

    check_suffix(arguments.dst)
    model = create_model(arguments.name, num_classes=1000 if arguments.num_classes is None else arguments.num_classes,
                         image_size=cli.image_size(arguments.image_size))
    mismatch = "refuse" if arguments.num_classes is None else "fresh_head"
    report = load_weights(model, arguments.src, num_classes_mismatch=mismatch, ema=arguments.ema)
    print("\n".join(report.lines(arguments.verbose)))
    save_weights(arguments.dst, model.state_dict())
    print(f"wrote {arguments.dst}: {arguments.name}, {model.num_classes} classes")


def parser() -> argparse.ArgumentParser:
    result = cli.argument_parser(__doc__, config=False, epilog=EPILOG)
    result.add_argument("name", metavar="NAME", help="a model, as tools/summary.py lists them")
    result.add_argument("src", metavar="SRC", help="the weights as published")
    result.add_argument("dst", metavar="DST", help="the file to write, .pdparams or .safetensors")
    result.add_argument("--num-classes", metavar="N", type=int,
                        help="classes of the converted network (default: 1000); another number than SRC's gives a "
                             "fresh classifier, and says so")
    cli.add_image_size(result, "tables and filters are resampled to it")
    result.add_argument("--ema", action="store_true", help="take the averaged weights of a training checkpoint")
    result.add_argument("--verbose", action="store_true", help="print every name, not only the counts")
    return result


if __name__ == "__main__":
    cli.run(main, parser())
