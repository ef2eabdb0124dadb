"""Try networks on a page: python tools/demo.py -w iformer_cifar"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import runtime
from tools import cli


def main(arguments: argparse.Namespace) -> None:
    runtime.prepare()

    from deploy.demo import build, launch

    launch(build(arguments.weights, Path(arguments.out)), arguments.host, arguments.port)


def parser() -> argparse.ArgumentParser:
    result = cli.argument_parser(__doc__, config=False)
    result.add_argument("-w", "--weights", nargs="*", default=[], metavar="NAME",
                        help="released checkpoints to offer first (default: all)")
    result.add_argument("--host", metavar="H", help="address to listen on (default: GRADIO_SERVER_NAME, 127.0.0.1)")
    result.add_argument("--port", type=int, metavar="P",
                        help="default: GRADIO_SERVER_PORT, or the first free one from 7860")
    result.add_argument("--out", default="output/demo", metavar="FOLDER", help="for uploads (default: output/demo)")
    return result


if __name__ == "__main__":
    cli.run(main, parser())
