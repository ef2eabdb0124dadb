"""Hundreds of damaged and hostile files through the commands: refused in one sentence, or read for what they are."""

from __future__ import annotations

import collections
from pathlib import Path

import fuzzing
import pytest
from fuzz_cases import Case

from processes import ROOT, overrides, tool

SEED = 11  # not that of the long form


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run of two steps."""
    folder = tmp_path_factory.mktemp("fuzz")
    fuzzing.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def cases(base: Path) -> list[Case]:
    return fuzzing.all_cases(base, SEED, 1)


def test_every_input_ends_well(base: Path, cases: list[Case]) -> None:
    outcomes = fuzzing.run_cases(base, cases)
    print(fuzzing.table(outcomes))
    assert [outcome for outcome in outcomes if not outcome.good] == []
    counts = collections.Counter(outcome.verdict for outcome in outcomes)
    assert len(outcomes) >= 500 and counts["refused"] >= 500
    assert counts["same content"] + counts["other content"] >= 10  # damage alone is no reason


@pytest.mark.parametrize("kind", ["config", "weights.pdparams", "zip.pth", "cifar-10-python.tar.gz", "PNG image"])
def test_processes_of_their_own(kind: str, base: Path, cases: list[Case], tmp_path: Path) -> None:
    """One input of each command as a user gives it."""
    case = next(case for case in cases if case.kind == kind and case.damage == "truncated")
    for name, content in case.files.items():
        (tmp_path / name).write_bytes(content if kind != "config" else content[:60] + b"\xff")
    command, given = fuzzing.arguments(case, base, tmp_path)
    done = tool(command, *given)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 and next(iter(case.files)) in done.stderr


def test_resuming_a_stranger_s_checkpoint(base: Path, cases: list[Case]) -> None:
    forged = next(case for case in cases if case.damage == "forged: wrong progress")
    newest = max((base / "run" / "checkpoints").iterdir())
    whole = newest.read_bytes()
    newest.write_bytes(next(iter(forged.files.values())))
    try:
        done = tool("train", "-c", base / "good.yaml", *overrides(f"OUTPUT={base}", "NAME=run"), "--resume", cwd=ROOT)
    finally:
        newest.write_bytes(whole)
    assert "Traceback" not in done.stderr and done.returncode in (0, 2)
    assert str(newest) in done.stdout + done.stderr
