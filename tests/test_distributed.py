"""Data-parallel training: two processes on CPUs, started by Paddle's launcher, against one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import paddle
import pytest

from engine import distributed
from engine.checkpoint import list_checkpoints, load_checkpoint
from engine.run import read_table
from engine.sync_batch_norm import SyncBatchNorm
from errors import UserError
from processes import ROOT, tiny_run, tool, wait, wait_for

# Mixing, accumulation, clipping, EMA and batch norms (iFormer's stem has three): all but masks drawn at random.
SAME = ("OPTIMIZER.NAME=sgd", "OPTIMIZER.LR=0.1", "TRAIN.SYNC_BATCH_NORM=true", "TRAIN.EMA_DECAY=0.9",
        "TRAIN.GRAD_CLIP=1.0", "AUGMENT.MIXUP=0.8", "AUGMENT.CUTMIX=1.0", "DATA.BATCH_SIZE=63", "TRAIN.LOG_EVERY=1",
        "TRAIN.EPOCHS=2", "TRAIN.MAX_STEPS=24", "DATA.EVAL_BATCH_SIZE=50", "DATA.WORKERS=0")
BUSY = ("TRAIN.EPOCHS=500", "TRAIN.LOG_EVERY=1", "DATA.WORKERS=0")


def _start(folder: Path, arguments: Sequence[str | Path], *, script: Path = ROOT / "tools" / "train.py",
           options: Sequence[str] = ()) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "paddle.distributed.launch", *options, "--nproc_per_node", "2",
              "--log_dir", str(folder / "log"), str(script), *map(str, arguments)]
    return subprocess.Popen(launch, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def _launch(folder: Path, *arguments: str | Path, **options: object) -> tuple[int, str]:
    process = _start(folder, arguments, **options)
    said, _ = process.communicate(timeout=200)
    return process.returncode, said


def _ranks(launcher: subprocess.Popen[str]) -> list[int]:
    """Return the ids of a job's processes, by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {name: int(child) for name in variables if name.startswith(b"PADDLE_TRAINER_ID=")}
    return [ranks[name] for name in sorted(ranks)]


def _lives(pid: int) -> bool:
    """Return True for a process that exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def jobs() -> Iterator[list[subprocess.Popen[str]]]:
    """Return a list of launchers to be killed after the test, with their processes."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            for pid in [*_ranks(process), process.pid]:
                os.kill(pid, signal.SIGKILL)
            process.communicate()


def _losses(run: Path) -> np.ndarray:
    return np.array([float(row["train_loss"]) for row in read_table(run / "steps.csv")])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one")
    tool("train", *tiny_run(output, *SAME), OMP_NUM_THREADS="1")
    return output / "quickstart"


def test_two_processes_train_as_one(one: Path, tmp_path: Path) -> None:
    """An odd batch in shards of different sizes gives the losses and the evaluation of one process."""
    code, said = _launch(tmp_path, *tiny_run(tmp_path, *SAME))
    assert code == 0 and "Traceback" not in said, said
    np.testing.assert_allclose(_losses(tmp_path / "quickstart"), _losses(one), rtol=1e-5)
    assert json.loads((tmp_path / "quickstart" / "environment.json").read_text())["processes"] == 2
    results, others = (json.loads((run / "results.json").read_text())["final"]["test"]
                       for run in (tmp_path / "quickstart", one))
    assert results["images"] == others["images"] == 360
    assert results["loss"] == pytest.approx(others["loss"], rel=1e-3)


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(one: Path, tmp_path: Path) -> None:
    """Two processes train seven steps, one continues into epoch 2, two end it."""
    code, said = _launch(tmp_path, *tiny_run(tmp_path, *SAME, "TRAIN.MAX_STEPS=7"))
    assert code == 0, said
    tool("train", *tiny_run(tmp_path, *SAME, "TRAIN.MAX_STEPS=21"), "--resume", OMP_NUM_THREADS="1")
    code, said = _launch(tmp_path, *tiny_run(tmp_path, *SAME), "--resume")
    assert code == 0 and "resuming from" in said, said
    np.testing.assert_allclose(_losses(tmp_path / "quickstart"), _losses(one), rtol=1e-5)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_its_run_can_be_resumed(
        tmp_path: Path, jobs: list[subprocess.Popen[str]]) -> None:
    run = tmp_path / "quickstart"
    process = _start(tmp_path, tiny_run(tmp_path, *BUSY))
    jobs.append(process)
    wait_for(process, run / "steps.csv", "\n25,2,")
    ranks = _ranks(process)
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert process.returncode == 2
    assert (run / "train.log").read_text().count("process 1: ended without a message") == 1
    assert "Container failed" in said and "Traceback" not in said
    assert not any(map(_lives, ranks))
    reached = load_checkpoint(list_checkpoints(run / "checkpoints")[0]).progress["global_step"]
    code, said = _launch(tmp_path, *tiny_run(tmp_path, *BUSY, f"TRAIN.MAX_STEPS={reached + 1}"), "--resume")
    assert code == 0 and "resuming from" in said, said


@pytest.mark.slow
@pytest.mark.parametrize(("whom", "code"), [
    ("launcher", signal.SIGTERM), ("process 1", 128 + signal.SIGINT), ("launcher, killed", -signal.SIGKILL)])
