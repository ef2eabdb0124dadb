"""The benchmark: real workers take turns, whatever one of them does, and mistakes end in one sentence."""

import json
import signal
import sys
from pathlib import Path

import pytest

from analysis.benchmark import measure
from analysis.benchmark.measure import compare, describe, ratios, with_utilisation
from analysis.benchmark.process import Arm, WorkerFailed, WorkerProcess, other_arm, own_arm
from analysis.benchmark.tables import Table, tables, write_page
from errors import UserError
from processes import ROOT, start_tool, tool

# A worker of ten images a second, written from the protocol alone.
ANSWERING = """
import json, sys
for line in sys.stdin:
    question = json.loads(line)
    assert {"work", "seconds"} <= set(question), question
    answer = {"name": "ten"} if question["work"] == "describe" else {}
    print(json.dumps({"seconds": [0.1 * question.get("batch_size", 1)] * 2, **answer}), flush=True)
"""


def worker(code: str, name: str = "against") -> Arm:
    return Arm(name, (sys.executable, "-c", code), ours=False)


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PAUSE", 0)


def test_ratios_are_those_of_rounds_and_the_warm_up_is_not_counted(no_pause: None) -> None:
    halving = """
import json, sys
taken = 64.0
for line in sys.stdin:
    print(json.dumps({"seconds": [taken]}), flush=True)
    taken /= 2
"""
    with WorkerProcess(worker(ANSWERING, "suite")) as steady, WorkerProcess(worker(halving)) as faster:
        cell = compare([steady, faster], {"work": "training", "batch_size": 4}, 4, 3, 0.1)
    assert cell["arms"]["suite"]["images_per_second"] == pytest.approx(10)
    assert cell["arms"]["against"]["rounds"] == pytest.approx([4 / 32, 4 / 16, 4 / 8])
    found = cell["ratios"]["best"]
    assert [found["median"], found["low"], found["high"]] == pytest.approx([40, 20, 80])
    assert cell["arms"]["suite"]["peak_bytes"] > 1 << 20
    cell = with_utilisation(cell, 5_000_000, "training", {"suite": 3.0, "suite bf16": 6.0})
    assert cell["arms"]["suite"]["utilisation"] == pytest.approx(10 * 3 * 2 * 5e6 / 3e9)


def test_the_best_is_compared_with_the_best() -> None:
    arms = {name: {"images_per_second": rate, "rounds": [rate]} for name, rate in (
        ("suite", 12.0), ("suite bf16", 18.0), ("stock", 3.0), ("A", 8.0), ("A bf16", 9.0), ("B", 4.0))}
    found = ratios(arms | {"C bf16": {"error": "not here"}})
    assert {kind: (one["median"], one["suite"], one["opponent"]) for kind, one in found.items()} == {
        "best": (2.0, "suite bf16", "A bf16"), "float32": (1.5, "suite", "A"), "stock": (6.0, "suite bf16", "stock")}
    assert ratios({"suite": arms["suite"]}) == {}


