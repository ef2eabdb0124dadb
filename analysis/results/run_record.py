"""The public record of a run: its command, cost and machines, without names of the machine's folders."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from configs.load import flatten, load_config, to_plain
from datasets import origin
from engine.run import read_table
from errors import UserError
from utils import ROOT
from utils.fileio import read_json

PATHS = ("OUTPUT", "DATA.ROOT", "DATA.DOWNLOAD", "RUNTIME.DEVICE")  # keys that differ between machines
# Keys in which runs of one recipe with several seeds may differ.
_SEED_KEYS = {*PATHS, "NAME", "RUNTIME.SEED", "RUNTIME.THREADS", "RUNTIME.KERNELS", "DATA.WORKERS",
              "DATA.EVAL_BATCH_SIZE", "TRAIN.LOG_EVERY", "TRAIN.CHECKPOINT_MINUTES", "TRAIN.KEEP_CHECKPOINTS"}
_PATH = re.compile(r"(?:(?<![\w.:/<>])|(?<=\s-[IL]))(?:~|\.\.)?/[^\s'\",;:()\[\]{}<>|]+")


def scrubber(folders: Iterable[str | Path] = ()) -> Callable[[Any], Any]:
    """Return a function that removes the names of this machine from a text or a JSON value.

    Absolute paths, and all in ``folders``, become ``<path>``, the host ``<host>``; paths of the suite's own files
    become relative.
    """
    known = {os.path.abspath(os.path.expanduser(folder)) for folder in (*folders, Path.home())} - {"/"}
    host = socket.gethostname()

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list):
            return [clean(item) for item in value]
        if not isinstance(value, str):
            return value
        text = value.replace(f"{ROOT}/", "")
        text = re.sub(r"(?<![\w.])/[^\s'\"]*?/(configs/(?:_base_/)?[\w.-]+\.yaml)", r"\1", text)
        text = _PATH.sub("<path>", text)
        for name in sorted(known, key=len, reverse=True):
            text = re.sub(rf"{re.escape(name)}(?![\w.-])[^\s'\",;:()\[\]{{}}<>|]*", "<path>", text)
        text = re.sub(r"^(Linux-[\d.]+)-\S*?(?=-(?:x86_64|aarch64)\b)", r"\1", text)  # a kernel's private suffix
        return re.sub(rf"\b{re.escape(host)}\b", "<host>", text) if len(host) > 3 and host != "localhost" else text

    return clean


def read_environment(run: Path) -> list[dict[str, Any]]:
    """Return the environments that a run was made in, the earliest first."""
    now = read_json(run / "environment.json")
    earlier = now.pop("earlier", [])
    if not isinstance(earlier, list) or not all(isinstance(each, dict) for each in earlier):
        raise UserError(f"{run / 'environment.json'}: not the record of a run")
    return [*earlier, now]


def read_results(run: Path) -> dict[str, Any] | None:
    """Return a run's ``results.json``, None where there is none yet; UserError where it is no such file."""
    path = run / "results.json"
    if not path.is_file():
        return None
    found = read_json(path)
    try:
        for own in (found["selected"], found["final"]):
            int(own["epoch"]), float(own["test"]["top1"]), float(own["test"]["loss"]), own["test"]["top5"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not the results of a run: expected epoch and test metrics of selected and final "
                        "weights") from None
    return found


def machines(environments: Sequence[dict[str, Any]]) -> list[str]:
    """Return the machines of a run, each once: GPU, or processor and cores (used, of those available)."""
    found = []
    for each in environments:
        cores, processes = str(each.get("cores") or "?"), each.get("processes") or 1
        used = str(each.get("threads") or cores)
        shown = f"{cores} core{'s' * (cores != '1')}" if used == cores else f"{used} of {cores} cores"
        name = re.sub(r"^(?:AuthenticAMD|GenuineIntel)\s+", "", str(each.get("processor") or "processor unknown"))
        found.append((f"{processes} processes, each on " if processes > 1 else "")
                     + str(each.get("gpu") or f"{name}, {shown}"))
    return list(dict.fromkeys(found))


