"""Release a run's weights in checkpoints/: python tools/release.py output/RUN"""

from __future__ import annotations

import argparse
from pathlib import Path

import cli

from configs.load import load_config
from engine import runtime
from engine.weights import released


def main(arguments: argparse.Namespace) -> None:
    """Make the checkpoint's folder, and print its figures and the line for the config's head."""
    run = released.find_released(arguments.run) or Path(arguments.run)
    config = load_config(cli.config_of(argparse.Namespace(config=None, weights=arguments.run)),
                         ["RUNTIME.DEVICE=auto"])
    runtime.prepare(config.RUNTIME.THREADS)

    from analysis.results.release import LARGEST_TOGETHER, release

    runtime.start(config)
    with cli.batches("test images", 0, "image") as bar:
        def advance(done: int, images: int) -> None:
            if done < bar.n:
                bar.reset()
            bar.total = images
            bar.update(done - bar.n)

        made = release(run, Path(arguments.into), name=arguments.name, data=arguments.data, also=arguments.also,
                       seeds=[Path(each) for each in arguments.seeds], average=arguments.average,
                       float16=arguments.float16, unfinished=arguments.unfinished, overwrite=arguments.overwrite,
                       advance=advance)
    weights = made.results["weights"]
    print(f"wrote {made.folder}: {weights['bytes']:,} bytes of weights, {weights['precision']}, epoch "
          f"{weights['epoch']}")
    for row in made.results["test"]:
        ece = f", ECE {row['ece']:.2%}" if "ece" in row else ""
        print(f"{row['data']}: top-1 {row['top1']:.4%} of {row['images']:,} images, loss {row['loss']:.6f}{ece}")
    if "holdout_top1" in weights:
        print(f"on the held-out images: top-1 {weights['holdout_top1']:.2%}, the selected weights alone "
              f"{weights['selected_holdout_top1']:.2%}")
    own = made.results.get(weights["kind"])
    if own:
        print(f"the run's {weights['kind']} weights (float32): top-1 {own['test']['top1']:.4%}")
    if made.together > LARGEST_TOGETHER:
        print(f"{arguments.into} has {made.together:,} bytes now: the suite's own repository keeps to "
              f"{LARGEST_TOGETHER:,}")
    print(f"for the head of the config:\n{made.header()}")
    print("next: python tools/results.py --write RESULTS.md")


def parser() -> argparse.ArgumentParser:
    """Return the arguments of this command."""
    result = cli.argument_parser(__doc__, config=False)
    result.add_argument("run", metavar="RUN",
                        help="the folder of a run that has ended, or a released checkpoint to be made anew")
    result.add_argument("--name", default="", metavar="N", help="of the checkpoint (default: the run's)")
    result.add_argument("--data", default="", metavar="ROOT", help="where the data set is (default: where it was)")
    result.add_argument("--also", action="append", default=[], metavar="ROOT",
                        help="evaluate on this too, such as an .npz of other pixels (repeatable)")
    result.add_argument("--seeds", nargs="+", default=[], metavar="RUN", help="runs of the recipe with other seeds")
    result.add_argument("--average", action="store_true",
                        help="release the mean of the weights and of those of the checkpoint that the run started from")
    result.add_argument("--float16", action="store_true",
                        help="filters and matrices in float16 even where float32 has at most 10 MiB")
    result.add_argument("--unfinished", action="store_true", help="take a run that has not ended as it stands")
    result.add_argument("--overwrite", action="store_true", help="replace a checkpoint of that name")
    result.add_argument("--into", default=str(released.FOLDER), metavar="FOLDER", help="default: checkpoints/")
    return result


if __name__ == "__main__":
    cli.run(main, parser())
