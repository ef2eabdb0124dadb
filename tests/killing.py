"""Kill training runs at chosen moments, resume them, and compare what they leave with an uninterrupted run.

As often as you like: ``PYTHONPATH=. python tests/killing.py --kills 100`` (docs/ROBUSTNESS.md).
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import paddle
from safetensors import safe_open

from engine.history import read_table
from processes import start_tool, tiny_run, tool

EPOCHS, STEPS = 2, 19
COMMON = ("TRAIN.EPOCHS=2", "TRAIN.LOG_EVERY=1", "TRAIN.CHECKPOINT_MINUTES=0.002", "TRAIN.GRAD_CLIP=1.0",
          "DATA.WORKERS=1", "DATA.EVAL_BATCH_SIZE=64")
RUNS = {  # a plain one, and one with everything that draws random numbers or must be carried along
    "plain": COMMON,
    "random": (*COMMON, "MODEL.ARGS.drop_rate=0.1", "MODEL.DROP_PATH=0.3", "AUGMENT.ERASING=0.25", "AUGMENT.MIXUP=0.8",
               "AUGMENT.CUTMIX=1.0", "OPTIMIZER.NAME=muon", "OPTIMIZER.MOMENTUM=0.95", "TRAIN.EMA_DECAY=0.9"),
}
PHASES = ("any", "start", "step", "evaluation", "checkpoint")


@dataclass(frozen=True)
class Moment:
    """When to kill: ``delay`` seconds after the start (any, start), or after the ``number``-th step, evaluation or
    checkpoint has begun."""

    phase: str
    delay: float
    number: int = 1


def moments(seed: int, count: int, seconds: float) -> list[Moment]:
    """Draw moments, each phase in turn; ``seconds`` is the duration of a whole run."""
    rng = random.Random(seed)
    drawn = {
        "any": lambda: Moment("any", rng.uniform(0, seconds)),
        "start": lambda: Moment("start", rng.uniform(0, 0.5 * seconds)),
        "step": lambda: Moment("step", rng.uniform(0, 0.05), rng.randrange(1, EPOCHS * STEPS)),
        "evaluation": lambda: Moment("evaluation", rng.uniform(0, 0.04), rng.randrange(1, EPOCHS + 1)),
        "checkpoint": lambda: Moment("checkpoint", rng.uniform(0, 0.003), rng.randrange(1, 5)),
    }
    return [drawn[PHASES[index % len(PHASES)]]() for index in range(count)]


def run_whole(kind: str, output: Path) -> Path:
    """Train one of RUNS without an interruption; return the run's folder."""
    return resume(kind, output, overwrite=True)


def kill_at(kind: str, output: Path, moment: Moment, *more: str) -> str:
    """Start a run, kill it at a moment, and return the phase it was in; earlier where it had already ended."""
    process = start_tool("train", *_arguments(kind, output), *more)
    run, begin = output / "quickstart", time.monotonic()
    seen: set[str] = set()
    while process.poll() is None and not _reached(run, moment, begin, seen):
        time.sleep(0.0003)
    time.sleep(0 if moment.phase in ("any", "start") else moment.delay)
    process.send_signal(signal.SIGKILL)
    text, _ = process.communicate(timeout=60)
    assert "Traceback" not in text, text
    assert process.returncode in (0, -signal.SIGKILL), text
    if process.returncode == 0:
        shutil.rmtree(run)
        return kill_at(kind, output, replace(moment, delay=moment.delay * 0.8), *more)
    return _phase(run)


