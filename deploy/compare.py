"""Compare engines on a released network: deviation, test accuracy, size, latency and throughput, in one run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import paddle
from paddle import nn
from yacs.config import CfgNode

from analysis.formatting import table
from deploy.engines import ENGINES, Run, installed, load_exported
from deploy.export import export, log_probabilities

BATCH = 128
SINGLE_IMAGES = 20  # of the latency
METRICS = ("top-1 %", "deviation", "MB", "ms at batch 1", f"images/s at batch {BATCH}")


def compare(config: CfgNode, model: nn.Layer, images: np.ndarray, labels: np.ndarray,
            folder: Path) -> dict[str, list[str]]:
    """Export a network in every format, into folders in ``folder``, and run it in every engine that is installed.

    ``images`` are transformed test images, float32 ``[N, 3, H, W]``, ``labels`` ``[N]``. Returns the ``METRICS`` of
    each engine, as text. Deviations are the largest of all test logits, in standard deviations of the network's.
    """
    runs: dict[str, Run] = {"suite": lambda images: model(paddle.to_tensor(images)).numpy()}
    sizes = {"suite": sum(4 * parameter.size for parameter in model.parameters())}
    for format in ("paddle", "onnx", "int8") if installed("onnxruntime") else ("paddle",):
        out = folder / f"{config.NAME}-{format}"
        classes = [str(index) for index in range(config.MODEL.NUM_CLASSES)]
        export(config, model, out, classes, format=format, overwrite=out.exists())
        size = sum(path.stat().st_size for path in out.iterdir() if path.name.startswith("inference"))
        if format == "int8":
            runs["onnxruntime int8"] = load_exported(out, "onnxruntime", config.RUNTIME.THREADS).run
        else:
            for name, engine in ENGINES.items():
                if engine.program_in(out) and installed(*engine.packages):
                    runs[name] = load_exported(out, name, config.RUNTIME.THREADS).run
        if format == "paddle" and installed("paddlex"):
            runs["paddlex"] = _paddlex(out, config)
        sizes.update(dict.fromkeys(runs.keys() - sizes.keys(), size))
    _, latency = _take_turns(runs, [images[:1]] * SINGLE_IMAGES)
    outputs, seconds = _take_turns(runs, (images[start : start + BATCH] for start in range(0, len(images), BATCH)))
    expected, found = log_probabilities(outputs["suite"]), {}
    for engine in runs:
        deviation = np.abs(log_probabilities(outputs[engine]) - expected).max() / expected.std()
        found[engine] = [f"{100 * (outputs[engine].argmax(1) == labels).mean():.2f}",
                         "–" if engine in ("suite", "paddlex") else f"{deviation:.1e}", f"{sizes[engine] / 1e6:.1f}",
                         f"{1000 * latency[engine]:.2f}", f"{min(BATCH, len(images)) / seconds[engine]:.0f}"]
    return found


def markdown(results: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    """Return results of ``compare`` by network as a table: a row a network, a column an engine."""
    engines = list(dict.fromkeys(engine for found in results.values() for engine in found))
    rows = ([name, *map("<br>".join, [METRICS, *(found.get(engine, ()) for engine in engines)])]
            for name, found in results.items())
    return table(["network", "", *engines], rows, {"network", ""})


def _paddlex(folder: Path, config: CfgNode) -> Run:
    """Return PaddleX's predictor behind the interface of the others: it undoes the normalisation to get pixels."""
    from paddle.base.core import set_num_threads
    from paddlex import create_model

    import deploy.paddlex  # noqa: F401

    model = create_model(model_name=config.MODEL.NAME, model_dir=str(folder),
                         engine_config={"cpu_threads": config.RUNTIME.THREADS or 1})
    mean, std = (np.reshape(value, (3, 1, 1)) for value in (config.AUGMENT.MEAN, config.AUGMENT.STD))

    def run(images: np.ndarray) -> np.ndarray:
        pixels = ((images * std + mean) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)[..., ::-1]
        scores = np.zeros((len(images), config.MODEL.NUM_CLASSES), np.float32)
        for row, result in zip(scores, model.predict(list(pixels), batch_size=len(images)), strict=True):
            row[result["class_ids"]] = result["scores"]
        set_num_threads(config.RUNTIME.THREADS or 1)  # Paddle inference leaves one thread to the rest of the process
        return scores

    return run


@paddle.no_grad()
def _take_turns(runs: dict[str, Run], batches: Iterable[np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Return each engine's logits, and its median seconds for a batch; a busy machine slows all alike."""
    outputs: dict[str, list[np.ndarray]] = {key: [] for key in runs}
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    for batch in batches:
        for key, run in runs.items():
            start = time.perf_counter()
            outputs[key].append(run(batch))
            seconds[key].append(time.perf_counter() - start)
    return ({key: np.concatenate(parts) for key, parts in outputs.items()},
            {key: median(times) for key, times in seconds.items()})
