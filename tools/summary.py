"""Print the parameters and MACs of networks, beside their papers' figures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import runtime
from errors import UserError
from tools import cli
from utils.progress import batches

EPILOG = """Counted are convolutions, fully connected layers and matrix products, one MAC a multiply-accumulate;
"=" means that our figure rounds to the paper's."""


def parser() -> argparse.ArgumentParser:
    result = cli.argument_parser(__doc__, config=False, epilog=EPILOG)
    result.add_argument("names", metavar="NAME", nargs="*",
                        help="a model, or a pattern such as 'iformer_*' (default: all); paddle/NAME for Paddle's own")
    cli.add_image_size(result)
    result.add_argument("--num-classes", metavar="N", type=int, default=1000, help="default: 1000")
    result.add_argument("--json", metavar="FILE", type=Path, help="also write the table as JSON")
    result.add_argument("--write", metavar="PAGE", type=Path,
                        help="instead of printing, write the page of all models, with parity errors (minutes)")
    return result


def main(arguments: argparse.Namespace) -> None:
    runtime.prepare()
    image_size = cli.image_size(arguments.image_size)

    from analysis.formatting import text_table
    from analysis.results import zoo
    from utils.fileio import write_json

    if arguments.write:
        if arguments.names or arguments.image_size or arguments.num_classes != 1000:
            raise UserError("--write is for all models as published, expected neither NAME, --image-size nor "
                            "--num-classes with it")
        _write_page(arguments.write)
        return
    names, rows = zoo.select(arguments.names), []
    with batches("counting", len(names), "network") as bar:
        for name in names:
            rows.append(zoo.measure(name, arguments.num_classes, image_size))
            bar.update()
    print(text_table(zoo.TEXT_HEADINGS, map(zoo.text_cells, rows)))
    for note, about in zoo.notes(row.info for row in rows).items():
        print(f"  {', '.join(about)}: {note}")
    if arguments.json:
        write_json(arguments.json, [row.record() for row in rows])
        print(f"wrote {arguments.json}")


def _write_page(path: Path) -> None:
    from analysis.parity import REFERENCE, compare, fixture_names
    from analysis.results import zoo
    from utils.fileio import write_text

    names, fixtures = zoo.select([]), fixture_names(REFERENCE)
    rows, parities = {}, {}
    for name in names:
        rows[name] = zoo.measure(name)
        print(f"counted {len(rows)} of {len(names)}: {name}", flush=True)
    for name in fixtures:
        parities[name] = compare(name, REFERENCE)
        print(f"compared {len(parities)} of {len(fixtures)}: {name}", flush=True)
    write_text(path, zoo.page(rows, parities, fixtures))
    print(f"wrote {path}")


if __name__ == "__main__":
    cli.run(main, parser())
