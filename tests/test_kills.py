"""Runs that are killed (SIGKILL) in the midst of whatever they do, and resumed: no bit differs in the end."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

import killing
import pytest
from killing import RUNS, Moment

pytestmark = pytest.mark.slow
MOMENTS = [Moment("start", 2.0), Moment("step", 0.0, 1), Moment("step", 0.02, 8), Moment("checkpoint", 0.001, 2),
           Moment("start", 1.0), Moment("checkpoint", 0.0, 1), Moment("evaluation", 0.005, 1), Moment("step", 0.01, 24),
           Moment("checkpoint", 0.003, 3), Moment("step", 0.0, 30)]


def test_killed_ten_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first kill meet a run that was resumed, and continues what the one before it left."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the two run side by side

    def kill_and_compare(kind: str) -> tuple[Path, list[str]]:
        whole = killing.finish(kind, tmp_path / f"{kind}-whole", "--overwrite")
        for moment in MOMENTS:
            killing.kill_at(kind, tmp_path / kind, moment, "--resume")
        run = tmp_path / kind / "quickstart"
        for path in (run / ".x.json.7.tmp", run / "checkpoints" / ".000000099.safetensors.7.tmp"):
            path.touch()  # as a killed writer leaves it
        killing.finish(kind, tmp_path / kind)
        return whole, killing.differences(whole, run)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        (one, found), (other, others) = pool.map(kill_and_compare, RUNS)
    assert found == others == []
    assert killing.differences(one, other), "the comparison sees differences"
