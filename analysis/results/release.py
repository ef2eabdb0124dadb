"""From a run to a released checkpoint, or from one anew: small weights, their record, and the figures of the file.

A checkpoint's folder holds ``model.safetensors`` (the selected weights, or their mean with those that the run started
from; the final ones of a run that held no images out, since those were selected on the test set), ``config.yaml``,
``history.csv``, ``timing.csv``, ``train.log``, ``environment.json``, ``dataset.json``, ``results.json``,
``mistakes.csv`` (the test images that the file gets wrong), where there are several seeds ``seeds.csv``, and
``SHA256SUMS`` of them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from paddle import nn
from yacs.config import CfgNode

from analysis.complexity import count
from analysis.error_analysis import Predictions, metrics_of, predict_loader
from analysis.results.run_record import (
    Scrubber,
    cost_before,
    first_weights,
    machines,
    read_environment,
    read_results,
    released_start,
    seed_rows,
    seeds_csv,
    training_command,
    training_cost,
)
from configs.load import dump_config, load_config
from datasets.origin import origin
from engine.data import build_eval_loader, check_classes
from engine.history import read_table
from engine.model import build_model, load_model
from engine.weights.load import convert_state, read_weights, save_weights
from engine.weights.released import CONFIG, RESULTS, SUMS, WEIGHTS, check_released, file_sha256
from errors import UserError
from models import model_info
from utils.fileio import read_json, replaced_folder, write_json, write_text

LARGEST = 10 << 20  # bytes of one file of weights
LARGEST_TOGETHER = 60_000_000  # bytes of all checkpoints that the suite itself carries
FLOAT32, FLOAT16 = "float32", "float16 (filters and matrices; the rest float32)"
_SELECTED = "best_model.pdparams"
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class _Source:
    """What a checkpoint is made from: a run, or for one anew a released checkpoint."""

    folder: Path
    config: CfgNode
    name: str
    weights: Path
    chosen: dict[str, Any]  # which of a run's weights these are: kind and epoch
    ended: dict[str, Any]  # results.json, as far as there is one
    training: dict[str, Any] | None  # as recorded in a released checkpoint


@dataclass(frozen=True)
class Release:
    """A released checkpoint's folder, what its ``results.json`` holds, and how much it and those beside it do."""

    folder: Path
    results: dict[str, Any]
    together: int  # bytes of all checkpoints in its parent

    def header(self) -> str:
        """Return the lines that tell the result in the head of the run's config."""
        told = [f"{100 * row['top1']:.2f} % top-1 on {row['data']}" for row in self.results["test"]]
        return "# Result: " + ";\n# ".join(told) + f" (checkpoints/{self.folder.name})."


def release(run: Path, into: Path, *, name: str = "", data: str = "", also: Sequence[str] = (),
            seeds: Sequence[Path] = (), average: bool = False, float16: bool = False, unfinished: bool = False,
            overwrite: bool = False, advance: Advance = lambda done, images: None) -> Release:
    """Make ``into/NAME`` from a run, or anew from a released checkpoint: whole, or not at all.

    ``data`` is where the data set stands now (default: the run's DATA.ROOT); ``also`` names further places of it, each
    evaluated too, such as an ``.npz`` of other pixels; ``seeds`` are runs of the same recipe with other seeds.
    ``average`` takes the mean of the selected weights and of the released ones that the run started from, two ends of
    a learning rate's cycle as in stochastic weight averaging (Izmailov et al., 2018, https://arxiv.org/abs/1803.05407).
    Deviation: running means and variances are averaged too, there they are computed anew. ``float16`` takes filters and
    matrices in float16 even where float32 is small enough; a released checkpoint of them keeps them.
    ``advance`` is told images done and in all while evaluating. Raises UserError where the run is no run, or has not
    ended and ``unfinished`` is not given, where the name is taken and ``overwrite`` is not given, where the mean is not
    better than the selected weights on the held-out images, and where the file gets too large.
    """
    source = _from_release(run) if (run / SUMS).is_file() else _from_run(run, unfinished)
    start = _start(source) if average else None
    name = name or source.name
    target = into / name
    if target.parent != into or not name.strip("."):
        raise UserError(f"--name is {name!r}, expected a name without slashes")
    if target.exists() and not overwrite:
        raise UserError(f"{target} is there already: replace it with --overwrite, or name another with --name")
    tables = seeds_csv(seed_rows([run, *seeds])) if seeds else ""
    config = load_config(run / CONFIG, [*([f"DATA.ROOT={data}"] if data else []), "RUNTIME.DEVICE=auto"])
    with replaced_folder(target) as folder:
        precision = _write_weights(source, folder / WEIGHTS, start, float16)
        _copy_record(source, folder, [data, *also])
        if tables:
            write_text(folder / "seeds.csv", tables)
        model, _ = load_model(config, folder / WEIGHTS)
        held_out = _held_out(run, config, model, advance) if start else {}
        results = _results(source, config, folder, model, also, advance)
        results["weights"].update(precision=precision, **held_out)
        write_json(folder / RESULTS, results)
        names = sorted(path.name for path in folder.iterdir())
        write_text(folder / SUMS, "".join(f"{file_sha256(folder / each)}  {each}\n" for each in names))
    return Release(target, results, sum(path.stat().st_size for path in into.rglob("*") if path.is_file()))


