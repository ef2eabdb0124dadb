"""Compare inference engines: python tools/engines.py -w iformer_cifar coatnet_cifar --out output/engines"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import runtime
from tools import cli


def main(arguments: argparse.Namespace) -> None:
    """Export networks in every format, run them in every installed engine on the test images, and print a table."""
    threads = os.cpu_count() or 1
    os.environ["KMP_BLOCKTIME"] = "1"  # milliseconds: else Paddle's idle threads hold a core for 0.2 s of the next turn
    runtime.prepare(threads)

    import numpy as np

    from datasets import build_dataset
    from datasets.transforms import build_eval_transforms
    from deploy.compare import compare, markdown
    from engine.model import load_model
    from utils.fileio import write_text

    folder, results = Path(arguments.out), {}
    for name in arguments.weights:
        config = cli.config_of(name, [*arguments.override, "RUNTIME.DEVICE=cpu", f"RUNTIME.THREADS={threads}"])
        runtime.start(config)
        dataset = build_dataset(config.DATA, "test")
        count = arguments.count or len(dataset)
        transform = build_eval_transforms(config.AUGMENT, config.DATA.IMAGE_SIZE)
        images = transform.batch(dataset.images, np.arange(count), (0,))
        model, _ = load_model(config, name)
        results[name] = compare(config, model, images, dataset.labels[:count], folder)
        write_text(folder / "engines.md", markdown(results) + "\n")
        print(f"compared {len(results)} of {len(arguments.weights)}: {name}", flush=True)
    print(markdown(results))
    print(f"wrote {folder / 'engines.md'}")


def parser() -> argparse.ArgumentParser:
    result = cli.argument_parser(__doc__, config=False)
    result.add_argument("-w", "--weights", nargs="+", required=True, metavar="W", help="run folders or released names")
    cli.add_override(result)
    result.add_argument("--count", type=int, default=0, metavar="N", help="the first N test images (default: all)")
    result.add_argument("--out", default="output/engines", metavar="FOLDER", help="default: output/engines")
    return result


if __name__ == "__main__":
    cli.run(main, parser())