def resume(kind: str, output: Path, *, overwrite: bool = False) -> Path:
    """Train a run, from its newest checkpoint or anew, to its end; return its folder."""
    done = tool("train", *_arguments(kind, output), "--overwrite" if overwrite else "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return output / "quickstart"


def differences(whole: Path, other: Path) -> list[str]:
    """Return in what two runs differ bit for bit: weights, optimizers, checkpoints, tables, results, curves."""
    found = [name for name in ("steps.csv", "history.csv", "results.json")
             if (whole / name).read_bytes() != (other / name).read_bytes()]
    for name in ("best_model.pdparams", "final_model.pdparams", "best_optimizer.pdopt", "final_optimizer.pdopt"):
        states = [paddle.load(str(run / name), return_numpy=True) for run in (whole, other)]
        found += _arrays_differ(name, *({key: np.asarray(value) for key, value in state.items()
                                         if not isinstance(value, dict)} for state in states))
    checkpoints = [sorted((run / "checkpoints").glob("*.safetensors")) for run in (whole, other)]
    if checkpoints[0][-1].name != checkpoints[1][-1].name or len(checkpoints[1]) != 2:
        found.append(f"checkpoints {[path.name for path in checkpoints[1]]}")
    with safe_open(checkpoints[0][-1], "np") as one, safe_open(checkpoints[1][-1], "np") as two:
        if one.metadata() != two.metadata():
            found.append("progress in the newest checkpoint")
        states = [{key: file.get_tensor(key) for key in file.keys()} for file in (one, two)]  # noqa: SIM118
    found += _arrays_differ("newest checkpoint", *states)
    if list(curves(whole)) != list(curves(other)):
        found.append("VisualDL curves")
    if len({tuple(row["epoch"] for row in read_table(run / "timing.csv")) for run in (whole, other)}) > 1:
        found.append("timing.csv")
    return found + [str(path.relative_to(other)) for path in other.rglob("*.tmp")]


def curves(run: Path) -> Iterator[tuple[str, int, float]]:
    """Yield (tag, step, value) of all points of a run's VisualDL files, in their order."""
    from visualdl import LogReader

    for path in sorted((run / "vdl").iterdir()):
        reader = LogReader(file_path=str(path))
        for tag in sorted(reader.get_tags().get("scalar", [])):
            for record in reader.get_data("scalar", tag):
                yield tag, record.id, record.value


def assert_curves_are_whole(run: Path) -> None:
    """Assert that each curve has every step, or the last one of every epoch, once and in order."""
    points = collections.defaultdict(list)
    for tag, step, _ in curves(run):
        points[tag].append(step)
    assert {"train/train_loss", "train/lr", "epoch/val_accuracy"} <= points.keys()
    for tag, steps in points.items():
        expected = range(1, EPOCHS * STEPS + 1) if tag.startswith("train/") else range(STEPS, EPOCHS * STEPS + 1, STEPS)
        assert steps == list(expected), tag


def _arguments(kind: str, output: Path) -> list[str]:
    return tiny_run(output, *RUNS[kind])


def _reached(run: Path, moment: Moment, begin: float, seen: set[str]) -> bool:
    if moment.phase in ("any", "start"):
        return time.monotonic() - begin >= moment.delay
    if moment.phase == "checkpoint":
        seen.update(path.name for path in (run / "checkpoints").glob(".*.tmp"))
        return len(seen) >= moment.number
    return _lines(run / "steps.csv") - 1 >= (moment.number if moment.phase == "step" else STEPS * moment.number)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _phase(run: Path) -> str:
    """Return what a killed run was doing, judged by its files."""
    if list((run / "checkpoints").glob(".*.tmp")):
        return "writing a checkpoint"
    if list(run.glob(".*.tmp")):
        return "writing another file"
    steps, epochs = _lines(run / "steps.csv") - 1, _lines(run / "history.csv") - 1
    if steps < 0:
        return "start-up"
    if (run / "final_model.pdparams").exists():
        return "the end"
    return "evaluation" if steps >= STEPS * (epochs + 1) else "training"


def _arrays_differ(name: str, one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> list[str]:
    if one.keys() != two.keys():
        return [f"names in {name}"]
    return [f"{key} in {name}" for key in one
            if one[key].dtype != two[key].dtype or one[key].tobytes() != two[key].tobytes()]


def main() -> int:
    """Kill and resume; print a line for each kill, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", default=list(RUNS), help=f"default: {' '.join(RUNS)}")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=5)
    arguments = parser.parse_args()
    failed = 0
    for kind in arguments.runs:
        with tempfile.TemporaryDirectory(prefix="kills-") as folder:
            begin = time.monotonic()
            whole = run_whole(kind, Path(folder, "whole"))
            assert_curves_are_whole(whole)
            phases: collections.Counter[str] = collections.Counter()
            for index, moment in enumerate(moments(arguments.seed, arguments.kills, time.monotonic() - begin)):
                output = Path(folder, str(index))
                phase = kill_at(kind, output, moment)
                phases[phase] += 1
                try:
                    wrong = differences(whole, resume(kind, output))
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    wrong = [str(error)]
                failed += bool(wrong)
                print(f"{kind} {index + 1:3}: {moment}: killed in {phase}: "
                      f"{'; '.join(wrong) if wrong else 'all bits equal'}", flush=True)
            print(f"{kind}: killed in {json.dumps(phases)}; {failed} differ so far", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