def compact(arrays: dict[str, np.ndarray], largest: int, *, float16: bool = False) -> tuple[dict[str, np.ndarray], str]:
    """Return the arrays of a network in float32, or with ``float16`` or where these are too large, its filters and
    matrices in float16.

    What has one axis (norms, biases, running statistics) stays float32. Raises UserError where that is too large too,
    or a value does not fit.
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


def _from_release(folder: Path) -> _Source:
    """Return what a released checkpoint tells; raises UserError where it is not as it was released."""
    check_released(folder)
    results = read_json(folder / RESULTS)
    return _Source(folder, load_config(folder / CONFIG), folder.name, folder / WEIGHTS, results["weights"],
                   results, results["training"])


def _from_run(run: Path, unfinished: bool) -> _Source:
    """Return what a run tells; raises UserError where the folder is no run, or it has not ended."""
    missing = [name for name in (CONFIG, _SELECTED, "history.csv", "environment.json") if not (run / name).is_file()]
    if missing:
        raise UserError(f"{run} is no run with weights: it has no {' and no '.join(missing)}, as tools/train.py leaves "
                        "them")
    config = load_config(run / CONFIG)
    history = read_table(run / "history.csv")
    reached = int(history[-1]["epoch"]) if history else 0
    results = read_results(run)
    whole = reached == config.TRAIN.EPOCHS and not config.TRAIN.MAX_STEPS
    ended = whole and results is not None and results["final"]["epoch"] == reached
    if not (ended or unfinished):
        raise UserError(f"{run} has not ended: epoch {reached} of {config.TRAIN.EPOCHS}"
                        f"{'' if results else ', no results.json'}; continue it with --resume, or release it as it "
                        "stands with --unfinished")
    kind = "final" if config.DATA.HOLDOUT == 0 and results else "selected"
    best = max(history, key=lambda row: float(row["val_accuracy"] or -1), default={"epoch": 0})
    chosen = {"kind": kind, "epoch": results[kind]["epoch"] if results else int(best["epoch"])}
    weights = run / {"selected": _SELECTED, "final": "final_model.pdparams"}[kind]
    return _Source(run, config, config.NAME, weights, chosen, results or {}, None)


def _start(source: _Source) -> Path:
    """Return the released checkpoint that a run started from, for the mean of both."""
    run = source.folder
    if (run / SUMS).is_file():
        raise UserError(f"{run} is a released checkpoint: --average is for a run")
    environments = read_environment(run)
    start = released_start(environments)
    if start is None:
        raise UserError(f"{run}: --average is for a run started with --weights of a released checkpoint, this one "
                        f"started from {first_weights(environments) or 'random weights'}")
    if source.config.DATA.HOLDOUT == 0:
        raise UserError(f"{run}: DATA.HOLDOUT is 0: --average needs held-out images, which tell whether the mean is "
                        "better")
    return start


def _held_out(run: Path, config: CfgNode, model: nn.Layer, advance: Advance) -> dict[str, Any]:
    """Return the top-1 of the mean and of the selected weights on held-out images; UserError where it gains none."""
    mean = predict_loader(config, model, build_eval_loader(config, "holdout"), advance).evaluation.top1
    selected = max(float(row["val_accuracy"] or -1) for row in read_table(run / "history.csv"))
    if mean <= selected:
        raise UserError(f"{run}: the mean is right for {mean:.2%} of the held-out images, the selected weights for "
                        f"{selected:.2%}: release these, without --average")
    return {"kind": "averaged", "holdout_top1": mean, "selected_holdout_top1": selected}


def _write_weights(source: _Source, path: Path, start: Path | None, float16: bool) -> str:
    """Write the weights, or where there is a ``start`` the mean of both; returns their precision."""
    model = build_model(source.config)
    own = convert_state(read_weights(source.weights), model)
    if start:
        before = convert_state(read_weights(start / WEIGHTS), model)
        own = {key: (array + before[key]) / 2 if array.dtype.kind == "f" else array for key, array in own.items()}
    arrays, precision = compact(own, LARGEST, float16=float16 or source.chosen.get("precision") == FLOAT16)
    save_weights(path, arrays)
    return precision


def _copy_record(source: _Source, folder: Path, places: Sequence[str]) -> None:
    """Copy what tells of the run, without the names of this machine's folders."""
    run, config = source.folder, source.config
    scrub = Scrubber([run.absolute(), config.OUTPUT, *filter(os.path.isabs, [config.DATA.ROOT, *places])])
    shown = config.clone()
    shown.defrost()
    shown.OUTPUT, shown.DATA.ROOT, shown.DATA.DOWNLOAD, shown.RUNTIME.DEVICE = "output", "data", True, "auto"
    write_text(folder / CONFIG, dump_config(shown))
    for name in ("history.csv", "timing.csv", "train.log", "dataset.json", "seeds.csv"):
        if (run / name).is_file():
            write_text(folder / name, scrub.text((run / name).read_text(encoding="utf-8")))
    write_json(folder / "environment.json", scrub.value(read_json(run / "environment.json")))


