"""List the released checkpoints: python tools/results.py"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import released
from tools import cli
from utils import ROOT


def main(arguments: argparse.Namespace) -> None:
    from analysis.results.page import PLOT, page, read_released, terminal_table
    from utils.fileio import read_csv, write_text

    trained = read_released(Path(arguments.checkpoints))
    if not arguments.write:
        print(terminal_table(trained) if trained else f"no released checkpoints in {arguments.checkpoints}")
        return
    published = read_csv(ROOT / "analysis" / "published.csv")
    out = Path(arguments.write)
    write_text(out, page(trained, published))
    print(f"wrote {out}: {len(trained)} released checkpoints")
    if trained:
        from analysis.results.plot import draw_results, points

        print(f"wrote {draw_results(points(trained, published), out.parent / PLOT)}")


def parser() -> argparse.ArgumentParser:
    result = cli.argument_parser(__doc__, config=False)
    result.add_argument("--write", metavar="PAGE", help="write the page, and docs/results.png beside it")
    result.add_argument("--checkpoints", default=str(released.FOLDER), metavar="FOLDER", help="default: checkpoints/")
    return result


if __name__ == "__main__":
    cli.run(main, parser())