def test_a_signal_saves_and_ends_all(
        tmp_path: Path, jobs: list[subprocess.Popen[str]], whom: str, code: int) -> None:
    run = tmp_path / "quickstart"
    process = _start(tmp_path, tiny_run(tmp_path, *BUSY))
    jobs.append(process)
    wait_for(process, run / "steps.csv", "\n5,1,")
    ranks = _ranks(process)
    if whom.startswith("launcher"):
        process.send_signal(signal.SIGTERM if code > 0 else signal.SIGKILL)
    else:
        os.kill(ranks[1], signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    wait(lambda: not any(map(_lives, ranks)), seconds=60 if code < 0 else 0.5)
    newest = load_checkpoint(list_checkpoints(run / "checkpoints")[0])
    assert newest.progress["global_step"] >= 5
    assert "continue with --resume" in (run / "train.log").read_text()


@pytest.mark.slow
def test_a_user_error_is_reported_once_and_under_the_older_launcher_too(tmp_path: Path) -> None:
    arguments = tiny_run(tmp_path, "DATA.BATCH_SIZE=3", "DATA.WORKERS=0")
    code, said = _launch(tmp_path, *arguments, options=["--backend", "gloo"])
    assert code == 1  # that launcher's code for any error
    assert said.count("DATA.BATCH_SIZE is 3, expected at least two images for each of 2 processes") == 1
    others = (tmp_path / "log" / "workerlog.1").read_text()
    assert "BATCH_SIZE" not in others and "Traceback" not in said + others


RANKS = """
import os, time
import paddle
from configs.load import load_config
from engine import distributed
from errors import UserError
from tools import cli

def main(arguments):
    other = os.environ["PADDLE_TRAINER_ID"] == "1"
    config = load_config("configs/quickstart.yaml", ["RUNTIME.SEED=7"] if other and arguments.case == "seed" else [])
    with distributed.process_group(config):
        if arguments.case == "wait":  # longer than Gloo does
            assert distributed.main_process_first(lambda: other or time.sleep(31)) == (other or None)
            assert distributed.gather(*{False: [[[2.0]], [0]], True: [[[3.0]], [1]]}[other], 2).tolist() == [[2.0, 3.0]]
        if arguments.case == "killed":  # inside a collective
            if other:
                os.kill(os.getpid(), 9)
            distributed.collective(paddle.distributed.all_reduce, paddle.zeros([9]))
        if other:
            raise UserError("no disk") if arguments.case == "wait" else ValueError("a defect")
        distributed.all_gather_object(None)

parser = cli.argument_parser("")
parser.add_argument("case")
cli.run(main, parser, several_processes=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("case", "code", "error"), [
    ("seed", 2, "processes 0 and 1 have different configs: RUNTIME.SEED"),
    ("wait", 2, "process 1: no disk"),
    ("killed", 2, "process 1: ended without a message"),
    ("defect", 1, "process 1: ValueError: a defect (traceback in its own log)"),
])
def test_an_error_of_one_process_ends_all_and_rank_0_reports_it(
        tmp_path: Path, case: str, code: int, error: str) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    returned, said = _launch(tmp_path, case, script=script)
    assert (returned, (tmp_path / "log" / "workerlog.0").read_text().count(error)) == (code, 1), said
    assert ("Traceback" in (tmp_path / "log" / "workerlog.1").read_text()) == (case == "defect")


def test_a_missing_variable_of_the_launcher_is_reported(tmp_path: Path) -> None:
    done = tool("train", *tiny_run(tmp_path), code=2, PADDLE_TRAINERS_NUM="2", PADDLE_TRAINER_ID="0")
    assert "2, but PADDLE_CURRENT_ENDPOINT, PADDLE_TRAINER_ENDPOINTS not set" in done.stderr


def test_commands_for_one_process_refuse_a_launcher() -> None:
    assert "runs in one process" in tool("summary", "convmixer_256_8", code=2, PADDLE_TRAINERS_NUM="2").stderr


@pytest.mark.parametrize(("batch", "size"), [(8, 2), (63, 2), (63, 4), (64, 3), (10, 5), (129, 7)])
def test_shards_make_up_the_batch_and_keep_mirrors_together(batch: int, size: int) -> None:
    parts = [distributed._shard(batch, rank, size) for rank in range(size)]
    assert sorted(np.concatenate(parts)) == list(range(batch))
    for part in parts:
        np.testing.assert_array_equal(part[::-1], batch - 1 - part)
        assert len(part) >= 2 or batch == 2 * size - 1
    with pytest.raises(UserError, match="at least two images"):
        distributed._shard(2 * size - 1, 0, size)


def test_synchronised_batch_norm_of_one_process_is_paddles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paddle.distributed, "all_reduce", lambda tensor: None)
    rng = np.random.default_rng(0)
    for kind, shape in ((paddle.nn.BatchNorm2D, (4, 3, 5, 7)), (paddle.nn.BatchNorm1D, (6, 3))):
        x, weights = (rng.standard_normal(shape).astype("float32") * 3 + 10 for _ in range(2))
        results = []
        for wrap in (lambda layer: layer, SyncBatchNorm):
            paddle.seed(0)
            layer = wrap(kind(3))
            layer.weight.set_value(np.float32([1.0, 2.0, -3.0]))
            image = paddle.to_tensor(x, stop_gradient=False)
            (layer(image) * paddle.to_tensor(weights)).sum().backward()
            layer.eval()
            results.append([image.grad, layer.weight.grad, layer.bias.grad, layer._mean, layer._variance, layer(image)])
            assert set(layer.state_dict()) == {"weight", "bias", "_mean", "_variance"}
        for own, paddles in zip(*results[::-1], strict=True):
            scale = float(paddles.abs().max())
            np.testing.assert_allclose(own.numpy(), paddles.numpy(), rtol=0, atol=2e-5 * scale)