def _results(source: _Source, config: CfgNode, folder: Path, model: nn.Layer, also: Sequence[str],
             advance: Advance) -> dict[str, Any]:
    """Evaluate the file as it stands in ``folder``; writes ``mistakes.csv`` for the first data set.

    Where another has other pixels of the first one's first pictures (their labels tell), its row has the top-1 accuracy
    on the first one's pixels of the same pictures too, ``same_pictures_top1``.
    """
    complexity = count(model, config.DATA.IMAGE_SIZE)
    info, tests = model_info(config.MODEL.NAME), []
    for root in (config.DATA.ROOT, *also):
        chosen = config.clone()
        chosen.defrost()
        chosen.DATA.ROOT = root
        loader = build_eval_loader(chosen, "test")
        check_classes(folder / WEIGHTS, loader.dataset)
        found = predict_loader(chosen, model, loader, advance)
        names, labels = loader.dataset.class_names, loader.dataset.labels
        row = {**metrics_of(chosen, found), "per_class": dict(zip(names, found.evaluation.per_class, strict=False))}
        if not tests:
            write_text(folder / "mistakes.csv", _mistakes(found, labels))
            of_first, right = labels, found.predicted == labels
        elif len(labels) < len(of_first) and np.array_equal(labels, of_first[:len(labels)]):
            row["same_pictures_top1"] = float(right[:len(labels)].mean())
        tests.append(row)
    return {
        **source.ended,
        "name": config.NAME, "model": config.MODEL.NAME, "family": info.family, "paper": info.paper_url,
        "parameters": complexity.parameters, "macs": complexity.macs, "image_size": config.DATA.IMAGE_SIZE,
        "weights": {**source.chosen, "file": WEIGHTS, "bytes": (folder / WEIGHTS).stat().st_size},
        "training": source.training or _training(source.folder, config, complexity.macs),
        "test": tests,
    }


def _training(run: Path, config: CfgNode, macs: int) -> dict[str, Any]:
    """Return by which command, on what, and at which cost a run was trained, whose network has ``macs`` an image."""
    environments, cost = read_environment(run), training_cost(run, config)
    before = cost_before(environments)
    return {"command": training_command(config, environments), "data": origin(config.DATA),
            "machines": machines(environments), "commit": environments[-1].get("commit"),
            "precision": environments[-1].get("precision", config.TRAIN.PRECISION),
            "epochs_planned": config.TRAIN.EPOCHS, **cost,
            "macs": 3 * macs * cost["images"], **({"before": before} if before else {})}


def _mistakes(found: Predictions, labels: np.ndarray) -> str:
    rows = [f"{index},{labels[index]},{found.predicted[index]}" for index in np.flatnonzero(found.predicted != labels)]
    return "\n".join(["index,label,predicted", *rows]) + "\n"
