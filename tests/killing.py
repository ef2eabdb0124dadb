"""Kill a training run at a moment of one's choice, continue it, and hold what it leaves against the whole run's.

The long form kills as often as is asked: ``PYTHONPATH=. python tests/killing.py`` (docs/ROBUSTNESS.md).
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
from safetensors import safe_open

from engine.history import read_table
from engine.weights.read import read_weights
from processes import overrides, start_tool, tool

EPOCHS, STEPS = 2, 19
DIGITS = """
NAME: run
DATA: {NAME: digits, IMAGE_SIZE: 32, BATCH_SIZE: 64, EVAL_BATCH_SIZE: 64, HOLDOUT: 180, WORKERS: 1}
TRAIN: {EPOCHS: 2, LOG_EVERY: 1, CHECKPOINT_MINUTES: 0.002, GRAD_CLIP: 1.0}
"""
NETWORKS = {  # a plain one, and one with all that draws random numbers or must be carried along
    "iformer": """
MODEL:
  NAME: iformer_small
  ARGS: {depths: [1, 1, 1, 1], embed_dims: [8, 16, 16, 32], num_heads: [2, 2, 2, 2], attention_heads: [1, 1, 1, 1]}
OPTIMIZER: {NAME: adamw, LR: 2.0e-3}
""",
    "poolformer": """
MODEL:
  NAME: poolformer_s12
  DROP_PATH: 0.3
  ARGS: {depths: [1, 2], embed_dims: [16, 32], drop_rate: 0.1}
AUGMENT: {CROP: pad, ROTATION: 10.0, ERASING: 0.25, MIXUP: 0.8, CUTMIX: 1.0}
OPTIMIZER: {NAME: muon, LR: 2.0e-3, MOMENTUM: 0.95}
""",
}
PHASES = ("any", "start", "step", "evaluation", "checkpoint")


@dataclass(frozen=True)
class Moment:
    """When a run is killed: ``delay`` seconds after its start (phases any and start), or after the ``number``-th
    step, evaluation or checkpoint was seen to be under way."""

    phase: str
    delay: float
    number: int = 1


def moments(seed: int, count: int, seconds: float) -> list[Moment]:
    """Draw moments, each phase in turn; ``seconds`` is what the whole run takes."""
    rng = random.Random(seed)
    drawn = {
        "any": lambda: Moment("any", rng.uniform(0, seconds)),
        "start": lambda: Moment("start", rng.uniform(0, 0.5 * seconds)),
        "step": lambda: Moment("step", rng.uniform(0, 0.05), rng.randrange(1, EPOCHS * STEPS)),
        "evaluation": lambda: Moment("evaluation", rng.uniform(0, 0.04), rng.randrange(1, EPOCHS + 1)),
        "checkpoint": lambda: Moment("checkpoint", rng.uniform(0, 0.003), rng.randrange(1, 5)),
    }
    return [drawn[PHASES[index % len(PHASES)]]() for index in range(count)]


def write_config(kind: str, output: Path) -> Path:
    """Write the config of a run of ``NETWORKS`` that goes into ``output``/run."""
    output.mkdir(parents=True, exist_ok=True)
    average = "" if kind == "iformer" else ", EMA_DECAY: 0.9"
    path = output / f"{kind}.yaml"
    path.write_text(NETWORKS[kind] + DIGITS.replace("GRAD_CLIP: 1.0", "GRAD_CLIP: 1.0" + average))
    return path


def arguments(kind: str, output: Path) -> list[str | Path]:
    """Return the arguments of ``tools/train.py``."""
    return ["-c", write_config(kind, output), *overrides(f"OUTPUT={output}")]


def run_whole(kind: str, output: Path) -> Path:
    """Train without an interruption; return the run's folder."""
    done = tool("train", *arguments(kind, output))
    assert done.returncode == 0, done.stderr
    return output / "run"


def kill_at(kind: str, output: Path, moment: Moment, *more: str) -> str:
    """Start a run, kill it at a moment, and return in which phase it was; in a shorter time where it had ended."""
    process = start_tool("train", *arguments(kind, output), *more)
    run, begin = output / "run", time.monotonic()
    seen: set[str] = set()
    while process.poll() is None and not _reached(run, moment, begin, seen):
        time.sleep(0.0003)
    time.sleep(0 if moment.phase in ("any", "start") else moment.delay)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert "Traceback" not in said, said
    assert process.returncode in (0, -signal.SIGKILL), said
    if process.returncode == 0:
        shutil.rmtree(run)
        return kill_at(kind, output, replace(moment, delay=moment.delay * 0.8), *more)
    return _phase(run)


def _reached(run: Path, moment: Moment, begin: float, seen: set[str]) -> bool:
    if moment.phase in ("any", "start"):
        return time.monotonic() - begin >= moment.delay
    if moment.phase == "checkpoint":
        seen.update(path.name for path in _temporaries(run / "checkpoints"))
        return len(seen) >= moment.number
    iterations = _lines(run / "steps.csv") - 1
    return iterations >= (moment.number if moment.phase == "step" else STEPS * moment.number)


