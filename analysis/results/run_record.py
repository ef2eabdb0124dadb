"""What a run tells of itself to others: its command, cost and machines, without names of the machine's folders."""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
import shlex
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from configs.load import flatten, load_config, to_plain
from engine.history import read_table
from engine.weights.released import RESULTS, SUMS, WEIGHTS, check_released, find_released, read_sums
from errors import UserError
from utils.fileio import read_json
from utils.paths import ROOT

PLACES = ("OUTPUT", "DATA.ROOT", "DATA.DOWNLOAD", "RUNTIME.DEVICE")  # keys that say where, not what
# Keys in which runs of one recipe with several seeds may differ.
_SEED_KEYS = {*PLACES, "NAME", "RUNTIME.SEED", "RUNTIME.THREADS", "RUNTIME.KERNELS", "DATA.WORKERS",
              "DATA.EVAL_BATCH_SIZE", "TRAIN.LOG_EVERY", "TRAIN.CHECKPOINT_MINUTES", "TRAIN.KEEP_CHECKPOINTS"}
SEED_COLUMNS = ("seed", "selected_epoch", "selected_top1", "selected_top5", "selected_loss", "final_top1", "final_loss",
                "train_seconds")
_PATH = re.compile(r"(?:(?<![\w.:/<>])|(?<=\s-[IL]))(?:~|\.\.)?/[^\s'\",;:()\[\]{}<>|]+")


