"""Compare engines on a released network: deviation, test accuracy, size, latency and throughput, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import paddle
from paddle import nn
from yacs.config import CfgNode

from deploy.engines import ENGINES, Run, installed, load_exported
from deploy.export import calibration_batches, export, log_probabilities

BATCH = 128
COLUMNS = ("network", "engine", "deviation", "top-1 %", "MB", "ms at batch 1", f"images/s at batch {BATCH}")


def compare(config: CfgNode, model: nn.Layer, name: str, images: np.ndarray, labels: np.ndarray, folder: Path,
            rounds: int = 5) -> list[dict[str, Any]]:
    """Export a network in every format and run it in every engine that is installed.

    Args:
        config: of the network.
        model: with its weights, on the CPU.
        name: for the table.
        images: transformed test images, float32 ``[N, 3, H, W]``.
        labels: ``[N]``.
        folder: for the exported models, one folder each.
        rounds: of timing; engines take turns, so that a busy machine slows all alike.

    Returns:
        A row for each engine with the keys ``COLUMNS``. Deviations are the largest of all test logits, in standard
        deviations of the network's.
    """
    runs: dict[str, tuple[Run, int]] = {"suite": (_network(model), sum(4 * p.size for p in model.parameters()))}
    for format in ("paddle", "onnx", "int8") if installed("onnxruntime") else ("paddle",):
        out = folder / f"{name}-{format}"
        calibration = calibration_batches(config) if format == "int8" else ()
        classes = [str(index) for index in range(config.MODEL.NUM_CLASSES)]
        export(config, model, out, classes, format=format, overwrite=out.exists(), calibration=calibration)
        size = sum(path.stat().st_size for path in out.iterdir() if path.name.startswith("inference"))
        for engine, (program, packages, _) in ENGINES.items():
            if (out / program).is_file() and installed(*packages):
                label = f"{engine} int8" if format == "int8" else engine
                runs[label] = load_exported(out, engine, config.RUNTIME.THREADS).run, size
        if format == "paddle" and installed("paddlex"):
            runs["paddlex"] = _paddlex(out, config), size
    outputs = {engine: _in_batches(run, images) for engine, (run, _) in runs.items()}
    expected = log_probabilities(outputs["suite"])
    latency, seconds = (_seconds({key: run for key, (run, _) in runs.items()}, images[:count], rounds)
                        for count in (1, BATCH))
    rows = []
    for engine, (_, size) in runs.items():
        deviation = np.abs(log_probabilities(outputs[engine]) - expected).max() / expected.std()
        rows.append(dict(zip(COLUMNS, (
            name, engine, "" if engine in ("suite", "paddlex") else f"{deviation:.1e}",
            f"{100 * (outputs[engine].argmax(1) == labels).mean():.2f}", f"{size / 1e6:.1f}",
            f"{1000 * latency[engine]:.2f}", f"{min(BATCH, len(images)) / seconds[engine]:.0f}"), strict=True)))
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return rows as a table."""
    lines = [COLUMNS, ["---"] * 2 + ["---:"] * (len(COLUMNS) - 2), *([row[key] for key in COLUMNS] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _network(model: nn.Layer) -> Run:
    def run(images: np.ndarray) -> np.ndarray:
        with paddle.no_grad():
            return model(paddle.to_tensor(images)).numpy()

    return run


def _paddlex(folder: Path, config: CfgNode) -> Run:
    """Return PaddleX's predictor behind the interface of the others: it undoes the normalisation to get pixels."""
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
        return scores

    return run


def _in_batches(run: Run, images: np.ndarray) -> np.ndarray:
    return np.concatenate([run(images[start : start + BATCH]) for start in range(0, len(images), BATCH)])


def _seconds(runs: dict[str, Run], images: np.ndarray, rounds: int) -> dict[str, float]:
    """Return each engine's median seconds for a batch, after a warm-up."""
    timed: dict[str, list[float]] = {key: [] for key in runs}
    for index in range(rounds + 1):
        for key, run in runs.items():
            seconds = _timed(lambda run=run: run(images))
            if index:
                timed[key].append(seconds)
    return {key: median(values) for key, values in timed.items()}


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
