"""The folder of a run: what a continuation leaves of its record, and file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
from pathlib import Path

import pytest

from engine.run import RunFolder

NOW = {"command": ["train.py"], "paddle": "3.3.1", "processor": "X", "threads": "2"}


def test_a_resumed_run_keeps_what_it_was_made_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, told = RunFolder(tmp_path), []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: told.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("suite"), "handlers", [handler])
    run.record_environment(NOW, resume=False)
    run.record_environment(NOW, resume=True)
    assert json.loads(run.environment.read_text()) == NOW, "the same again is not kept twice"
    again = {**NOW, "command": ["train.py", "--resume"]}
    run.record_environment(again, resume=True)
    assert not told
    elsewhere = {**again, "processor": "Y"}
    run.record_environment(elsewhere, resume=True)
    assert json.loads(run.environment.read_text()) == {**elsewhere, "earlier": [NOW, again]}
    assert told == ["resuming with processor Y, until now it was X: what is computed from here on rounds otherwise"]
    run.record_environment(NOW, resume=False)
    assert json.loads(run.environment.read_text()) == NOW


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"earlier": 3}', "[" * 100_000])
def test_a_damaged_record_is_written_anew(tmp_path: Path, damage: str) -> None:
    run = RunFolder(tmp_path)
    run.environment.write_text(damage)
    run.record_environment(NOW, resume=True)
    assert json.loads(run.environment.read_text()) == NOW


def test_a_file_system_without_locks_is_told_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    run = RunFolder(tmp_path / "run")
    with pytest.warns(UserWarning, match="nothing keeps a second process"):
        run._acquire()
    run.close()
