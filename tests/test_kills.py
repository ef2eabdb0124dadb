"""Runs that are killed (SIGKILL) in the midst of whatever they do, and resumed: no bit differs in the end."""

import concurrent.futures
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors import safe_open

from engine.run import read_table
from processes import start_tool, tiny_run, tool

STEPS = 19  # of an epoch
COMMON = ("TRAIN.EPOCHS=2", "TRAIN.LOG_EVERY=1", "TRAIN.CHECKPOINT_MINUTES=0.002", "TRAIN.GRAD_CLIP=1.0",
          "DATA.WORKERS=1", "DATA.EVAL_BATCH_SIZE=64")
RUNS = {  # a plain one, and one with everything that draws random numbers or must be carried along
    "plain": COMMON,
    "random": (*COMMON, "MODEL.ARGS.drop_rate=0.1", "MODEL.DROP_PATH=0.3", "AUGMENT.ERASING=0.25", "AUGMENT.MIXUP=0.8",
               "AUGMENT.CUTMIX=1.0", "OPTIMIZER.NAME=muon", "OPTIMIZER.MOMENTUM=0.95", "TRAIN.EMA_DECAY=0.9"),
}


@dataclass(frozen=True)
class Moment:
    """When to kill: ``delay`` seconds after the start, or after the ``number``-th step, evaluation or checkpoint began.

    ``phase`` is start, step, evaluation or checkpoint.
    """

    phase: str
    delay: float
    number: int = 1


def kill_at(kind: str, output: Path, moment: Moment, *more: str) -> None:
    """Start a run and kill it at a moment; earlier where it had already ended."""
    process = start_tool("train", *tiny_run(output, *RUNS[kind]), *more)
    run, begin = output / "quickstart", time.monotonic()
    seen: set[str] = set()
    while process.poll() is None and not _reached(run, moment, begin, seen):
        time.sleep(0.0003)
    time.sleep(0 if moment.phase == "start" else moment.delay)
    process.send_signal(signal.SIGKILL)
    text, _ = process.communicate(timeout=60)
    assert "Traceback" not in text, text
    assert process.returncode in (0, -signal.SIGKILL), text
    if process.returncode == 0:
        shutil.rmtree(run)
        kill_at(kind, output, replace(moment, delay=moment.delay * 0.8), *more)


def finish(kind: str, output: Path, how: str = "--resume") -> Path:
    """Train one of RUNS to its end, from its newest checkpoint or (``--overwrite``) the start; return its folder."""
    done = tool("train", *tiny_run(output, *RUNS[kind]), how)
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


def _reached(run: Path, moment: Moment, begin: float, seen: set[str]) -> bool:
    if moment.phase == "start":
        return time.monotonic() - begin >= moment.delay
    if moment.phase == "checkpoint":
        seen.update(path.name for path in (run / "checkpoints").glob(".*.tmp"))
        return len(seen) >= moment.number
    return _lines(run / "steps.csv") - 1 >= (moment.number if moment.phase == "step" else STEPS * moment.number)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _arrays_differ(name: str, one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> list[str]:
    if one.keys() != two.keys():
        return [f"names in {name}"]
    return [f"{key} in {name}" for key in one
            if one[key].dtype != two[key].dtype or one[key].tobytes() != two[key].tobytes()]


pytestmark = pytest.mark.slow
MOMENTS = [Moment("start", 2.0), Moment("step", 0.0, 1), Moment("step", 0.02, 8), Moment("checkpoint", 0.001, 2),
           Moment("start", 1.0), Moment("checkpoint", 0.0, 1), Moment("evaluation", 0.005, 1), Moment("step", 0.01, 24),
           Moment("checkpoint", 0.003, 3), Moment("step", 0.0, 30)]


def test_killed_ten_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first kill meet a run that was resumed, and continues what the one before it left."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the two run side by side

    def kill_and_compare(kind: str) -> tuple[Path, list[str]]:
        whole = finish(kind, tmp_path / f"{kind}-whole", "--overwrite")
        for moment in MOMENTS:
            kill_at(kind, tmp_path / kind, moment, "--resume")
        run = tmp_path / kind / "quickstart"
        for path in (run / ".x.json.7.tmp", run / "checkpoints" / ".000000099.safetensors.7.tmp"):
            path.touch()  # as a killed writer leaves it
        finish(kind, tmp_path / kind)
        return whole, differences(whole, run)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        (one, found), (other, others) = pool.map(kill_and_compare, RUNS)
    assert found == others == []
    assert differences(one, other), "the comparison sees differences"
