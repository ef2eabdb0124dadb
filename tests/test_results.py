"""The page of results: built from real folders, true to them, and the committed one is what the command writes."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path

import cv2
import numpy as np
import pytest
from releasing import run_in

from analysis.markdown import table
from analysis.results import plot as results_plot
from analysis.results.page import PLOT, Trained, duration, page, quantity, read_released, read_rows
from analysis.results.plot import Point, draw_results, points
from analysis.results.run_record import machines
from engine.weights.released import FOLDER, released_names
from errors import UserError
from processes import ROOT, tool

PUBLISHED = read_rows(ROOT / "analysis" / "published.csv")
RECIPES = {path.stem: read_rows(path) for path in sorted((ROOT / "docs" / "recipes").glob("*.csv"))}


def cells(text: str, name: str) -> list[list[str]]:
    """Return the cells of every table row whose first cell is about ``name``."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if f"`{name}`" in row[0]]


@pytest.fixture(scope="module")
def toy(suite: Path) -> Trained:
    return read_released(suite / "checkpoints")[0]


def test_the_page_is_true_to_its_folders(suite: Path, toy: Trained, tmp_path: Path) -> None:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    rows = 'changed,epochs,holdout_top1,images_per_second\n"LR 1e-3, a|b",2,48.12,12345\n'
    (recipes / "iformer.csv").write_text(rows)
    done = run_in(suite, "results", "--write", str(tmp_path / "RESULTS.md"), "--recipes", str(recipes))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    accuracy, cost, seeds = cells(text, "toy")
    results = json.loads((suite / "checkpoints" / "toy" / "results.json").read_text())
    test, top1 = results["test"][0], 100 * results["test"][0]["top1"]
    assert "### digits" in text and accuracy[1] == "iFormer" and accuracy[2] == f"{results['parameters']:,}"
    assert accuracy[4] == f"{top1:.2f} ± {(top1 * (100 - top1) / 360) ** 0.5:.2f}"
    assert accuracy[5:8] == [f"{100 * value:.2f}" for value in (results["final"]["test"]["top1"], test["top5"],
                                                               test["ece"])]
    assert cost[1] == "2" and results["training"]["machines"][0] in cost[5]
    assert f"# toy\n{results['training']['command']}\n" in text
    each = [float(row["selected_top1"]) * 100 for row in toy.seeds]
    assert seeds[1:3] == ["42, 43", f"{statistics.mean(each):.2f} ± {abs(each[0] - each[1]) / 2**0.5:.2f}"]
    assert "python tools/eval.py -w toy" in text
    assert "### iformer\n\n| changed | epochs | holdout top1 | images per second |" in text
    assert "| LR 1e-3, a\\|b | 2 | 48.12 | 12,345 |" in text
    assert f"]({PLOT})" in text and cv2.imread(str(tmp_path / PLOT)).shape[1] > 800


def test_figures_on_other_pixels_and_published_ones_stand_beside(toy: Trained) -> None:
    def test_row(data: str, images: int, top1: float) -> dict:
        return {**toy.main, "data": data, "images": images, "top1": top1}

    results = {**toy.results, "selected_on": "test", "test": [
        test_row("CIFAR-10 (JPEG re-encoding)", 10_000, 0.9234),
        {**test_row("CIFAR-10, 1,017 original test images", 1017, 0.93), "same_pictures_top1": 0.921}]}
    del results["final"]
    text = page([Trained("net", results, [])], PUBLISHED, {})
    accuracy, _, beside = cells(text, "net")
    assert accuracy[4:6] == ["92.34", "–"] and accuracy[8] == "93.00 ± 0.80 (92.10)"
    assert "Top-1 on CIFAR-10, 1,017 original test images" in text and "`net` was selected on the test set" in text
    assert "`net` stands after 2 of 2 epochs" in text and "Several seeds" not in text
    assert beside[1] == "**92.34**" and beside[5] == "CIFAR-10 (JPEG re-encoding)"
    lines = text.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("| **`net`**"))
    assert "| more than 94 | 100 |" in "\n".join(lines[:place]) and "| 89.8 | 450 |" in "\n".join(lines[place:])
    assert lines[place - 1].startswith("| ConvMixer-256/8 | 92.6 | 25 | 594,186 | 148M")