class Scrubber:
    """Takes out of texts what names a machine: folders by their whole paths, and the host.

    Paths of the suite's own files become relative to it, all others ``<path>``.
    """

    def __init__(self, folders: Iterable[str | Path] = ()) -> None:
        known = {os.path.abspath(os.path.expanduser(folder)) for folder in (*folders, Path.home())}
        self.known = sorted((name for name in known if name.count("/") > 0 and len(name) > 1), key=len, reverse=True)
        host = socket.gethostname()
        self.host = re.compile(rf"\b{re.escape(host)}\b") if len(host) > 3 and host != "localhost" else None

    def text(self, text: str) -> str:
        """Return a text without them."""
        text = text.replace(f"{ROOT}/", "")
        text = re.sub(r"(?<![\w.])/[^\s'\"]*?/(configs/(?:_base_/)?[\w.-]+\.yaml)", r"\1", text)
        text = _PATH.sub("<path>", text)
        for name in self.known:
            text = re.sub(rf"{re.escape(name)}(?![\w.-])[^\s'\",;:()\[\]{{}}<>|]*", "<path>", text)
        text = re.sub(r"^(Linux-[\d.]+)-\S*?(?=-(?:x86_64|aarch64)\b)", r"\1", text)  # a kernel's private suffix
        return self.host.sub("<host>", text) if self.host else text

    def value(self, value: Any) -> Any:
        """Return a value of JSON without them."""
        if isinstance(value, dict):
            return {key: self.value(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.value(item) for item in value]
        return self.text(value) if isinstance(value, str) else value


def read_environment(run: Path) -> list[dict[str, Any]]:
    """Return what a run was made with, the earliest first."""
    now = read_json(run / "environment.json")
    earlier = now.pop("earlier", [])
    if not isinstance(earlier, list) or not all(isinstance(each, dict) for each in earlier):
        raise UserError(f"{run / 'environment.json'}: not the record of a run")
    return [*earlier, now]


def read_results(run: Path) -> dict[str, Any] | None:
    """Return what a run's ``results.json`` holds, None where there is none yet; UserError where it is no such file."""
    path = run / "results.json"
    if not path.is_file():
        return None
    found = read_json(path)
    try:
        for kind in ("selected", "final"):
            int(found[kind]["epoch"]), float(found[kind]["test"]["top1"]), float(found[kind]["test"]["loss"])
            found[kind]["test"]["top5"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not the results of a run: expected epoch and test figures of selected and final "
                        "weights") from None
    return found


def machines(environments: Sequence[dict[str, Any]]) -> list[str]:
    """Return the machines of a run, each once: processor or GPU, cores (those used of those there) and processes."""
    found = []
    for each in environments:
        there = str(each.get("cores") or "?")
        used = str(each.get("threads") or there)
        cores = f"{there} core{'s' * (there != '1')}" if used == there else f"{used} of {there} cores"
        name = re.sub(r"^(?:AuthenticAMD|GenuineIntel)\s+", "", str(each.get("processor") or "processor unknown"))
        told = f"{each['gpu']}" if each.get("gpu") else f"{name}, {cores}"
        processes = each.get("processes") or 1
        found.append(told if processes == 1 else f"{processes} processes, each on {told}")
    return list(dict.fromkeys(found))


def training_command(config: CfgNode, environments: Sequence[dict[str, Any]], folder: Path = ROOT / "configs") -> str:
    """Return the command that trains the run of a config: one of our configs, and every key that differs from it.

    Which config is told by the run's own commands, else by its name. Keys that only say where files are, and on
    which device, are left out.
    """
    commands = [[str(word) for word in each.get("command") or ()] for each in environments]
    named = [Path(word) for command in commands for flag, word in itertools.pairwise(command)
             if flag in ("-c", "--config")]
    names = [path.name for path in named] + [f"{config.NAME}.yaml"]
    base = next((folder / name for name in names if (folder / name).is_file()), None)
    words = ["python"]
    processes = max([int(each.get("processes") or 1) for each in environments] or [1])
    if processes > 1:
        words += ["-m", "paddle.distributed.launch", "--nproc_per_node", str(processes)]
    words += ["tools/train.py"]
    before: dict[str, Any] = {}
    if base:
        words += ["-c", f"configs/{base.name}"]
        before = {key: to_plain(value) for key, value in flatten(load_config(base))}
    for key, value in flatten(config):
        plain = to_plain(value)
        if key not in PLACES and (key not in before or before[key] != plain):
            words += ["-o", f"{key}={_flow(plain)}"]
    start = first_weights(environments)
    if start:
        words += ["--weights", (released_start(environments) or Path(start)).name]
    return shlex.join(words)


def first_weights(environments: Sequence[dict[str, Any]]) -> str:
    """Return what ``--weights`` named when a run was started, "" where it started from random weights."""
    for each in environments:
        for flag, word in itertools.pairwise(map(str, each.get("command") or ())):
            if flag == "--weights":
                return word
    return ""


def released_start(environments: Sequence[dict[str, Any]]) -> Path | None:
    """Return the folder of the released checkpoint that a run started from, None where it started from none."""
    start = first_weights(environments)
    return find_released(start) if start else None


def cost_before(environments: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return what the weights had cost that a run started from; None where they are of no released checkpoint.

    That is ``checkpoint`` (its name), ``sha256`` of its weights, ``commands`` that made it, and ``epochs``, ``images``,
    ``seconds`` and ``macs`` in all, what stood before it included. Raises UserError where the checkpoint is not as it
    was released.
    """
    checkpoint = released_start(environments)
    if checkpoint is None:
        return None
    check_released(checkpoint)
    results = read_json(checkpoint / RESULTS)
    training = results["training"]
    earlier = training.get("before", {})
    return {"checkpoint": checkpoint.name, "sha256": read_sums(checkpoint / SUMS)[WEIGHTS],
            "commands": [*earlier.get("commands", []), *commands_of(results)],
            **{key: training[key] + earlier.get(key, 0) for key in ("epochs", "images", "seconds", "macs")}}


def commands_of(results: dict[str, Any]) -> list[str]:
    """Return the commands that made a released checkpoint, given its ``results.json`` and what it started from."""
    averaged = [f"python tools/release.py output/{results['name']} --average"]
    return [results["training"]["command"], *(averaged if results["weights"]["kind"] == "averaged" else [])]


def training_cost(run: Path, config: CfgNode) -> dict[str, Any]:
    """Return how long a run trained: epochs, iterations, images, seconds and images/s of the training alone.

    Evaluations, checkpoints and what was lost to interruptions are not in the seconds. Raises UserError where its
    tables tell of no epoch.
    """
    history, timing = read_table(run / "history.csv"), read_table(run / "timing.csv")
    if not history or not timing:
        raise UserError(f"{run}: history.csv or timing.csv tells of no epoch: nothing was trained here")
    iterations = int(history[-1]["iteration"])
    images = iterations * config.DATA.BATCH_SIZE
    seconds = sum(float(row["train_seconds"]) for row in timing)
    return {"epochs": int(history[-1]["epoch"]), "iterations": iterations, "images": images,
            "seconds": round(seconds, 1), "images_per_second": round(images / seconds, 2) if seconds else None}


def seed_rows(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return a row of SEED_COLUMNS for each run, sorted by seed.

    Raises UserError where one has not ended, or they differ in more than their seeds.
    """
    rows: dict[int, dict[str, Any]] = {}
    first: CfgNode | None = None
    for run in runs:
        config, results = load_config(run / "config.yaml"), read_results(run)
        if results is None:
            raise UserError(f"{run}: a run with no results.json, which has not ended")
        first = first or config
        own, others = dict(flatten(config)), dict(flatten(first))
        differing = [key for key in own if key not in _SEED_KEYS and own[key] != others.get(key)]
        if differing:
            raise UserError(f"{run}: no other seed of the run in {runs[0]}, since {differing[0]} is "
                            f"{to_plain(own[differing[0]])!r}, not {to_plain(others[differing[0]])!r}")
        seed = config.RUNTIME.SEED
        if seed in rows:
            raise UserError(f"{run}: RUNTIME.SEED is {seed}, as in another of the runs")
        selected, final = results["selected"], results["final"]
        rows[seed] = {"seed": seed, "selected_epoch": selected["epoch"], "selected_top1": selected["test"]["top1"],
                      "selected_top5": selected["test"]["top5"], "selected_loss": selected["test"]["loss"],
                      "final_top1": final["test"]["top1"], "final_loss": final["test"]["loss"],
                      "train_seconds": training_cost(run, config)["seconds"]}
    return [rows[seed] for seed in sorted(rows)]


def seeds_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return such rows as CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, SEED_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _flow(value: Any) -> str:
    """Return a value as ``-o`` takes it: YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=100_000, allow_unicode=True).strip()
    return text.removesuffix("...").strip()
