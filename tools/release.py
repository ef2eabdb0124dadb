"""Release a run's weights in checkpoints/: python tools/release.py output/RUN"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import released, runtime
from errors import UserError
from tools import cli
from utils.progress import batches


def main(arguments: argparse.Namespace) -> None:
    run = Path(arguments.run)
    if released.find_released(arguments.run):
        raise UserError(f"{run} is a released checkpoint, expected the folder of a run")
    config = cli.config_of(arguments.run, ["RUNTIME.DEVICE=auto"])
    runtime.prepare(config.RUNTIME.THREADS)

    from analysis.results.release import LARGEST_TOGETHER, release
    from utils.fileio import read_json

    runtime.start(config)
    into = Path(arguments.into)
    with batches("test images", 0, "image") as bar:
        folder = release(run, into, name=arguments.name, data=arguments.data,
                         seeds=[Path(each) for each in arguments.seeds], float16=arguments.float16,
                         unfinished=arguments.unfinished, overwrite=arguments.overwrite, advance=bar.update)
    results = read_json(folder / released.RESULTS)
    weights, (test,) = results["weights"], results["test"]
    print(f"wrote {folder}: {weights['bytes']:,} bytes of weights, {weights['precision']}, epoch {weights['epoch']}")
    ece = f", ECE {test['ece']:.2%}" if "ece" in test else ""
    print(f"{test['data']}: top-1 {test['top1']:.4%} of {test['images']:,} images, loss {test['loss']:.6f}{ece}")
    if own := results.get(weights["kind"]):
        print(f"the run's {weights['kind']} weights (float32): top-1 {own['test']['top1']:.4%}")
    together = sum(path.stat().st_size for path in into.rglob("*") if path.is_file())
    if together > LARGEST_TOGETHER:
        print(f"{into} has {together:,} bytes now, more than the {LARGEST_TOGETHER:,} of the repository")
    print("for the head of the config:\n"
          f"# Result: {100 * test['top1']:.2f} % top-1 on {test['data']} (checkpoints/{folder.name}).")
    print("next: python tools/results.py --write RESULTS.md")


def parser() -> argparse.ArgumentParser:
    result = cli.argument_parser(__doc__, config=False)
    result.add_argument("run", metavar="RUN", help="the folder of a run that has ended")
    result.add_argument("--name", default="", metavar="N", help="of the checkpoint (default: the run's)")
    result.add_argument("--data", default="", metavar="ROOT", help="where the data set is (default: where it was)")
    result.add_argument("--seeds", nargs="+", default=[], metavar="RUN", help="runs of the recipe with other seeds")
    result.add_argument("--float16", action="store_true",
                        help="filters and matrices in float16 even where float32 has at most 10 MiB")
    result.add_argument("--unfinished", action="store_true", help="release a run that has not ended")
    result.add_argument("--overwrite", action="store_true", help="replace a checkpoint of that name")
    result.add_argument("--into", default=str(released.FOLDER), metavar="FOLDER", help="default: checkpoints/")
    return result


if __name__ == "__main__":
    cli.run(main, parser())