def test_a_page_of_nothing_claims_nothing(tmp_path: Path) -> None:
    done = tool("results", "--checkpoints", tmp_path, "--recipes", tmp_path, "--write", tmp_path / "RESULTS.md")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "None yet." in text and "| CCT-6/3x1 | 94.81 | 200 | 3.17M | 813M |" in text
    assert "here |" not in text and PLOT not in text and "tried" not in text and not (tmp_path / "docs").exists()
    assert "no released checkpoints" in tool("results", "--checkpoints", tmp_path).stdout


def test_changed_folders_and_broken_tables_are_refused(suite: Path, tmp_path: Path) -> None:
    shutil.copytree(suite / "checkpoints" / "toy", tmp_path / "toy")
    (tmp_path / "toy" / "results.json").write_text("{}")
    with pytest.raises(UserError, match=r"results\.json has sha256"):
        read_released(tmp_path)
    for content in (b"a,b\n1\n", b"a,b\n1,2,3\n", b"a\n\xff\n"):
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(UserError, match=r"t\.csv: (row 2 has not as many cells|cannot be read)"):
            read_rows(tmp_path / "t.csv")


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
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index]), shown[index].label
        marks = axes.transData.transform([(point.macs, point.accuracy) for point in shown])
        assert not any(box.contains(*mark) for mark in marks)


def test_units() -> None:
    assert [quantity(number) for number in (594186, 2_189_574, 148_113_920, 9.243e6, 2.5e15, 999_600_000)] == [
        "594,186", "2.19M", "148M", "9.24M", "2.5P", "1,000M"]
    assert [duration(seconds) for seconds in (59, 600, 9000)] == ["59 s", "10 min", "2.5 h"]
    assert table(["Network", "Top-1"], [["a|b", "1"]]).splitlines()[1:] == ["| :--- | ---: |", "| a\\|b | 1 |"]
    assert table(["Top-1", "Data"], [["1", "x"]], {"data"}).splitlines()[1] == "| ---: | :--- |"


def test_published_figures_are_the_sources() -> None:
    assert all(row["network"] and 80 < float(row["top1"]) < 100 and int(row["epochs"]) > 0 for row in PUBLISHED)
    assert {(row["network"], row["top1"], row["epochs"]) for row in PUBLISHED} >= {
        ("CCT-6/3x1", "94.81", "200"), ("ConvMixer-256/8", "92.6", "25"), ("ConvMixer-256/8", "94", "100"),
        ("Mobile-Former-26M", "89.8", "450")}


def test_tables_of_what_was_tried_can_be_read() -> None:
    for name, rows in RECIPES.items():
        assert re.fullmatch(r"[a-z_]+", name) and np.unique([len(row) for row in rows]).size <= 1


@pytest.mark.skipif(not released_names(), reason="no checkpoint is released")
def test_the_committed_page_is_what_the_command_writes() -> None:
    written = page(read_released(FOLDER), PUBLISHED, RECIPES)
    assert (ROOT / "RESULTS.md").read_text(encoding="utf-8") == written, "python tools/results.py --write RESULTS.md"
    assert (ROOT / PLOT).exists()


def test_machines_tell_the_cores_used_of_those_there() -> None:
    told = machines([{"processor": "A", "cores": 2, "threads": "1"}, {"processor": "A", "cores": 2, "threads": "2"},
                     {"processor": "B", "cores": 1}, {"gpu": "G", "cores": 8}, {}])
    assert told == ["A, 1 of 2 cores", "A, 2 cores", "B, 1 core", "G", "processor unknown, ? cores"]
