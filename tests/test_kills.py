"""Runs that are killed (SIGKILL) in the midst of whatever they do, and continued: no bit differs in the end."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

import killing
import pytest
from killing import NETWORKS, Moment

from configs.load import load_config
from engine.checkpoint import load_checkpoint
from engine.run import RunFolder
from errors import UserError
from processes import overrides, tool
from utils.fileio import write_json


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Two runs go on beside each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of the runs that nothing interrupted."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in NETWORKS}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(NETWORKS, pool.map(killing.run_whole, NETWORKS, folders.values()), strict=True))


MOMENTS = [Moment("start", 2.0), Moment("step", 0.02, 8), Moment("checkpoint", 0.001, 2),
           Moment("evaluation", 0.005, 1), Moment("step", 0.0, 30)]


def test_curves_have_no_gap_and_no_overlap(whole: dict[str, Path]) -> None:
    for run in whole.values():
        killing.assert_curves_are_whole(run)
    assert killing.differences(whole["iformer"], whole["poolformer"])  # which sees what differs


def test_killed_five_times(whole: dict[str, Path], tmp_path: Path) -> None:
    """All but the first kill meet a run that was resumed, and continues what the one before it left."""
    def finish(kind: str) -> list[str]:
        for moment in MOMENTS:
            killing.kill_at(kind, tmp_path / kind, moment, "--resume")
        run = tmp_path / kind / "run"
        for path in (run / ".x.json.7.tmp", run / "checkpoints" / ".000000099.safetensors.7.tmp"):
            path.touch()  # as a killed writer leaves it
        killing.resume(kind, tmp_path / kind)
        killing.assert_curves_are_whole(run)
        return killing.differences(whole[kind], run)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(finish, NETWORKS)) == [[], []]


def test_weights_that_a_run_starts_from_survive_a_kill(whole: dict[str, Path], tmp_path: Path) -> None:
    """Before the first checkpoint of its own a run has one of the weights that it was given."""
    arguments = [*killing.arguments("iformer", tmp_path), *overrides("TRAIN.CHECKPOINT_MINUTES=9", "TRAIN.EPOCHS=1")]
    start = [*arguments, "--weights", str(whole["iformer"] / "final_model.pdparams")]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda more: tool("train", *start, *overrides(more)), ("NAME=through", "TRAIN.MAX_STEPS=3"))
        assert [done.returncode for done in runs] == [0, 0]
    first, *later = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert first.stem == "000000000" and load_checkpoint(first).position["iteration"] == 0
    for path in later:  # as if it had been killed before them
        path.unlink()
    done = tool("train", *arguments, "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("steps.csv", "results.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "through" / name).read_bytes()


def test_a_run_that_awaits_its_weights_is_not_resumed_without_them(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    write_json(run.environment, {"command": ["train.py", "--weights", "w.pdparams"]})
    with pytest.raises(UserError, match="--weights: start it again"):
        run.open(load_config(None), resume=True, overwrite=False)
    write_json(run.environment, {"command": ["train.py"]})
    run.open(load_config(None), resume=True, overwrite=False)
    run.close()


def test_checkpoints_without_their_config_are_nobody_s(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "000000019.safetensors").touch()
    for resume in (True, False):
        with pytest.raises(UserError, match=r"holds checkpoints, but .* no config\.yaml"):
            RunFolder(tmp_path).open(load_config(None), resume=resume, overwrite=False)