@pytest.mark.parametrize(("code", "said"), [
    ("import sys; sys.exit('no such thing')", "exit code 1: no such thing"),
    ("input(); print('hello')", "hello"),
    ("input(); print('[1]')", "[1]"),
    ("input(); print('{\"seconds\": []}')", "times above 0"),
    ("input(); print('{\"error\": \"not here\"}')", "not here"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exit code -9: it printed nothing"),
])
def test_who_fails_drops_out_and_the_others_go_on(code: str, said: str, no_pause: None) -> None:
    with WorkerProcess(worker(ANSWERING, "suite")) as first, WorkerProcess(worker(code)) as second:
        cell = compare([first, second], {"work": "inference", "batch_size": 1}, 1, 1, 0.0)
    assert said in cell["arms"]["against"]["error"]
    assert cell["arms"]["suite"]["images_per_second"] == pytest.approx(10)
    assert cell["ratios"] == {}


def test_workers_run_in_the_environments_that_they_stand_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE"):
        monkeypatch.delenv(name, raising=False)
    with WorkerProcess(own_arm("suite")) as suite, WorkerProcess(own_arm("stock")) as stock:
        ours, theirs = suite.ask({"work": "describe"}), stock.ask({"work": "describe"})
        assert theirs["threads"] == "1", "Paddle sets it where it is not set"
        assert theirs["set_by_the_suite"] == [] and theirs["kernels"]["mode"] == "stock"
        assert f"OMP_NUM_THREADS={ours['cores']}" in ours["set_by_the_suite"] and ours["kernels"]["mode"] == "auto"
        question = {"model": "poolformer_s12", "image_size": 32, "batch_size": 1, "num_classes": 10, "seconds": 0}
        assert suite.ask({**question, "work": "describe"})["macs"] > 30e6
        for work in ("inference", "training", "product"):
            assert min(suite.ask({**question, "work": work})["seconds"]) > 0
        with pytest.raises(WorkerFailed, match="nearest: iformer_small"):
            suite.ask({**question, "model": "iformer_smal", "work": "training"})
        with pytest.raises(RuntimeError, match="KeyError"):  # a defect of our own worker keeps its traceback
            suite.ask({"work": "no such work", "seconds": 0})


def test_command_measures_prints_and_writes_the_page(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(ANSWERING)
    page = tmp_path / "PERFORMANCE.md"
    page.write_text("Before.\n<!-- measured: training --><!-- end -->\nBetween.\n"
                    "<!-- measured: sizes_of_nothing -->kept<!-- end -->\n", encoding="utf-8")
    done = tool("benchmark", "--models", "poolformer_s12", "--image-sizes", "32", "--batch-size", "1", "--rounds", "1",
                "--against", f"{sys.executable} {tmp_path / 'other.py'}",
                "--json", tmp_path / "figures.json", "--write", page)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["complete"] and figures["machine"]["paddle"]
    training = next(cell for cell in figures["speed"] if cell["work"] == "training")
    assert training["arms"]["ten"]["images_per_second"] == pytest.approx(10)
    assert set(training["ratios"]) == {"best", "float32", "stock"} and describe(training)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("Before.\n") and "Between." in text and "kept" in text
    assert text.count("| poolformer_s12 | 32 | 1 |") == 1
    assert "poolformer_s12" in done.stdout and ", ten)" in text
    assert (tmp_path / "performance.png").stat().st_size > 5_000
    assert tables(figures)["training"].rows[0][:3] == ["poolformer_s12", "32", "1"]


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    process = start_tool("benchmark", "--models", "poolformer_s12", "--image-sizes", "32", "--batch-size", "1",
                         "--rounds", "1", "--json", tmp_path / "figures.json")
    line = [process.stdout.readline() for _ in range(2)][-1]
    assert "poolformer_s12 32×32, batch 1, latency" in line, line
    process.send_signal(signal.SIGINT)
    try:
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["complete"] is False and figures["speed"][0]["work"] == "latency"


@pytest.mark.parametrize(("command", "said"), [
    ("", "--against is empty"), ("a 'b", "No closing quotation"), ("no_such_command", "no such program")])
def test_a_command_that_cannot_be_started_is_refused(command: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        other_arm(command, {})


def test_page_has_a_place_for_every_table(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "PERFORMANCE.md").read_text(encoding="utf-8")
    for name in ("machine", "ceilings", "training", "inference", "latency"):
        assert text.count(f"<!-- measured: {name} -->") == 1
    assert Table("t", ("a", "b"), [["x", "1"]], ("note",)).markdown() == "| a | b |\n| :--- | ---: |\n| x | 1 |\n\nnote"
    (tmp_path / "empty.md").write_text("nothing here")
    with pytest.raises(UserError, match="no place for a table"):
        write_page(tmp_path / "empty.md", {})
