"""Evaluate weights: python tools/eval.py -w output/quickstart"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import released, runtime
from errors import UserError
from tools import cli
from utils.progress import batches


def main(arguments: argparse.Namespace) -> None:
    """Print the metrics of one split; write them as JSON, as a table of batches and as a picture where asked."""
    if arguments.report_every < 1:
        raise UserError(f"--report-every is {arguments.report_every}, expected 1 or more")
    config = cli.config_of(arguments.weights, arguments.override, arguments.config)
    runtime.prepare(config.RUNTIME.THREADS)

    from analysis.confusion import confusion_table, draw_confusion
    from analysis.error_analysis import metrics_of
    from engine.data import build_eval_loader, check_classes
    from engine.evaluate import EvaluationReport, LabelSmoothingCrossEntropy, evaluate
    from utils.fileio import read_json, write_json

    checkpoint = released.find_released(arguments.weights)
    device, precision = runtime.start(config), config.RUNTIME.EVAL_PRECISION
    loaded = cli.load_network(config, arguments.weights, arguments.engine)
    print("\n".join(loaded.lines))
    loader = build_eval_loader(config, arguments.split)
    check_classes(loaded.path, loader.dataset, loaded.classes)
    with batches(f"{arguments.split} split", len(loader)) as bar:
        table = EvaluationReport(len(loader), arguments.report_every, bar.write if arguments.report else None)
        with runtime.autocast(precision):
            result = evaluate(loaded.network, loader, LabelSmoothingCrossEntropy(config.LOSS.LABEL_SMOOTHING),
                              lambda images: bar.update(), table.add)
    names = loader.dataset.class_names
    outputs = [*names, *(f"class {index}" for index in range(len(names), len(result.per_class)))]
    confusion, metrics = result.confusion.tolist(), metrics_of(config, result, loader.dataset)
    figures = {"model": config.MODEL.NAME, "weights": str(loaded.path), "dataset": loader.dataset.name,
               "split": arguments.split, **metrics, "confusion": confusion,
               "images_per_second": result.images_per_second, "device": loaded.engine or device,
               "precision": "" if loaded.engine else precision}

    print(f"{config.MODEL.NAME} on {metrics['data']}, {arguments.split}: {result.images:,} images, "
          f"{result.images_per_second:.1f} images/s on {loaded.engine or f'{device}, {precision}'}")
    print(f"top-1  {result.top1:8.4%}")
    if result.top5 is not None:
        print(f"top-5  {result.top5:8.4%}")
    print(f"loss   {result.loss:.6f} (label smoothing {config.LOSS.LABEL_SMOOTHING:g})")
    if "ece" in metrics:
        print(f"ECE    {metrics['ece']:8.4%} (calibration error, 15 bins)")
    if checkpoint and arguments.split == "test":
        print(_beside_recorded(metrics, read_json(checkpoint / released.RESULTS)["test"][0]))
    for name, accuracy in figures["per_class"].items():
        print(f"  {name:<12} {'no images' if accuracy is None else f'{accuracy:7.2%}'}")
    if len(outputs) > len(names):
        print(f"{len(outputs):,} outputs, {len(names)} classes: label k is compared with output k, see above")
    if len(outputs) <= 20:
        print(confusion_table(confusion, outputs))
    if arguments.report:
        table.write(Path(arguments.report))
        print(f"{table.summary()}\nwrote {arguments.report}")
    if arguments.json:
        write_json(Path(arguments.json), figures)
        print(f"wrote {arguments.json}")
    if arguments.confusion:
        title = f"{config.NAME}, {arguments.split}: top-1 {result.top1:.2%}"
        print(f"wrote {draw_confusion(confusion, outputs, Path(arguments.confusion), title)}")


def _beside_recorded(metrics: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Compare top-1 with that in a released checkpoint's ``results.json``."""
    if row["pixels_sha256"] != metrics["pixels_sha256"]:
        return f"released with {row['top1']:.2%} on {row['data']}, {row['images']:,} images: other images than these"
    images = round((metrics["top1"] - row["top1"]) * row["images"])
    change = "the same here" if not images else f"{abs(images)} images {'fewer' if images < 0 else 'more'} here"
    return f"released with {row['top1']:.2%} on these images ({row['data']}): {change}"


def parser() -> argparse.ArgumentParser:
    result = cli.argument_parser(__doc__)
    cli.add_weights(result, exported=True)
    result.add_argument("--split", default="test", choices=("test", "holdout", "train"), help="default: test")
    result.add_argument("--json", metavar="F", help="write all metrics to this file")
    result.add_argument("--confusion", metavar="PNG", help="draw the confusion matrix")
    result.add_argument("--report", metavar="CSV", help="print time, images/s, loss and accuracies of some batches, "
                        "with running means, and write them to this file")
    result.add_argument("--report-every", type=int, default=10, metavar="N", help="batches between them (default: 10)")
    return result


if __name__ == "__main__":
    cli.run(main, parser())
