"""Gather a run into one self-contained HTML page: python tools/report.py output/quickstart"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import runtime
from engine.released import find_released
from tools import cli
from utils.progress import batches


def main(arguments: argparse.Namespace) -> None:
    run = find_released(arguments.run) or Path(arguments.run)
    config = cli.config_of(arguments.run, arguments.override)
    runtime.prepare(config.RUNTIME.THREADS)

    from analysis.report import write_report

    runtime.start(config)
    with batches(f"{arguments.split} split", 0, "image") as bar:
        page = write_report(run, arguments.split, Path(arguments.out) if arguments.out else None, bar.update,
                            home=cli.work_folder(arguments.run, config), overrides=arguments.override)
    print(f"wrote {page}")


def parser() -> argparse.ArgumentParser:
    result = cli.argument_parser(__doc__, config=False)
    cli.add_override(result)
    result.add_argument("run", metavar="RUN", help="a run's folder, for example output/quickstart, or a name in "
                        "checkpoints/")
    result.add_argument("--split", default="test", choices=("test", "holdout", "train"), help="default: test")
    result.add_argument("--out", metavar="HTML", help="default: RUN/report.html")
    return result


if __name__ == "__main__":
    cli.run(main, parser())
