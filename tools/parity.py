"""Compare our networks with the numbers of their reference implementations, and print the errors."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import runtime
from errors import UserError, nearest
from tools import cli
from utils import ROOT

EPILOG = """Errors of logits are relative to their standard deviation over classes, all others to the reference's
value; a dash: not in the fixture. The exit code is 1 if a network is not equal to its reference."""
HEADINGS = ("float32", "float64", "training", "loss", "gradients", "statistics")


def parser() -> argparse.ArgumentParser:
    result = cli.argument_parser(__doc__, config=False, epilog=EPILOG)
    result.add_argument("names", metavar="NAME", nargs="*", help="a fixture (default: all)")
    result.add_argument("--fixtures", metavar="FOLDER", type=Path, default=ROOT / "references",
                        help="read .json and .npz from this folder (default: references)")
    result.add_argument("--json", metavar="FILE", type=Path, help="also write the errors as JSON")
    return result


def main(arguments: argparse.Namespace) -> int:
    runtime.prepare()

    from analysis.parity import compare, fixture_names
    from utils.fileio import write_json

    known = fixture_names(arguments.fixtures)
    for name in arguments.names:
        if name not in known:
            raise UserError(f"{arguments.fixtures} has no fixture {name!r}{nearest(name, known)}")
    if not known:
        raise UserError(f"{arguments.fixtures} has no fixtures, expected pairs of NAME.json and NAME.npz")
    names = arguments.names or known
    width = max(map(len, names))
    print(" " * width + "".join(f"{heading:>11}" for heading in HEADINGS) + "   parameters  seconds")
    records = []
    for name in names:
        start = time.monotonic()
        parity = compare(name, arguments.fixtures)
        seconds = time.monotonic() - start
        records.append({"fixture": name, "parameters": parity.parameters,
                        "reference_parameters": parity.reference_parameters, **parity.errors, "missed": parity.missed,
                        "seconds": round(seconds, 1)})
        errors = ("–" if value is None else f"{value:.1e}" for value in parity.errors.values())
        print(f"{name:{width}}" + "".join(f"{error:>11}" for error in errors)
              + f" {parity.parameters:>12,} {seconds:>8.1f}", flush=True)
        for phrase in parity.missed:
            print(f"    not equal: {phrase}")
    missed = sum(bool(record["missed"]) for record in records)
    total = sum(record["seconds"] for record in records)
    print(f"{len(records) - missed} of {len(records)} equal their references, in {total:.0f} seconds")
    if arguments.json:
        write_json(arguments.json, records)
        print(f"wrote {arguments.json}")
    return 1 if missed else 0


if __name__ == "__main__":
    cli.run(main, parser())
