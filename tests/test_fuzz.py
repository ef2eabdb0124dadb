"""Damaged and hostile files through the commands: refused in one sentence, or read for what they are."""

from __future__ import annotations

import collections
from pathlib import Path

import fuzzing
import pytest

from processes import ROOT, overrides, tool

SEED = 11  # not that of the long form
SAMPLE = 14  # every so many-th input in the quick form


def test_a_sample_of_inputs_ends_well(tmp_path: Path) -> None:
    fuzzing.prepare(tmp_path, trained=False)
    outcomes = fuzzing.run_cases(tmp_path, fuzzing.all_cases(tmp_path, SEED, 1)[::SAMPLE])
    assert [outcome for outcome in outcomes if not outcome.good] == []
    assert len({outcome.kind for outcome in outcomes}) > 12
    assert sum(outcome.verdict == "refused" for outcome in outcomes) > 30


@pytest.mark.slow
def test_every_input_ends_well(tmp_path: Path) -> None:
    fuzzing.prepare(tmp_path)
    cases = fuzzing.all_cases(tmp_path, SEED, 1)
    outcomes = fuzzing.run_cases(tmp_path, cases)
    print(fuzzing.table(outcomes))
    assert [outcome for outcome in outcomes if not outcome.good] == []
    counts = collections.Counter(outcome.verdict for outcome in outcomes)
    assert len(outcomes) >= 500 and counts["refused"] >= 500
    assert counts["same content"] + counts["other content"] >= 10  # damage alone is no reason

    # One input of each command in a process of its own, as a user gives it.
    for kind in ("config", "weights.pdparams", "zip.pth", "cifar-10-python.tar.gz", "PNG image"):
        case = next(case for case in cases if case.kind == kind and case.damage == "truncated")
        folder = tmp_path / kind.replace(" ", "_")
        folder.mkdir()
        for name, content in case.files.items():
            (folder / name).write_bytes(content if kind != "config" else content[:60] + b"\xff")
        command, given = fuzzing.arguments(case, tmp_path, folder)
        done = tool(command, *given)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1 and next(iter(case.files)) in done.stderr

    forged = next(case for case in cases if case.damage == "forged: wrong position")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    newest.write_bytes(next(iter(forged.files.values())))
    done = tool("train", "-c", tmp_path / "good.yaml", *overrides(f"OUTPUT={tmp_path}", "NAME=run"), "--resume",
                cwd=ROOT)
    assert "Traceback" not in done.stderr and done.returncode in (0, 2)
    assert str(newest) in done.stdout + done.stderr
