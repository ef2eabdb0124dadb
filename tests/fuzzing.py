"""Give damaged files to the commands, in processes of bounded memory and time, and judge how each ends.

The long form: ``PYTHONPATH=. python tests/fuzzing.py --rounds 10`` (docs/ROBUSTNESS.md).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import io
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import fuzz_cases
from fuzz_cases import CIFAR, TINY, Case
from fuzz_configs import CANARY, config_cases

from processes import ROOT, overrides, tool

SECONDS, MEMORY = 20, 1 << 30  # of one input; bytes of address space beyond what the libraries take
TOLD = 1500  # characters of a message


@dataclass
class Outcome:
    """How a command ended: ``refused``, ``same content``, ``other content`` (allowed), or what went wrong."""

    kind: str
    damage: str
    verdict: str
    message: str
    seconds: float

    @property
    def good(self) -> bool:
        return self.verdict in ("refused", "same content", "other content")


def prepare(folder: Path, trained: bool = True) -> None:
    """Make what is damaged: weights, and with ``trained`` the run of two steps that has them, with its checkpoint."""
    from configs.load import load_config
    from engine.model import build_model
    from engine.weights import save_weights

    (folder / "good.yaml").write_text(TINY)
    (folder / "cifar.yaml").write_text(CIFAR)
    if not trained:
        save_weights(folder / "weights.pdparams", build_model(load_config(folder / "good.yaml")).state_dict())
        return
    done = tool("train", "-c", folder / "good.yaml", *overrides(f"OUTPUT={folder}", "NAME=run"))
    assert done.returncode == 0, done.stderr
    shutil.copy(folder / "run" / "final_model.pdparams", folder / "weights.pdparams")


def all_cases(folder: Path, seed: int, rounds: int) -> list[Case]:
    """Return the cases of all kinds; ``rounds`` times as many random ones."""
    from engine.checkpoint import _digest
    from engine.weights.read import read_weights

    state = dict(read_weights(folder / "weights.pdparams").arrays)
    checkpoints = sorted(folder.glob("run/checkpoints/*.safetensors"))[-1:]
    return [*config_cases(seed, rounds), *fuzz_cases.weight_cases(state),
            *(case for path in checkpoints
              for case in fuzz_cases.checkpoint_cases(path.read_bytes(), _digest, seed, rounds)),
            *fuzz_cases.archive_cases(folder), *fuzz_cases.image_cases(),
            *fuzz_cases.malicious_cases(folder)]


def arguments(case: Case, base: Path, place: Path) -> tuple[str, list[str]]:
    """Return the command to which a case is given, and its arguments."""
    first = str(place / next(iter(case.files)))
    good, weights = str(base / "good.yaml"), str(base / "weights.pdparams")
    if case.kind == "config":
        return "eval", ["-c", first, "-w", weights]
    if "image" in case.kind:
        return "predict", ["-c", good, "-w", weights, first, "--out", str(place / "out.png")]
    if case.kind.endswith(("archive", "folder", "tar.gz")):
        root = place / "cifar" if case.kind.endswith("folder") else first
        return "eval", ["-c", str(base / "cifar.yaml"), "-w", weights, "-o", f"DATA.ROOT={root}"]
    if case.kind == "resume checkpoint":
        return "restore", [str(base / "run"), str(place)]
    return "eval", ["-c", good, "-w", first]


# The worker --------------------------------------------------------------------------------------------------------


def work(base: Path, cases: list[Case]) -> None:
    """Run the cases and print each outcome as a line of JSON; a hang ends the process with a traceback."""
    import cv2  # noqa: F401

    from analysis import confusion, grids  # noqa: F401
    from datasets import cifar
    from engine import runtime
    from tools import cli, predict
    from tools import eval as eval_tool

    runtime.prepare(1)
    import cifar_files
    import pytest

    cifar_files.change_release(pytest.MonkeyPatch(), batch_images={"train": 20, "test": 20})
    assert cifar.RELEASES["cifar10"].batch_images["test"] == 20
    tools = {"eval": eval_tool, "predict": predict}
    _limit_memory()
    for index, case in enumerate(cases):
        place = base / "cases" / str(index)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        place.mkdir(parents=True, exist_ok=True)
        for name, content in case.files.items():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(content.replace(CANARY.encode(), str(place / "canary").encode()))
        out, err, begin = io.StringIO(), io.StringIO(), time.monotonic()
        code: object = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                command, given = arguments(case, base, place)
                if command == "restore":
                    _restore(*map(Path, given))
                else:
                    cli.run(tools[command].main, tools[command].parser(), given)
            except SystemExit as end:
                code = end.code
            except BaseException:
                code = traceback.format_exc()
        seconds = time.monotonic() - begin
        verdict = _verdict(case, place, code, err.getvalue())
        print(json.dumps(asdict(Outcome(case.kind, case.damage, verdict, err.getvalue(), seconds))), flush=True)
    faulthandler.cancel_dump_traceback_later()


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)


def _restore(run: Path, place: Path) -> None:
    """What ``tools/train.py --resume`` does with a checkpoint, without the training after it."""
    from configs.load import load_config
    from engine.run import RunFolder
    from engine.state import TrainingState
    from errors import UserError

    folder = RunFolder(run)
    folder.checkpoints = place
    try:
        state = TrainingState(load_config(run / "config.yaml"))
        state.restore(folder)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if state.progress.global_step == 0:  # damage is logged, and the checkpoint before it taken: there is none
        print(f"{place} 000000002.safetensors: starting from the beginning", file=sys.stderr)
        sys.exit(2)


def _verdict(case: Case, place: Path, code: object, message: str) -> str:
    if (place / "canary").exists() or (place.parent.parent / "canary").exists():
        return "EXECUTED"
    if code not in (0, 2):
        return f"exit {code}"
    if code == 2:
        lines = message.strip().split("\n")
        if "Traceback" in message or not all(line.isprintable() for line in lines):
            return "unprintable message"
        if len(message) > TOLD or len(lines) > (12 if "weights" in case.kind or "pth" in case.kind else 1):
            return "long message"
        names = [*case.files, "MODEL.ARGS", case.damage.rpartition(" ")[2], "cases"]
        if case.kind == "config":  # or a name in it
            names += re.findall(r"\w{5,}", next(iter(case.files.values())).decode("latin1"))
        return "refused" if any(name in message for name in names) else "nameless message"
    if case.must_refuse:
        return "SILENTLY ACCEPTED"
    if case.whole and case.files[case.whole] == next(iter(case.files.values())):
        return "same content"
    return _compare(case, place)


def _compare(case: Case, place: Path) -> str:
    """Judge what was taken of a damaged config: its whole content, or something that it does not hold."""
    import yaml

    from configs.load import flatten, load_config

    if case.kind != "config":
        return "SILENTLY ACCEPTED"
    first = place / next(iter(case.files))
    config, tree = dict(flatten(load_config(first))), dict(flatten(yaml.safe_load(first.read_bytes()) or {}))
    tree.pop("_BASE_", None)
    return "other content" if all(config[key] == tree[key] or float(config[key]) == float(tree[key])
                                  for key in tree if key != "MODEL.ARGS") else "misread"


def run_cases(base: Path, cases: list[Case]) -> list[Outcome]:
    """Run all cases in a process of bounded memory; one that it dies of, or hangs in, is the last outcome."""
    (base / "cases.pickle").write_bytes(pickle.dumps(cases))
    done = subprocess.run([sys.executable, __file__, "--work", str(base)], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    outcomes = [Outcome(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(outcomes) < len(cases):
        case = cases[len(outcomes)]
        outcomes.append(Outcome(case.kind, case.damage, f"DIED with {done.returncode}", done.stderr[-2000:], 0.0))
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """Return the counts by kind, as a Markdown table."""
    columns = ("refused", "same content", "other content")
    counts = collections.defaultdict(collections.Counter)
    for outcome in outcomes:
        counts[outcome.kind][outcome.verdict if outcome.good else "wrong"] += 1
        counts["all"][outcome.verdict if outcome.good else "wrong"] += 1
    lines = ["| kind | inputs | refused | read: same content | read: other content | wrong |", "|" + " --- |" * 6]
    for kind in [*(kind for kind in counts if kind != "all"), "all"]:
        numbers = [counts[kind].total(), *(counts[kind][column] for column in columns), counts[kind]["wrong"]]
        lines.append(f"| {kind} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run the fuzz and print the table; or, as its worker, a part of the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work, pickle.loads((given.work / "cases.pickle").read_bytes()))
        return 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        prepare(Path(folder))
        outcomes = run_cases(Path(folder), all_cases(Path(folder), given.seed, given.rounds))
    wrong = [outcome for outcome in outcomes if not outcome.good]
    for outcome in wrong:
        print(f"{outcome.kind}, {outcome.damage}: {outcome.verdict[-1500:]} | {outcome.message[-300:]}")
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    print(table(outcomes))
    print(f"slowest: {slowest.seconds:.1f} s, {slowest.kind}, {slowest.damage}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
