"""The loop in one process: where it may stop, what it then keeps, and which weights its results belong to."""

import io
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

import kernels
from analysis.confusion import draw_confusion
from analysis.grids import draw_grid
from configs.load import load_config
from engine import runtime, state
from engine import train as train_module
from engine.checkpoint import list_checkpoints, load_checkpoint, model_arrays, optimizer_arrays
from engine.data import build_train_loader
from engine.interrupts import Interrupted, StopRequest
from engine.run import RunFolder, read_table
from engine.weights import read_weights
from errors import UserError
from processes import TINY, never_right, poison, signal_at, tiny, trained
from utils.progress import TrainingBar


def _newest(run: Path):
    return load_checkpoint(list_checkpoints(run / "checkpoints")[0])


def _batch() -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype("float32"), np.arange(8)


def test_stopping_in_the_last_evaluation_keeps_the_final_weights(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The selected weights are evaluated last; a checkpoint written then must hold the run's own state."""
    pairs = ("TRAIN.EPOCHS=2", "TRAIN.EMA_DECAY=0.9")
    evaluate = train_module.evaluate
    with monkeypatch.context() as patch:
        never_right(patch, after=19)
        patch.setattr(train_module, "evaluate",
                      lambda *arguments: os.kill(os.getpid(), signal.SIGINT) or evaluate(*arguments))
        with pytest.raises(Interrupted):
            trained(tmp_path, *pairs)
    run = tmp_path / "quickstart"
    saved, final = _newest(run).parts["ema"], read_weights(run / "final_model.pdparams").arrays
    assert all(np.array_equal(saved[name], final[name]) for name in final)
    results = trained(tmp_path, *pairs, resume=True)
    assert results["selected"]["epoch"] == 1 and results["final"]["epoch"] == 2
    assert results["selected"]["test"] != results["final"]["test"]


def test_resuming_a_finished_run_repeats_its_results(tmp_path: Path) -> None:
    results = trained(tmp_path, "TRAIN.MAX_STEPS=19")  # an epoch exactly
    table = (tmp_path / "quickstart" / "history.csv").read_bytes()
    assert trained(tmp_path, "TRAIN.MAX_STEPS=19", resume=True) == results
    assert (tmp_path / "quickstart" / "history.csv").read_bytes() == table


def test_ending_earlier_than_planned_is_labelled_by_the_epoch_of_the_weights(tmp_path: Path) -> None:
    trained(tmp_path, "TRAIN.MAX_STEPS=45", "TRAIN.EVAL_EVERY=20", "TRAIN.EPOCHS=4")
    results = trained(tmp_path, "TRAIN.EVAL_EVERY=20", "TRAIN.EPOCHS=1", resume=True)
    assert results["final"]["epoch"] == results["selected"]["epoch"] == 3
    assert [row["iteration"] for row in read_table(tmp_path / "quickstart" / "history.csv")] == ["19", "38", "45"]


@pytest.mark.parametrize("step", [19, 21])  # at the end of an epoch, and inside one
def test_ending_before_the_first_evaluation_evaluates(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    with monkeypatch.context() as patch:
        signal_at(patch, step)
        with pytest.raises(Interrupted):
            trained(tmp_path, "TRAIN.EVAL_EVERY=20")
    results = trained(tmp_path, "TRAIN.EVAL_EVERY=20", "TRAIN.EPOCHS=1", resume=True)
    assert results["selected"] == results["final"] and results["final"]["epoch"] == -(-step // 19)
    assert (tmp_path / "quickstart" / "best_model.pdparams").exists()


def test_selected_weights_of_a_cut_epoch_are_not_taken_for_the_final_ones(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial ends inside epoch 1 and is resumed to end later in it: best and final share only the epoch."""
    trained(tmp_path, "TRAIN.MAX_STEPS=5")
    never_right(monkeypatch, after=5)
    results = trained(tmp_path, "TRAIN.MAX_STEPS=9", resume=True)
    assert results["selected"]["epoch"] == results["final"]["epoch"] == 1
    assert results["selected"]["test"]["loss"] != results["final"]["test"]["loss"]
    assert json.loads((tmp_path / "quickstart" / "results.json").read_text()) == results


def test_losses_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the holdout loss is nan"):
        trained(tmp_path, "OPTIMIZER.WEIGHT_DECAY=1e300", "TRAIN.MAX_STEPS=1")
    with pytest.raises(UserError, match=r"the training loss is .* try a lower OPTIMIZER\.LR"):
        trained(tmp_path, "OPTIMIZER.NAME=sgd", "OPTIMIZER.WEIGHT_DECAY=1e30", "SCHEDULE.NAME=constant",
                "SCHEDULE.WARMUP_EPOCHS=0", "TRAIN.LOG_EVERY=1", overwrite=True)
    assert not (tmp_path / "quickstart" / "best_model.pdparams").exists()


def test_output_that_nobody_reads_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        results = trained(tmp_path, "TRAIN.MAX_STEPS=1")
    assert results["final"]["test"]["images"] == 360
    assert "final weights" in (tmp_path / "quickstart" / "train.log").read_text(encoding="utf-8")


def test_checkpoint_of_another_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path, "TRAIN.MAX_STEPS=1")
    other = state.build_model(tiny(tmp_path, "MODEL.ARGS.embed_dims=[8, 16, 16, 64]"))
    monkeypatch.setattr(state, "build_model", lambda config: other)
    with pytest.raises(UserError, match="its model is not that of iformer_small"):
        trained(tmp_path, "TRAIN.MAX_STEPS=1", resume=True)


def test_a_folder_takes_one_run_at_a_time(tmp_path: Path) -> None:
    """A mistake before the first step leaves nothing to continue; a run is only replaced with ``overwrite``."""
    with pytest.raises(UserError, match="no cifar-10"):
        trained(tmp_path, "DATA.NAME=cifar10", "DATA.DOWNLOAD=false", f"DATA.ROOT={tmp_path}")
    assert trained(tmp_path, "TRAIN.MAX_STEPS=1")["final"]["epoch"] == 1
    with pytest.raises(UserError, match=r"holds a run already: .*--resume.*--overwrite"):
        trained(tmp_path, "TRAIN.MAX_STEPS=1")
    config = tiny(tmp_path, "TRAIN.MAX_STEPS=2")
    other = RunFolder(tmp_path / "quickstart")
    other.open(tiny(tmp_path, "TRAIN.MAX_STEPS=1"), resume=True, overwrite=False)
    with pytest.raises(UserError, match=f"process {os.getpid()} is writing into this run"):
        train_module.train(config, overwrite=True)
    other.close()
    train_module.train(config, overwrite=True)
    assert [row["iteration"] for row in read_table(tmp_path / "quickstart" / "history.csv")] == ["2"]


def test_weights_selected_on_test_are_not_evaluated_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for module in (state, train_module):
        monkeypatch.setattr(module, "evaluate", lambda *rest, evaluate=module.evaluate: calls.append(1)
                            or evaluate(*rest))
    results = trained(tmp_path, "DATA.HOLDOUT=0", "TRAIN.EPOCHS=1")
    assert len(calls) == 1
    assert results["final"] == results["selected"] and results["selected_on"] == "test"


def test_the_time_of_an_epoch_is_that_of_all_its_sittings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``timing.csv`` counts the seconds before an interruption; the next epoch has its own row."""
    clock, real = [0.0], train_module.time.perf_counter
    with monkeypatch.context() as patch:
        signal_at(patch, 7)
        patch.setattr(train_module.time, "perf_counter", lambda: real() + clock[0])
        patch.setattr(state.runtime, "seed_everything", lambda *path, seed=runtime.seed_everything: (
            clock.append(clock.pop() + 1000), seed(*path)))
        with pytest.raises(Interrupted):
            trained(tmp_path)
    saved = _newest(tmp_path / "quickstart").progress
    assert saved["step"] == 7 and saved["seconds"] > 7000
    trained(tmp_path, "TRAIN.EPOCHS=2", resume=True)
    first, second = read_table(tmp_path / "quickstart" / "timing.csv")
    assert float(first["train_seconds"]) > saved["seconds"] > 1000 > float(second["train_seconds"])
    assert float(first["train_images_per_second"]) == pytest.approx(19 * 25 / float(first["train_seconds"]), abs=0.01)


# Skipped steps ------------------------------------------------------------------------------------------------------


def test_skipped_steps_leave_no_trace_and_are_counted_through_a_resume(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = ("TRAIN.ON_NAN=skip", "TRAIN.LOG_EVERY=1", "TRAIN.EMA_DECAY=0.9", "TRAIN.EPOCHS=1", "MODEL.DROP_PATH=0.2")
    bad = (3, 4, 9)
    poison(monkeypatch, *bad)
    whole = trained(tmp_path / "whole", *pairs)
    with monkeypatch.context() as patch:
        signal_at(patch, 5)
        with pytest.raises(Interrupted):
            trained(tmp_path / "resumed", *pairs)
    folders = [tmp_path / name / "quickstart" for name in ("whole", "resumed")]
    assert {name: _newest(folders[1]).progress[name] for name in ("skipped", "skipped_in_a_row")} == {
        "skipped": 2, "skipped_in_a_row": 2}
    assert whole == trained(tmp_path / "resumed", *pairs, resume=True) and whole["skipped_steps"] == 3
    assert [row["iteration"] for row in read_table(folders[0] / "steps.csv")] == [
        str(step + 1) for step in range(19) if step not in bad]
    one, other = (_newest(folder).parts for folder in folders)
    np.testing.assert_equal(other, one)
    assert all(np.isfinite(array).all() for arrays in one.values() for array in arrays.values())
    assert "iteration 4 skipped: its loss is nan (1 skipped so far)" in (folders[0] / "train.log").read_text()


def test_a_skipped_step_changes_nothing(tmp_path: Path) -> None:
    own = state.TrainingState(tiny(tmp_path, "TRAIN.ON_NAN=skip", "TRAIN.EMA_DECAY=0.9"))
    images, labels = _batch()
    own.step(images, labels, 0, 0.01)

    def arrays() -> tuple[dict[str, np.ndarray], ...]:
        averages = {name: tensor.numpy() for name, tensor in own.ema.state.items()}
        return model_arrays(own.model), averages, optimizer_arrays(own.optimizer, own.model)

    before = arrays()
    images[0, 0, 0, 0] = np.inf
    assert not own.step(images, labels, 1, 0.01).taken
    np.testing.assert_equal(arrays(), before)


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "MAX_SKIPPED_IN_A_ROW", 4)
    poison(monkeypatch, 1, *range(3, 10))
    with pytest.raises(UserError, match=r"4 steps in a row were skipped up to iteration 7 .* iteration 3 was \d"):
        trained(tmp_path, "TRAIN.ON_NAN=skip", "TRAIN.LOG_EVERY=1")


def test_weights_that_are_not_finite_are_never_a_checkpoint(tmp_path: Path) -> None:
    """A loss may still be finite when the step after it has ruined the weights."""
    own, run = state.TrainingState(tiny(tmp_path)), RunFolder(tmp_path)
    good = own.save(run)
    weight = next(iter(own.model.parameters()))
    weight.set_value(np.full(weight.shape, np.nan, "float32"))
    with pytest.raises(UserError, match=r"is not finite: no checkpoint is written"):
        own.save(run)
    assert list_checkpoints(run.checkpoints) == [good]


# Precision, micro-batches, kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
def test_auto_precision_is_chosen_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """bfloat16 where the processor has it; a run that began in float32 stays in it on another processor."""
    if fast and not kernels.status().get("bfloat16"):
        pytest.skip("no AVX512_BF16")
    found = kernels.status()
    monkeypatch.setattr(kernels, "status", lambda: {**found, "bfloat16": fast})
    trained(tmp_path, "TRAIN.PRECISION=auto", "TRAIN.MAX_STEPS=1")
    monkeypatch.setattr(kernels, "status", lambda: {**found, "bfloat16": not fast})
    trained(tmp_path, "TRAIN.PRECISION=auto", "TRAIN.MAX_STEPS=2", resume=True)
    log = (tmp_path / "quickstart" / "train.log").read_text()
    environment = json.loads((tmp_path / "quickstart" / "environment.json").read_text())
    assert environment["precision"] == "float32"
    assert ("resuming with precision float32, until now it was bfloat16" in log) == fast
    assert "PRECISION: auto" in (tmp_path / "quickstart" / "config.yaml").read_text()


def test_accumulation_takes_the_same_step_without_batch_statistics(tmp_path: Path) -> None:
    weights = []
    for count in (1, 3):
        own = state.TrainingState(tiny(tmp_path, f"TRAIN.ACCUMULATE={count}", "OPTIMIZER.NAME=sgd"))
        own.model.eval()  # batch statistics of micro-batches would differ
        step = own.step(*_batch(), 0, 0.1)
        assert step.images == 8 and 0 <= float(step.correct) <= 8 and np.isfinite(float(step.loss))
        weights.append(np.concatenate([parameter.numpy().ravel() for parameter in own.model.parameters()]))
    assert np.abs(weights[0] - weights[1]).max() < 1e-5


def test_a_step_abandoned_between_micro_batches_leaves_no_trace(tmp_path: Path) -> None:
    own, once = (state.TrainingState(tiny(tmp_path, "TRAIN.ACCUMULATE=4")) for _ in range(2))
    before = model_arrays(own.model)
    calls = iter((None, None, KeyboardInterrupt()))

    def third_time() -> None:
        if error := next(calls):
            raise error

    with pytest.raises(KeyboardInterrupt):
        own.step(*_batch(), 0, 0.1, third_time)
    np.testing.assert_equal(model_arrays(own.model), before)
    assert all(parameter.grad is None or not parameter.grad.numpy().any() for parameter in own.model.parameters())
    own.step(*_batch(), 0, 0.1)
    once.step(*_batch(), 0, 0.1)
    np.testing.assert_equal(model_arrays(own.model), model_arrays(once.model))


@pytest.mark.parametrize(("size", "batch", "device", "count"), [
    (224, 128, "cpu", 8), (224, 128, "gpu:0", 1), (32, 128, "cpu", 1), (64, 1024, "cpu", 6), ([448, 224], 3, "cpu", 1),
    (4096, 2, "cpu", 2)])
def test_batches_are_split_on_a_cpu_alone(
        tmp_path: Path, size: int | list[int], batch: int, device: str, count: int) -> None:
    pairs = [f"DATA.IMAGE_SIZE={size}", f"DATA.BATCH_SIZE={batch}"]
    assert state.count_micro_batches(tiny(tmp_path, *pairs), device) == count
    assert state.count_micro_batches(tiny(tmp_path, *pairs, "TRAIN.ACCUMULATE=1"), device) == 1


@pytest.mark.parametrize("network", [
    TINY, ["MODEL.NAME=poolformer_s12", "MODEL.ARGS={depths: [1, 2, 1, 1], embed_dims: [16, 24, 32, 48]}"],
    ["MODEL.NAME=coatnet_0", "MODEL.ARGS={depths: [1, 1, 2, 1], embed_dims: [32, 32, 64, 96], stem_dim: 16}"]],
    ids=["iformer", "poolformer", "coatnet"])
def test_compiled_operators_train_as_stock_ones(network: list[str]) -> None:
    """Ten steps on real digits: the losses of both agree to float tolerance, grown by ten updates."""
    config = load_config(None, ["DATA.NAME=digits", "DATA.HOLDOUT=180", "DATA.IMAGE_SIZE=32", "DATA.BATCH_SIZE=25",
                                "OPTIMIZER.NAME=sgd", *network])
    losses = {}
    for mode in kernels.MODES:
        with kernels.using(mode):
            own, batches = state.TrainingState(config), build_train_loader(config).epoch(0)
            losses[mode] = [float(own.step(*next(batches), step, 0.05).loss) for step in range(10)]
    np.testing.assert_allclose(losses["auto"], losses["stock"], rtol=1e-4)
    assert losses["auto"][-1] < losses["auto"][0]


def test_a_step_reads_nothing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = state.TrainingState(tiny(tmp_path, "TRAIN.EMA_DECAY=0.9", "TRAIN.GRAD_CLIP=1.0", "MODEL.DROP_PATH=0.1",
                                   "AUGMENT.CUTMIX=1.0"))
    own.model.train()

    def step(number: int) -> None:
        taken = own.step(*_batch(), number, 1e-3)
        own.means.add(taken.loss, taken.correct, taken.images)

    step(0)
    with monkeypatch.context() as patch:
        for name in ("numpy", "item", "tolist", "__float__", "__bool__", "__int__", "__array__"):
            patch.setattr(paddle.Tensor, name, lambda *_, **__: pytest.fail("read back"))
        with pytest.raises(pytest.fail.Exception):
            float(paddle.ones([]))
        step(1)
    assert own.means.sums()[2] == 16 and own.ema.updates == 2


# Signals, bars, pictures --------------------------------------------------------------------------------------------


def test_closed_terminal_stops_but_not_under_nohup() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(Interrupted, match="SIGHUP"):
            stop.check()
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("launched", [False, True])
def test_second_signal_ends_at_once_but_not_a_launchers_repeated_one(
        monkeypatch: pytest.MonkeyPatch, launched: bool) -> None:
    if launched:
        monkeypatch.setenv("PADDLE_TRAINERS_NUM", "1")
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signum == signal.SIGINT and not ended
            os.kill(os.getpid(), signal.SIGTERM)
            assert ended == [143] * (not launched)
            stop._came -= 3.0
            os.kill(os.getpid(), signal.SIGTERM)
            assert ended[-1:] == [143]
    finally:
        for signum, handler in previous.items():  # under a launcher they stay
            signal.signal(signum, handler)


def test_bar_shows_rate_and_time_left_in_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = TrainingBar(total=100 * 390 * 128, done=0)
    bar.start("epoch 100/100", 390, 188)
    bar.train_batch(128, lambda: (2.1256, 0.2865), 1e-3)
    shown = sys.stderr.getvalue().split("\r")[-1][:80]
    bar.finish()
    assert "189/390" in shown and "images/s" in shown and " left, loss 2.12" in shown


def test_time_left_includes_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("utils.progress.time.perf_counter", lambda: now[0])
    shown = []
    monkeypatch.setattr("utils.progress.log.info", lambda text, *values: shown.append(text % values))
    bar = TrainingBar(total=1000, done=0, evaluations=5, images=300)
    bar.start("epoch 1/1", 10)
    now[0] = 10.0
    bar.train_batch(100, lambda: (1.0, 0.5), 0.1)  # 10 images a second; an evaluation at 30 takes 10 s
    with bar.evaluation("epoch 1/1 test", 3):
        now[0] += 20.0
    bar.start("epoch 1/1", 10, 1)
    now[0] += 10.0
    bar.train_batch(100, lambda: (1.0, 0.5), 0.1)
    assert "0:02:20 left" in shown[0] and "0:02:40 left" in shown[1]


def test_names_in_pictures_are_no_formulas(tmp_path: Path) -> None:
    name = r"$\frac$ 100%"
    draw_grid([np.zeros((4, 4, 3), np.uint8)], [name], ["black"], tmp_path / "grid.png", title=name)
    draw_confusion([[1, 0], [0, 1]], [name, "b"], tmp_path / "confusion.png", name)
    assert all((tmp_path / f"{kind}.png").stat().st_size > 1000 for kind in ("grid", "confusion"))
