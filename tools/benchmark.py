"""Measure speed on this machine as ratios to stock Paddle and to other programs in the same run."""

from __future__ import annotations

import argparse
import io
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.benchmark.measure import NUM_CLASSES, WORKS, Plan, measure
from errors import UserError
from tools import cli
from utils.progress import batches

EPILOG = """All take turns, round by round, in processes of their own. docs/PERFORMANCE.md explains the results, how to
compare with PyTorch, ONNX Runtime and OpenVINO, and what --against COMMAND has to answer."""


def parser() -> argparse.ArgumentParser:
    result = cli.argument_parser(__doc__, config=False, epilog=EPILOG)
    result.add_argument("--models", metavar="NAME", nargs="*",
                        help="default: one network of every family; none: only write")
    result.add_argument("--image-sizes", metavar="S", nargs="+", type=int, help="default: 32 224")
    result.add_argument("--batch-size", metavar="B", nargs="+", type=int,
                        help="one for all image sizes, or one for each (default: 32 2)")
    result.add_argument("--rounds", metavar="N", type=int, help="default: 3")
    result.add_argument("--quick", action="store_true", help="the first network at the first size, under a minute")
    result.add_argument("--against", metavar="COMMAND", action="append", default=[],
                        help="another program to time beside (repeatable)")
    result.add_argument("--no-stock", action="store_true", help="leave out stock Paddle")
    result.add_argument("--export", metavar="DIR", type=Path,
                        help="only write the networks as ONNX programs, for --against")
    result.add_argument("--json", metavar="FILE", type=Path, help="write all results to this file")
    result.add_argument("--start-from", metavar="FILE", type=Path, help="earlier results, replaced where measured")
    result.add_argument("--write", metavar="PAGE", type=Path, help="put the tables into this page, the plot beside it")
    result.add_argument("--worker", choices=("suite", "suite bf16", "stock"), help=argparse.SUPPRESS)
    return result


def main(arguments: argparse.Namespace) -> None:
    """Measure, print the tables, and write what is asked for; after Ctrl-C too."""
    if arguments.worker:
        serve_suite(arguments.worker)
        return
    from analysis.benchmark.tables import check_page, draw, tables, write_page
    from analysis.formatting import text_table
    from utils.fileio import read_json, write_json

    plan = plan_of(arguments)
    if arguments.export:
        export_networks(plan, arguments.export)
        return
    if arguments.write:
        check_page(arguments.write)
    results = read_json(arguments.start_from) if arguments.start_from else {}
    if results and "machine" not in results:
        raise UserError(f"{arguments.start_from}: not results of this command, expected what --json wrote")
    if not (plan.models or results):
        raise UserError("--models is empty, expected a network, or the results of --start-from")
    try:
        with batches("benchmark", 1 + len(WORKS) * len(plan.models) * len(plan.image_sizes)) as bar:
            def report(text: str) -> None:
                bar.write(text, file=sys.stderr)
                bar.update()

            if plan.models:
                measure(plan, results, report)
    finally:
        for found in tables(results).values():
            print("\n".join([found.title, text_table(found.headings, found.rows), *found.notes, ""]))
        if arguments.json and results:
            write_json(arguments.json, results)
            print(f"wrote {arguments.json}")
    if arguments.write:
        write_page(arguments.write, results)
        picture = draw(results, arguments.write.with_name("performance.png"))
        print(f"wrote {arguments.write} and {picture}")


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return the plan that the arguments ask for; raises UserError for invalid names and numbers."""
    plan = Plan()
    if arguments.quick:
        plan = replace(plan, models=plan.models[:1], image_sizes=plan.image_sizes[:1], batch_sizes=plan.batch_sizes[:1],
                       rounds=2, seconds=0.3)
    sizes = tuple(arguments.image_sizes or plan.image_sizes)
    batches = tuple(arguments.batch_size or (plan.batch_sizes if len(plan.batch_sizes) == len(sizes) else (8,)))
    batches = batches * len(sizes) if len(batches) == 1 else batches
    if len(batches) != len(sizes):
        raise UserError(f"--batch-size has {len(batches)} numbers, expected one, or {len(sizes)} as --image-sizes")
    for name, values, largest in (("--image-sizes", sizes, 4096), ("--batch-size", batches, 65536),
                                  ("--rounds", (plan.rounds if arguments.rounds is None else arguments.rounds,), 1000)):
        wrong = [value for value in values if not 1 <= value <= largest]
        if wrong:
            raise UserError(f"{name} has {wrong[0]}, expected 1 to {largest}")
    models = plan.models if arguments.models is None else tuple(arguments.models)
    return replace(plan, models=models, image_sizes=sizes, batch_sizes=batches, rounds=arguments.rounds or plan.rounds,
                   against=tuple(arguments.against), stock=not arguments.no_stock)


def export_networks(plan: Plan, folder: Path) -> None:
    """Write each network with new weights to ``folder/NAME_SIZE``, unless it is there."""
    from engine import runtime

    runtime.prepare()

    from configs.load import load_config
    from deploy.export import export
    from models import create_model

    for size in plan.image_sizes:
        for name in plan.models:
            made = folder / f"{name}_{size}"
            if not made.exists():
                config = load_config(None, [f"MODEL.NAME={name}", f"MODEL.NUM_CLASSES={NUM_CLASSES}",
                                            f"DATA.IMAGE_SIZE={size}"])
                model = create_model(name, NUM_CLASSES, size)
                model.eval()
                export(config, model, made, [str(index) for index in range(NUM_CLASSES)], format="onnx", logits=True)
            print(f"wrote {made}")


def serve_suite(name: str) -> None:
    """Answer questions until the input ends; ``name`` is suite, suite bf16, or stock for Paddle as it starts alone."""
    settings = []
    if name == "stock":
        with redirect_stderr(io.StringIO()):  # Paddle warns of every OMP_NUM_THREADS but 1
            import paddle  # noqa: F401
    else:
        from engine import runtime

        settings = runtime.prepare()
    from analysis.benchmark.opponents import serve
    from analysis.benchmark.worker import Suite

    serve(Suite(name, settings))


if __name__ == "__main__":
    cli.run(main, parser())
