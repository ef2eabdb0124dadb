"""The page of results: built from real folders, true to them, and the committed one is what the command writes."""

import json
import shutil
import statistics
from pathlib import Path

import cv2
import pytest

from analysis.formatting import quantity, table, text_table
from analysis.results import plot as results_plot
from analysis.results.page import PLOT, Trained, duration, page, read_released, share
from analysis.results.plot import Point, draw_results, points
from analysis.results.run_record import machines
from engine.released import FOLDER, released_names
from errors import UserError
from processes import ROOT, command
from utils.fileio import read_csv

PUBLISHED = read_csv(ROOT / "analysis" / "published.csv")


def cells(text: str, name: str) -> list[list[str]]:
    """Return the cells of every table row whose first cell is about ``name``."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if f"`{name}`" in row[0]]


@pytest.fixture(scope="module")
def trained(toy: Path) -> Trained:
    return read_released(toy.parent)[0]


def test_the_page_is_true_to_its_folders(toy: Path, trained: Trained, tmp_path: Path) -> None:
    command("results", "--checkpoints", toy.parent, "--write", tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    accuracy, cost, seeds = cells(text, "toy")
    results = json.loads((toy / "results.json").read_text())
    test, top1 = results["test"][0], 100 * results["test"][0]["top1"]
    assert "### digits" in text and accuracy[1] == "iFormer" and accuracy[2] == f"{results['parameters']:,}"
    assert accuracy[4] == f"{top1:.2f} ± {(top1 * (100 - top1) / 360) ** 0.5:.2f}"
    assert accuracy[5:8] == [f"{100 * value:.2f}" for value in (results["final"]["test"]["top1"], test["top5"],
                                                               test["ece"])]
    assert cost[1] == "2" and results["training"]["machines"][0] in cost[5]
    assert f"# toy\n{results['training']['command']}\n" in text
    each = [float(row["selected_top1"]) * 100 for row in trained.seeds]
    assert seeds[1:3] == ["42, 43", f"{statistics.mean(each):.2f} ± {abs(each[0] - each[1]) / 2**0.5:.2f}"]
    assert "python tools/eval.py -w toy" in text
    assert f"]({PLOT})" in text and cv2.imread(str(tmp_path / PLOT)).shape[1] > 800


def test_what_is_unusual_is_noted_and_published_networks_are_beside(trained: Trained) -> None:
    results = {**trained.results, "selected_on": "test",
               "test": [{**trained.test, "data": "CIFAR-10", "images": 10_000, "top1": 0.9234}]}
    text = page([Trained("net", results, [])], PUBLISHED)
    accuracy, _, beside = cells(text, "net")
    assert accuracy[4:6] == ["92.34", share(trained.final)] and "- `net`: selected on the test set.\n" in text
    assert "Several seeds" not in text and beside[1] == "**92.34**" and beside[5] == "CIFAR-10"
    better, worse = text.split("\n| **`net`**")
    assert "| more than 94 | 100 |" in better and "| 89.8 | 450 |" in worse
    assert better.splitlines()[-1].startswith("| ConvMixer-256/8 | 92.6 | 25 | 594.2K | 148.1M")
    del results["final"]
    assert "- `net`: released after 2 of 2 epochs.\n" in page([Trained("net", results, [])], [])


def test_a_page_of_nothing_claims_nothing(tmp_path: Path) -> None:
    command("results", "--checkpoints", tmp_path, "--write", tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "None yet." in text and "| CCT-6/3x1 | 94.81 | 200 | 3.168M | 813M |" in text
    assert "here |" not in text and PLOT not in text and not (tmp_path / "docs").exists()
    assert "no released checkpoints" in command("results", "--checkpoints", tmp_path)


def test_changed_folders_and_broken_tables_are_refused(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy, tmp_path / "toy")
    (tmp_path / "toy" / "results.json").write_text("{}")
    with pytest.raises(UserError, match=r"results\.json has sha256"):
        read_released(tmp_path)
    for content in (b"a,b\n1\n", b"a,b\n1,2,3\n", b"a\n\xff\n"):
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(UserError, match=r"t\.csv: (row 2 does not have as many cells|cannot be read)"):
            read_csv(tmp_path / "t.csv")


def test_labels_of_the_plot_cover_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven trainings of nearly the same cost and accuracy, beside the published ones."""
    drawn = []
    monkeypatch.setattr(results_plot, "save_figure", lambda figure, path: drawn.append(figure))
    shown = [Point(5e15 * (1 + 0.02 * index), 92 + 0.1 * index, f"network_{index}_cifar10, 60 epochs", True)
             for index in range(7)] + points([], PUBLISHED)
    draw_results(shown, tmp_path / "plot.png")
    figure = drawn[0]
    renderer = figure.canvas.get_renderer()
    axes = figure.axes[0]
    boxes = []
    for text in axes.texts:
        text.update_positions(renderer)
        boxes.append(super(type(text), text).get_window_extent(renderer))
    assert len(boxes) == len(shown)
    marks = axes.transData.transform([(point.macs, point.accuracy) for point in shown])
    for index, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:index]) and not any(box.contains(*mark) for mark in marks), index


def test_units() -> None:
    assert [quantity(number) for number in (7, 594_186, 2_189_574, 148_113_920, 4.8258e9, 2.5e15, 999_600_000)] == [
        "7", "594.2K", "2.19M", "148.1M", "4.826G", "2.5P", "999.6M"]
    assert [duration(seconds) for seconds in (59, 600, 9000)] == ["59 s", "10 min", "2.5 h"]
    assert table(["Network", "Top-1"], [["a|b", "1"]]).splitlines()[1:] == ["| :--- | ---: |", "| a\\|b | 1 |"]
    assert table(["Top-1", "Data"], [["1", "x"]], {"data"}).splitlines()[1] == "| ---: | :--- |"
    assert text_table(("a", "number"), [("one", "1")]) == "a    number\none       1"


@pytest.mark.skipif(not released_names(), reason="no checkpoint is released")
def test_the_committed_page_is_what_the_command_writes() -> None:
    written = page(read_released(FOLDER), PUBLISHED)
    assert (ROOT / "RESULTS.md").read_text(encoding="utf-8") == written, "python tools/results.py --write RESULTS.md"
    assert (ROOT / PLOT).exists()


def test_machines_show_the_cores_used() -> None:
    found = machines([{"processor": "A", "cores": 2, "threads": "1"}, {"processor": "A", "cores": 2, "threads": "2"},
                     {"processor": "B", "cores": 1}, {"gpu": "G", "cores": 8}, {}])
    assert found == ["A, 1 of 2 cores", "A, 2 cores", "B, 1 core", "G", "processor unknown, ? cores"]
