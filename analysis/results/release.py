"""Release a run: compact weights, the record of the run, and the metrics of that file.

A checkpoint's folder has ``model.safetensors`` (the selected weights; the final ones where DATA.HOLDOUT is 0, since
those were selected on the test set), ``config.yaml``, ``history.csv``, ``timing.csv``, ``train.log``,
``environment.json``, ``dataset.json``, ``results.json``, ``mistakes.csv`` (the test images that the file gets wrong),
``seeds.csv`` where there are several seeds, and ``SHA256SUMS`` of them all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from yacs.config import CfgNode

from analysis.complexity import count
from analysis.error_analysis import Advance, metrics_of, predict_split, write_errors
from analysis.results.run_record import read_environment, read_results, scrubber, seed_rows, training_record
from configs.load import dump_config, load_config
from engine.model import build_model
from engine.released import CONFIG, RESULTS, SUMS, WEIGHTS, file_sha256
from engine.run import read_table
from engine.weights import convert_state, read_weights, save_weights
from errors import UserError
from models import model_info
from utils.fileio import csv_text, read_json, replaced_folder, write_json, write_text

LARGEST = 10 << 20  # bytes of one file of weights
LARGEST_TOGETHER = 60_000_000  # bytes of all checkpoints in the repository
FLOAT32, FLOAT16 = "float32", "float16 (filters and matrices; the rest float32)"
_SELECTED = "best_model.pdparams"
_RECORD = ("history.csv", "timing.csv", "train.log", "dataset.json")


def release(run: Path, into: Path, *, name: str = "", data: str = "", seeds: Sequence[Path] = (),
            float16: bool = False, unfinished: bool = False, overwrite: bool = False,
            advance: Advance = lambda images: None) -> Path:
    """Make the folder ``into/NAME`` from a run, atomically, and return it.

    ``data`` is where the data set is now (default: the run's DATA.ROOT), ``seeds`` are runs of the same recipe with
    other seeds, ``float16`` stores filters and matrices in float16 even where float32 is small enough. Raises
    UserError where the run has no weights or has not ended (unless ``unfinished``), where the name is taken (unless
    ``overwrite``), and where the weights are too large.
    """
    config, chosen, weights = _selected(run, unfinished)
    name = name or config.NAME
    target = into / name
    if target.parent != into or not name.strip("."):
        raise UserError(f"--name is {name!r}, expected a name without slashes")
    if target.exists() and not overwrite:
        raise UserError(f"{target} is there already: replace it with --overwrite, or name another with --name")
    rows = seed_rows([run, *seeds]) if seeds else []
    arrays, precision = compact(convert_state(read_weights(weights), build_model(config)), LARGEST, float16=float16)
    with replaced_folder(target) as folder:
        save_weights(folder / WEIGHTS, arrays)
        _copy_record(run, config, folder, data)
        if rows:
            write_text(folder / "seeds.csv", csv_text(list(rows[0]), rows))
        config = load_config(run / CONFIG, [*([f"DATA.ROOT={data}"] if data else []), "RUNTIME.DEVICE=auto"])
        cost, info = count(build_model(config), config.DATA.IMAGE_SIZE), model_info(config.MODEL.NAME)
        found = predict_split(config, folder / WEIGHTS, advance=advance)
        write_errors(found, folder / "mistakes.csv")
        write_json(folder / RESULTS, {
            **(read_results(run) or {}), "name": config.NAME, "model": config.MODEL.NAME, "family": info.family,
            "paper": info.paper_url, "parameters": cost.parameters, "macs": cost.macs,
            "image_size": config.DATA.IMAGE_SIZE,
            "weights": {**chosen, "file": WEIGHTS, "bytes": (folder / WEIGHTS).stat().st_size, "precision": precision},
            "training": training_record(run, config, cost.macs), "test": [metrics_of(config, found, found.dataset)]})
        write_text(folder / SUMS, "".join(f"{file_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())))
    return target


def compact(arrays: dict[str, np.ndarray], largest: int, *, float16: bool = False) -> tuple[dict[str, np.ndarray], str]:
    """Return arrays in float32, or with filters and matrices in float16 if asked or too large, and the precision.

    Arrays of one axis (norms, biases, running statistics) stay float32. Raises UserError where float16 is too large
    too, or a value overflows.
    """
    floats = {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in arrays.items()}
    size = sum(array.nbytes for array in floats.values())
    if size <= largest and not float16:
        return floats, FLOAT32
    with np.errstate(over="ignore"):
        half = {name: array.astype(np.float16) if array.dtype.kind == "f" and array.ndim > 1 else array
                for name, array in floats.items()}
    if not all(np.isfinite(array).all() for array in half.values()):
        raise UserError(f"the weights have {size:,} bytes in float32, and values too large for float16")
    smaller = sum(array.nbytes for array in half.values())
    if smaller > largest:
        raise UserError(f"the weights have {size:,} bytes in float32 and {smaller:,} in float16, expected at most "
                        f"{largest:,}")
    return half, FLOAT16


def _selected(run: Path, unfinished: bool) -> tuple[CfgNode, dict[str, Any], Path]:
    """Return a run's config, which weights are released (kind, epoch), and their file."""
    missing = [name for name in (CONFIG, _SELECTED, "history.csv", "environment.json") if not (run / name).is_file()]
    if missing:
        raise UserError(f"{run} is no run with weights: it has no {' and no '.join(missing)}, as tools/train.py leaves "
                        "them")
    config, history, results = load_config(run / CONFIG), read_table(run / "history.csv"), read_results(run)
    reached = int(history[-1]["epoch"]) if history else 0
    whole = reached == config.TRAIN.EPOCHS and not config.TRAIN.MAX_STEPS
    if not (unfinished or (whole and results and results["final"]["epoch"] == reached)):
        raise UserError(f"{run} has not ended: epoch {reached} of {config.TRAIN.EPOCHS}"
                        f"{'' if results else ', no results.json'}; continue it with --resume, or release it with "
                        "--unfinished")
    if not results:
        best = max(history, key=lambda row: float(row["val_accuracy"] or -1), default={"epoch": 0})
        return config, {"kind": "selected", "epoch": int(best["epoch"])}, run / _SELECTED
    kind, file = ("selected", _SELECTED) if config.DATA.HOLDOUT else ("final", "final_model.pdparams")
    return config, {"kind": kind, "epoch": results[kind]["epoch"]}, run / file


def _copy_record(run: Path, config: CfgNode, folder: Path, data: str) -> None:
    """Copy the record of a run, without the names of this machine's folders."""
    clean = scrubber([run.absolute(), config.OUTPUT, *filter(os.path.isabs, [config.DATA.ROOT, data])])
    shown = config.clone()
    shown.defrost()
    shown.OUTPUT, shown.DATA.ROOT, shown.DATA.DOWNLOAD, shown.RUNTIME.DEVICE = "output", "data", True, "auto"
    write_text(folder / CONFIG, dump_config(shown))
    for name in _RECORD:
        if (run / name).is_file():
            write_text(folder / name, clean((run / name).read_text(encoding="utf-8")))
    read_environment(run)  # raises UserError unless it is the record of a run
    write_json(folder / "environment.json", clean(read_json(run / "environment.json")))
