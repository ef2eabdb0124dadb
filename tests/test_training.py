"""Training as a user runs it: what it leaves, how it stops, and that resuming changes nothing."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from engine.history import read_table
from engine.weights.load import read_weights
from processes import overrides, start_tool, tiny_run, tool, wait_for

# Everything that draws random numbers: dropout, drop path, mixup, cutmix, augmentation; and what must be carried
# along: moving average, batch statistics, optimizer.
RANDOM = ("TRAIN.EPOCHS=3", "MODEL.DROP_PATH=0.2", "MODEL.ARGS.drop_rate=0.1", "AUGMENT.MIXUP=0.8",
          "AUGMENT.CUTMIX=1.0", "TRAIN.EMA_DECAY=0.9", "TRAIN.LOG_EVERY=1", "DATA.WORKERS=2", "TRAIN.GRAD_CLIP=1.0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was never interrupted."""
    output = tmp_path_factory.mktemp("runs")
    done = tool("train", *tiny_run(output, *RANDOM))
    assert done.returncode == 0, done.stderr
    return output / "quickstart"


def test_run_folder_holds_what_it_should(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.yaml", "environment.json", "train.log", "history.csv", "steps.csv", "timing.csv",
                     "best_model.pdparams", "best_optimizer.pdopt", "final_model.pdparams", "final_optimizer.pdopt",
                     "checkpoints", "loss.png", "accuracy.png", "predictions.png", "results.json", "vdl"}
    assert not [name for name in names if name.endswith(".tmp")]
    assert [row["epoch"] for row in read_table(finished / "history.csv")] == ["1", "2", "3"]
    assert len(read_table(finished / "steps.csv")) == 3 * 19
    assert len(list((finished / "checkpoints").iterdir())) == 2
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["paddle"].startswith("3.3") and environment["device"] == "cpu"
    for name in ("loss.png", "accuracy.png", "predictions.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_evaluation_gives_the_figures_of_the_run(finished: Path, tmp_path: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    for kind, weights in (("selected", finished), ("final", finished / "final_model")):
        done = tool("eval", "-c", finished / "config.yaml", "-w", weights, "--json", tmp_path / "e.json",
                    "--confusion", tmp_path / "c.png")
        assert done.returncode == 0, done.stderr
        figures = json.loads((tmp_path / "e.json").read_text())
        assert {key: figures[key] for key in results[kind]["test"]} == results[kind]["test"]
        confusion = np.array(figures["confusion"])
        assert confusion.sum() == figures["images"] == 360
        assert confusion.trace() / 360 == figures["top1"]
        assert f"{figures['top1']:.4%}" in done.stdout
    assert (tmp_path / "c.png").stat().st_size > 1000


def _assert_same_run(one: Path, other: Path) -> None:
    for name in ("steps.csv", "history.csv", "results.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("best_model.pdparams", "final_model.pdparams"):
        arrays, others = read_weights(one / name).arrays, read_weights(other / name).arrays
        assert arrays.keys() == others.keys()
        assert all(np.array_equal(arrays[key], others[key]) for key in arrays), name
    newest = [sorted((run / "checkpoints").glob("*.safetensors"))[-1] for run in (one, other)]
    states = [load_file(path) for path in newest]
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(("signum", "row"), [
    (signal.SIGINT, "\n5,1,"), (signal.SIGTERM, "\n30,2,"), (signal.SIGKILL, "\n44,3,")])
def test_resuming_changes_nothing(finished: Path, tmp_path: Path, signum: signal.Signals, row: str) -> None:
    run = tmp_path / "quickstart"
    process = start_tool("train", *tiny_run(tmp_path, *RANDOM))
    wait_for(process, run / "steps.csv", row)
    process.send_signal(signum)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[signum]
    assert "Traceback" not in said
    assert signum == signal.SIGKILL or "continue with --resume" in said
    done = tool("train", *tiny_run(tmp_path, *RANDOM), "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    _assert_same_run(finished, run)


def test_resuming_a_folder_by_its_name_and_for_longer(tmp_path: Path) -> None:
    first = tool("train", *tiny_run(tmp_path, "TRAIN.EPOCHS=2", "TRAIN.MAX_STEPS=10"))
    assert first.returncode == 0, first.stderr
    run = tmp_path / "quickstart"
    more = tool("train", "--resume", run, *overrides("TRAIN.MAX_STEPS=0"))
    assert more.returncode == 0, more.stderr
    assert "TRAIN.MAX_STEPS was 10, now 0" in more.stdout
    assert [row["iteration"] for row in read_table(run / "history.csv")] == ["19", "38"]


def test_resuming_with_another_meaning_is_refused(finished: Path) -> None:
    done = tool("train", "--resume", finished, *overrides("OPTIMIZER.LR=0.5", "DATA.BATCH_SIZE=32"))
    assert done.returncode == 2
    assert "OPTIMIZER.LR was 0.002, now 0.5" in done.stderr and "DATA.BATCH_SIZE was 64, now 32" in done.stderr


def test_torn_checkpoint_is_named_and_the_one_before_used(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    process = start_tool("train", *tiny_run(tmp_path, *RANDOM))
    wait_for(process, run / "history.csv", "\n2,38,")
    wait_for(process, run / "steps.csv", "\n40,3,")
    process.kill()
    process.communicate()
    newest = sorted((run / "checkpoints").glob("*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    done = tool("train", *tiny_run(tmp_path, *RANDOM), "--resume")
    assert done.returncode == 0, done.stderr
    assert f"{newest}: not a whole checkpoint" in done.stdout
    _assert_same_run(finished, run)


def test_two_runs_into_one_folder(tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    process = start_tool("train", *tiny_run(tmp_path, "TRAIN.EPOCHS=50", "TRAIN.LOG_EVERY=1"))
    try:
        wait_for(process, run / "steps.csv", "\n1,1,")
        second = tool("train", *tiny_run(tmp_path, "TRAIN.EPOCHS=50", "TRAIN.LOG_EVERY=1"), "--overwrite")
        assert second.returncode == 2
        assert f"process {process.pid} is writing" in second.stderr
    finally:
        process.kill()
        process.communicate()
    third = tool("train", *tiny_run(tmp_path, "TRAIN.EPOCHS=1"))
    assert third.returncode == 2 and "--resume" in third.stderr and "--overwrite" in third.stderr
    fourth = tool("train", *tiny_run(tmp_path, "TRAIN.EPOCHS=1"), "--overwrite")
    assert fourth.returncode == 0, fourth.stderr
    assert len(read_table(run / "history.csv")) == 1


def test_second_signal_ends_at_once(tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    process = start_tool("train", *tiny_run(tmp_path, "TRAIN.EPOCHS=50", "TRAIN.LOG_EVERY=1"))
    wait_for(process, run / "steps.csv", "\n1,1,")
    process.send_signal(signal.SIGSTOP)  # so that both are pending before either is handled
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=30)
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM)


def test_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    done = tool("train", *tiny_run(tmp_path, "OPTIMIZER.NAME=sgd", "OPTIMIZER.LR=1e30", "SCHEDULE.NAME=constant",
                                   "SCHEDULE.WARMUP_EPOCHS=0", "TRAIN.LOG_EVERY=1"))
    assert done.returncode == 2
    assert "the training loss is" in done.stderr and "OPTIMIZER.LR" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "quickstart" / "best_model.pdparams").exists()


def test_accumulation_takes_the_same_step_without_batch_statistics(tmp_path: Path) -> None:
    from configs.load import load_config
    from engine.state import TrainingState

    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((8, 3, 32, 32)).astype("float32"), np.arange(8)
    weights = []
    for parts in (1, 3):
        config = load_config("configs/quickstart.yaml", [f"TRAIN.ACCUMULATE={parts}", "OPTIMIZER.NAME=sgd"])
        state = TrainingState(config)
        state.model.eval()  # batch statistics of parts would differ
        step = state.step(images, labels, 0, 0.1)
        assert step.images == 8 and 0 <= float(step.correct) <= 8 and np.isfinite(float(step.loss))
        weights.append(np.concatenate([p.numpy().ravel() for p in state.model.parameters()]))
    assert np.abs(weights[0] - weights[1]).max() < 1e-5


def test_step_given_up_between_parts_leaves_no_trace() -> None:
    from configs.load import load_config
    from engine.state import TrainingState

    config = load_config("configs/quickstart.yaml", ["TRAIN.ACCUMULATE=4"])
    state = TrainingState(config)
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((8, 3, 32, 32)).astype("float32"), np.arange(8)
    before = {name: tensor.numpy() for name, tensor in state.model.state_dict().items()}
    calls = []

    def third_time() -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        state.step(images, labels, 0, 0.1, third_time)
    assert all(np.array_equal(tensor.numpy(), before[name]) for name, tensor in state.model.state_dict().items())
    assert all(parameter.grad is None or not parameter.grad.numpy().any() for parameter in state.model.parameters())
    state.step(images, labels, 0, 0.1)
    once = TrainingState(config)
    once.step(images, labels, 0, 0.1)
    for name, tensor in once.model.state_dict().items():
        assert np.array_equal(tensor.numpy(), state.model.state_dict()[name].numpy()), name


@pytest.mark.parametrize(("size", "batch", "device", "parts"), [
    (224, 128, "cpu", 8), (224, 128, "gpu:0", 1), (32, 128, "cpu", 1), (64, 1024, "cpu", 6), ([448, 224], 3, "cpu", 1),
    (4096, 2, "cpu", 2)])
def test_batches_are_split_on_a_cpu_alone(size: int | list[int], batch: int, device: str, parts: int) -> None:
    from configs.load import load_config
    from engine.state import parts_of_batch

    overrides = [f"DATA.IMAGE_SIZE={size}", f"DATA.BATCH_SIZE={batch}"]
    assert parts_of_batch(load_config(None, overrides), device) == parts
    assert parts_of_batch(load_config(None, [*overrides, "TRAIN.ACCUMULATE=1"]), device) == 1


def test_compiled_operators_train_as_stock_ones() -> None:
    """Ten steps on real digits: the losses of both agree to float tolerance, grown by ten updates."""
    import kernels
    from configs.load import load_config
    from engine.data import build_train_loader
    from engine.state import TrainingState

    config = load_config("configs/quickstart.yaml", ["OPTIMIZER.NAME=sgd"])
    losses = {}
    for mode in kernels.MODES:
        with kernels.using(mode):
            state = TrainingState(config)
            batches = build_train_loader(config).epoch(0)
            losses[mode] = [float(state.step(*next(batches), step, 0.05).loss) for step in range(10)]
    np.testing.assert_allclose(losses["auto"], losses["stock"], rtol=1e-4)
    assert losses["auto"][-1] < losses["auto"][0]
