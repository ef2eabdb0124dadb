"""The folder of a run: what a continuation keeps of its record, what is not a run, and file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
from pathlib import Path

import pytest
from trainers import trained

from configs.load import load_config
from engine.checkpoint import list_checkpoints, load_checkpoint
from engine.run import History, RunFolder, log
from errors import UserError
from utils.fileio import write_json

NOW = {"command": ["train.py"], "paddle": "3.3.1", "processor": "X", "threads": "2"}


def test_a_resumed_run_keeps_what_it_was_made_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, warnings = RunFolder(tmp_path), []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: warnings.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("suite"), "handlers", [handler])
    run.record_environment(NOW, resume=False)
    run.record_environment(NOW, resume=True)
    assert json.loads(run.environment.read_text()) == NOW, "the same again is not kept twice"
    again = {**NOW, "command": ["train.py", "--resume"]}
    run.record_environment(again, resume=True)
    assert not warnings
    elsewhere = {**again, "processor": "Y"}
    run.record_environment(elsewhere, resume=True)
    assert json.loads(run.environment.read_text()) == {**elsewhere, "earlier": [NOW, again]}
    assert warnings == [
        "resuming with processor Y, until now it was X: the result is rounded differently from here on"]
    run.record_environment(NOW, resume=False)
    assert json.loads(run.environment.read_text()) == NOW


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"earlier": 3}', "[" * 100_000])
def test_a_damaged_record_is_replaced(tmp_path: Path, damage: str) -> None:
    run = RunFolder(tmp_path)
    run.environment.write_text(damage)
    run.record_environment(NOW, resume=True)
    assert json.loads(run.environment.read_text()) == NOW


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    run = RunFolder(tmp_path / "run")
    with pytest.warns(UserWarning, match="a second process could write"):
        run._acquire()
    run.close()


def test_folder_is_released_after_a_refusal(tmp_path: Path) -> None:
    config, other = load_config(None), load_config(None, ["RUNTIME.SEED=7"])
    run = RunFolder(tmp_path / "run")
    run.open(config, resume=False, overwrite=False)
    History(run.path).close()
    run.close()
    with pytest.raises(UserError, match=r"RUNTIME\.SEED was 42, now 7"):
        run.open(other, resume=True, overwrite=False)
    again = RunFolder(run.path)
    again.open(config, resume=True, overwrite=False)
    again.close()
    assert not log.handlers


def test_overwrite_spares_what_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("something: else\n")
    (tmp_path / "mine.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="no lock as a run has"):
            RunFolder(tmp_path).open(load_config(None), resume=False, overwrite=overwrite)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "mine.txt"}


def test_checkpoints_without_their_config_are_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "000000019.safetensors").touch()
    for resume in (True, False):
        with pytest.raises(UserError, match=r"holds checkpoints, but .* no config\.yaml"):
            RunFolder(tmp_path).open(load_config(None), resume=resume, overwrite=False)


def test_a_run_that_awaits_its_weights_is_not_resumed_without_them(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    write_json(run.environment, {"command": ["train.py", "--weights", "w.pdparams"]})
    with pytest.raises(UserError, match="--weights: start it again"):
        run.open(load_config(None), resume=True, overwrite=False)
    write_json(run.environment, {"command": ["train.py"]})
    run.open(load_config(None), resume=True, overwrite=False)
    run.close()


def test_weights_that_a_run_starts_from_survive_a_kill(tmp_path: Path) -> None:
    """Its first checkpoint holds them, before the first step."""
    start = trained(tmp_path, "NAME=start", "TRAIN.MAX_STEPS=1")
    weights = str(tmp_path / "start" / "final_model.pdparams")
    through = trained(tmp_path, "NAME=through", "TRAIN.MAX_STEPS=5", "TRAIN.LOG_EVERY=1", weights=weights)
    trained(tmp_path, "NAME=killed", "TRAIN.MAX_STEPS=2", "TRAIN.LOG_EVERY=1", weights=weights)
    *later, first = list_checkpoints(tmp_path / "killed" / "checkpoints")
    assert load_checkpoint(first).progress["global_step"] == 0
    for path in later:  # as if it had been killed before them
        path.unlink()
    assert trained(tmp_path, "NAME=killed", "TRAIN.MAX_STEPS=5", "TRAIN.LOG_EVERY=1", resume=True) == through != start
    one, other = ((tmp_path / name / "steps.csv").read_bytes() for name in ("killed", "through"))
    assert one == other