def _temporaries(folder: Path) -> list[Path]:
    return list(folder.glob(".*.tmp"))


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _phase(run: Path) -> str:
    """Tell from what a killed run left what it was doing."""
    if _temporaries(run / "checkpoints"):
        return "writing a checkpoint"
    if _temporaries(run):
        return "writing another file"
    iterations, epochs = _lines(run / "steps.csv") - 1, _lines(run / "history.csv") - 1
    if iterations < 0:
        return "start-up"
    if (run / "final_model.pdparams").exists():
        return "the end"
    return "evaluation" if iterations >= STEPS * (epochs + 1) else "training"


def resume(kind: str, output: Path) -> str:
    """Continue a killed run to its end; return what it said."""
    done = tool("train", *arguments(kind, output), "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def differences(whole: Path, other: Path) -> list[str]:
    """Return what two runs' folders do not share bit for bit: weights, optimizers, states, tables, figures, curves."""
    found = [name for name in ("steps.csv", "history.csv", "results.json")
             if (whole / name).read_bytes() != (other / name).read_bytes()]
    for name in ("best_model.pdparams", "final_model.pdparams", "best_optimizer.pdopt", "final_optimizer.pdopt"):
        found += _arrays_differ(name, read_weights(whole / name).arrays, read_weights(other / name).arrays)
    checkpoints = [sorted((run / "checkpoints").glob("*.safetensors")) for run in (whole, other)]
    if checkpoints[0][-1].name != checkpoints[1][-1].name or len(checkpoints[1]) != 2:
        found.append(f"checkpoints {[path.name for path in checkpoints[1]]}")
    with safe_open(checkpoints[0][-1], "np") as one, safe_open(checkpoints[1][-1], "np") as two:
        if one.metadata() != two.metadata():
            found.append("position of the newest checkpoint")
        states = [{key: file.get_tensor(key) for key in file.keys()} for file in (one, two)]  # noqa: SIM118
    found += _arrays_differ("newest checkpoint", *states)
    if list(curves(whole)) != list(curves(other)):
        found.append("VisualDL curves")
    if [row["epoch"] for row in read_table(other / "timing.csv")] != [str(epoch + 1) for epoch in range(EPOCHS)]:
        found.append("timing.csv")
    return found + [str(path.relative_to(other)) for path in other.rglob("*.tmp")]


def _arrays_differ(name: str, one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> list[str]:
    if one.keys() != two.keys():
        return [f"names in {name}"]
    return [f"{key} in {name}" for key in one
            if one[key].dtype != two[key].dtype or one[key].tobytes() != two[key].tobytes()]


def curves(run: Path) -> Iterator[tuple[str, int, float]]:
    """Yield (tag, step, value) of all points of a run's VisualDL files, in their order."""
    from visualdl import LogReader

    for path in sorted((run / "vdl").iterdir()):
        reader = LogReader(file_path=str(path))
        for tag in sorted(reader.get_tags().get("scalar", [])):
            for record in reader.get_data("scalar", tag):
                yield tag, record.id, record.value


def assert_curves_are_whole(run: Path) -> None:
    """Each curve has every iteration, or every epoch's last one, once and in order."""
    points = collections.defaultdict(list)
    for tag, step, _ in curves(run):
        points[tag].append(step)
    assert {"train/train_loss", "train/lr", "epoch/val_accuracy"} <= points.keys()
    for tag, steps in points.items():
        expected = range(1, EPOCHS * STEPS + 1) if tag.startswith("train/") else range(STEPS, EPOCHS * STEPS + 1, STEPS)
        assert steps == list(expected), tag


def main() -> int:
    """Kill and resume; print a line for each kill and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=f"default: {' '.join(NETWORKS)}")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=5)
    given = parser.parse_args()
    failed = 0
    for kind in given.networks:
        with tempfile.TemporaryDirectory(prefix="kills-") as folder:
            begin = time.monotonic()
            whole = run_whole(kind, Path(folder, "whole"))
            assert_curves_are_whole(whole)
            phases: collections.Counter[str] = collections.Counter()
            equal = 0
            for index, moment in enumerate(moments(given.seed, given.kills, time.monotonic() - begin)):
                output = Path(folder, str(index))
                phase = kill_at(kind, output, moment)
                try:
                    resume(kind, output)
                    wrong = differences(whole, output / "run")
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    wrong = [str(error)]
                phases[phase] += 1
                equal += not wrong
                print(f"{kind} {index + 1:3}: {moment}: killed in {phase}: "
                      f"{'all bits equal' if not wrong else '; '.join(wrong)}", flush=True)
            failed += given.kills - equal
            print(f"{kind}: {equal} of {given.kills} equal; killed in {json.dumps(phases)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