def training_command(config: CfgNode, environments: Sequence[dict[str, Any]], folder: Path = ROOT / "configs") -> str:
    """Return the command that trains a run: a config of ours, and every key that differs from it.

    The config is the one named by the run's own commands, else by NAME. Paths and device are left out.
    """
    flags = [pair for each in environments for pair in itertools.pairwise(map(str, each.get("command") or ()))]
    names = [Path(word).name for flag, word in flags if flag in ("-c", "--config")] + [f"{config.NAME}.yaml"]
    base = next((folder / name for name in names if (folder / name).is_file()), None)
    processes = max([int(each.get("processes") or 1) for each in environments], default=1)
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(processes)] if processes > 1 else []
    words = ["python", *launcher, "tools/train.py", *(["-c", f"configs/{base.name}"] if base else [])]
    before = dict(flatten(load_config(base))) if base else {}
    for key, value in flatten(config):
        if key not in PATHS and (key not in before or before[key] != value):
            text = value if isinstance(value, str) else json.dumps(to_plain(value), ensure_ascii=False)
            words += ["-o", f"{key}={text}"]
    start = [Path(word).name for flag, word in flags if flag == "--weights"][:1]
    return shlex.join([*words, *(["--weights", *start] if start else [])])


def training_cost(run: Path, config: CfgNode) -> dict[str, Any]:
    """Return epochs, iterations, images, seconds and images/s of the training alone, without evaluations.

    Raises UserError where the run has no epoch.
    """
    history, timing = read_table(run / "history.csv"), read_table(run / "timing.csv")
    if not history or not timing:
        raise UserError(f"{run}: history.csv or timing.csv has no epoch: nothing was trained here")
    epochs, iterations = (int(history[-1][column]) for column in ("epoch", "iteration"))
    images, seconds = iterations * config.DATA.BATCH_SIZE, sum(float(row["train_seconds"]) for row in timing)
    return {"epochs": epochs, "iterations": iterations, "images": images, "seconds": round(seconds, 1),
            "images_per_second": round(images / seconds, 2) if seconds else None}


def training_record(run: Path, config: CfgNode, macs: int) -> dict[str, Any]:
    """Return command, data, machines and cost of a run whose network has ``macs`` an image."""
    environments, cost = read_environment(run), training_cost(run, config)
    return {"command": training_command(config, environments), "data": origin(config.DATA),
            "machines": machines(environments), "commit": environments[-1].get("commit"),
            "precision": environments[-1].get("precision", config.TRAIN.PRECISION),
            "epochs_planned": config.TRAIN.EPOCHS, **cost, "macs": 3 * macs * cost["images"]}


def seed_rows(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return a row of results for each run, sorted by seed.

    Raises UserError where one has not ended, or they differ in more than their seeds.
    """
    rows: dict[int, dict[str, Any]] = {}
    first = dict(flatten(load_config(runs[0] / "config.yaml")))
    for run in runs:
        config, results = load_config(run / "config.yaml"), read_results(run)
        if results is None:
            raise UserError(f"{run} has not ended: it has no results.json")
        for key, value in flatten(config):
            if key not in _SEED_KEYS and value != first.get(key):
                raise UserError(f"{run}: not another seed of {runs[0]}: {key} is {to_plain(value)!r}, not "
                                f"{to_plain(first.get(key))!r}")
        seed = config.RUNTIME.SEED
        if seed in rows:
            raise UserError(f"{run}: RUNTIME.SEED is {seed}, as in another of the runs")
        selected, final = results["selected"], results["final"]
        rows[seed] = {"seed": seed, "selected_epoch": selected["epoch"],
                      **{f"selected_{key}": selected["test"][key] for key in ("top1", "top5", "loss")},
                      **{f"final_{key}": final["test"][key] for key in ("top1", "loss")},
                      "train_seconds": training_cost(run, config)["seconds"]}
    return [rows[seed] for seed in sorted(rows)]
