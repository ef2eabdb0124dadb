"""The folder of a run: its record, its lock, checkpoints and tables, complete or not there."""

import errno
import fcntl
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from fuzz_cases import damaged, strangers
from paddle import nn
from test_kills import curves

from configs.load import load_config
from engine import checkpoint
from engine.checkpoint import list_checkpoints, load_checkpoint
from engine.optim import build_optimizer
from engine.run import EPOCH_COLUMNS, STEP_COLUMNS, TIMING_COLUMNS, History, RunFolder, log, read_table
from errors import UserError
from processes import trained
from utils.fileio import write_atomically, write_json, write_text

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


PARTS = {"model": {"a.weight": np.arange(6, dtype="float32").reshape(2, 3), "n": np.array(3)},
         "optimizer": {"a.weight/moment1_0": np.ones(4)}}


def _save(folder: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save_checkpoint(folder, step, PARTS, {"epoch": 1, "sums": [0.1, 1 / 3, 2.0]}, keep)


def test_round_trip_is_exact_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 5, 10, 100):
        _save(tmp_path, step)
    assert [int(path.stem) for path in checkpoint.list_checkpoints(tmp_path)] == [100, 10]
    loaded = checkpoint.load_newest(tmp_path, pytest.fail)
    assert loaded.progress == {"epoch": 1, "sums": [0.1, 1 / 3, 2.0]}
    for part, arrays in PARTS.items():
        for name, array in arrays.items():
            assert loaded.parts[part][name].dtype == array.dtype
            np.testing.assert_array_equal(loaded.parts[part][name], array)


def test_a_full_disk_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two checkpoints: 100 weights with 2 moments and the EMA, 4 bytes a number."""
    free = {"free": 3200}
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(**free))
    checkpoint.check_space(tmp_path, nn.Linear(99, 1), ema=True)
    free["free"] -= 1
    with pytest.raises(UserError, match="its disk has 0 MB free, expected at least 0 MB for checkpoints"):
        checkpoint.check_space(tmp_path, nn.Linear(99, 1), ema=True)


def test_every_damage_is_seen_and_the_one_before_is_used(tmp_path: Path) -> None:
    whole = _save(tmp_path, 1)
    path = _save(tmp_path, 2)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    damages = [data[:length] for length in (0, 1, 7, 8, 9, len(data) // 2, len(data) - 1)]
    damages += [data + b"x", *strangers().values()]
    damages += [content for _ in range(10) for _, content in damaged(data, rng)]
    seen = 0
    for damage in damages:
        path.write_bytes(damage)
        warnings: list[str] = []
        loaded = checkpoint.load_newest(tmp_path, warnings.append)
        if loaded.path == whole:
            assert len(warnings) == 1 and str(path) in warnings[0]
            seen += 1
        else:  # a flip that changes neither a tensor nor the progress, such as white space in the header
            assert loaded.progress == {"epoch": 1, "sums": [0.1, 1 / 3, 2.0]}
            np.testing.assert_array_equal(loaded.parts["model"]["a.weight"], PARTS["model"]["a.weight"])
    assert seen >= len(damages) - 3


def test_failed_write_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_text(path, "before")

    def full_disk(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"x\.json: cannot be written: No space left"):
        write_atomically(path, full_disk)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_optimizer_state_moves_between_processes_names(name: str, tmp_path: Path) -> None:
    """A network made later in a process has other parameter names in Paddle; the state must find its place."""

    def make() -> tuple[nn.Layer, paddle.optimizer.Optimizer]:
        paddle.seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        return model, build_optimizer(model, load_config(None, [f"OPTIMIZER.NAME={name}"]).OPTIMIZER, 1.0)

    def step(model: nn.Layer, optimizer: paddle.optimizer.Optimizer) -> None:
        (model(paddle.ones([2, 3])) ** 2).sum().backward()
        optimizer.step()
        optimizer.clear_grad()

    model, optimizer = make()
    for _ in range(3):
        step(model, optimizer)
    saved = checkpoint.save_checkpoint(tmp_path, 3, {
        "model": checkpoint.model_arrays(model), "optimizer": checkpoint.optimizer_arrays(optimizer, model)}, {}, 1)
    step(model, optimizer)

    other, restored = make()
    loaded = checkpoint.load_checkpoint(saved)
    other.set_state_dict(loaded.parts["model"])
    checkpoint.restore_optimizer(restored, other, loaded.parts["optimizer"])
    step(other, restored)
    np.testing.assert_equal(checkpoint.model_arrays(other), checkpoint.model_arrays(model))


def test_history_continues_without_gap_or_overlap(tmp_path: Path) -> None:
    def add_epoch(to: History, epoch: int) -> None:
        to.add_epoch(dict.fromkeys(EPOCH_COLUMNS, 0.5) | {"epoch": epoch, "iteration": 3 * epoch},
                     dict.fromkeys(TIMING_COLUMNS, 1) | {"epoch": epoch, "iteration": 3 * epoch})

    history = History(tmp_path)
    for iteration in range(1, 8):
        history.add_step(dict.fromkeys(STEP_COLUMNS, 0.1) | {"iteration": iteration, "epoch": (iteration + 2) // 3})
    for epoch in (1, 2):
        add_epoch(history, epoch)
    history.close()
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("8,3,0.")  # torn by a kill
    resumed = History(tmp_path, global_step=4, epoch=1)
    resumed.add_step(dict.fromkeys(STEP_COLUMNS, 1 / 3) | {"iteration": 5, "epoch": 2})
    add_epoch(resumed, 2)
    resumed.close()
    assert [int(row["iteration"]) for row in read_table(tmp_path / "steps.csv")] == [1, 2, 3, 4, 5]
    assert float(read_table(tmp_path / "steps.csv")[-1]["lr"]) == 1 / 3
    assert [row["epoch"] for row in read_table(tmp_path / "history.csv")] == ["1", "2"]
    drawn: dict[str, list[int]] = {}
    for tag, step, _ in curves(tmp_path):
        drawn.setdefault(tag, []).append(step)
    assert drawn == {**{f"train/{name}": [1, 2, 3, 4, 5] for name in STEP_COLUMNS[2:]},
                     **{f"epoch/{name}": [3, 6] for name in EPOCH_COLUMNS[2:]}}


@pytest.mark.parametrize("contents", [b"\xff\xfe\x00", b"epoch,iteration\nx,y\n", None])
def test_file_that_is_not_a_table_is_named(tmp_path: Path, contents: bytes | None) -> None:
    path = tmp_path / "history.csv"
    path.mkdir() if contents is None else path.write_bytes(contents)
    with pytest.raises(UserError, match=r"history\.csv"):
        read_table(path)


def test_path_under_a_file_or_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    for name in ("file/x.json", "folder.json"):
        with pytest.raises(UserError, match=f"{name}: cannot be written"):
            write_text(tmp_path / name, "")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder.json"]
    with pytest.raises(UserError, match="expected that of a file"):
        write_text(Path("."), "")
