"""Errors, calibration and the page of a run: numbers against plain counting, hostile names, one self-contained file."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from analysis.error_analysis import Predictions, calibration, class_table, draw_mistakes, draw_reliability
from datasets.dataset import ImageDataset
from engine.evaluate import Evaluation
from processes import tiny_run, tool


def _given(probabilities: np.ndarray, dataset: ImageDataset) -> Predictions:
    logits = np.log(np.maximum(probabilities, 1e-300))
    return Predictions(Evaluation(np.zeros(len(logits)), logits, dataset.labels, 1.0), dataset)


def predictions(count: int = 400, classes: int = 4, outputs: int = 4, sharpness: float = 2.0) -> Predictions:
    """Return random predictions, right more often than not."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, classes, count)
    logits = rng.standard_normal((count, outputs)) * sharpness
    logits[np.arange(count), labels] += 1.5
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    images = rng.integers(0, 255, (count, 8, 8, 3)).astype(np.uint8)
    return _given(probabilities, ImageDataset(images, labels, tuple("abcd")[:classes], "set", "test"))


def test_calibration_is_that_of_plain_counting() -> None:
    given = predictions()
    expected, largest, covered = 0.0, 0.0, 0
    for low in range(10):
        inside = [index for index in range(400)
                  if low / 10 < given.probabilities[index].max() <= (low + 1) / 10]
        if inside:
            right = sum(given.probabilities[index].argmax() == given.labels[index] for index in inside)
            gap = abs(right / len(inside) - sum(given.probabilities[index].max() for index in inside) / len(inside))
            expected += gap * len(inside) / 400
            largest = max(largest, gap)
            covered += len(inside)
    figures = calibration(given, bins=10)
    assert covered == 400
    assert figures["ece"] == pytest.approx(expected, rel=1e-12)
    assert figures["mce"] == pytest.approx(largest, rel=1e-12)
    one_hot = np.eye(4)[given.labels]
    assert figures["brier"] == pytest.approx(((given.probabilities - one_hot) ** 2).sum(1).mean(), rel=1e-12)
    assert figures["negative_log_likelihood"] == pytest.approx(
        np.mean([-np.log(row[label]) for row, label in zip(given.probabilities, given.labels, strict=True)]))
    assert sum(row["images"] for row in figures["bins"]) == 400


def test_a_sure_and_right_network_has_no_calibration_error() -> None:
    labels = np.arange(40) % 4
    dataset = ImageDataset(np.zeros((40, 2, 2, 3), np.uint8), labels, tuple("abcd"), "set", "test")
    figures = calibration(_given(np.eye(4)[labels], dataset))
    assert figures["ece"] == figures["mce"] == figures["brier"] == 0
    wrong = calibration(_given(np.eye(4)[(labels + 1) % 4], dataset))
    assert wrong["ece"] == wrong["mce"] == 1
    assert wrong["brier"] == 2
    assert np.isfinite(wrong["negative_log_likelihood"])


def test_the_table_of_classes_counts() -> None:
    given = predictions(classes=3, outputs=5)
    confusion = given.confusion()
    rows = class_table(given)
    assert [row["class"] for row in rows] == ["a", "b", "c"]
    for index, row in enumerate(rows):
        hits = sum((given.predicted == index) & (given.labels == index))
        assert row["images"] == sum(given.labels == index)
        assert row["recall"] == pytest.approx(hits / row["images"])
        assert row["precision"] == pytest.approx(hits / sum(given.predicted == index))
        assert row["f1"] == pytest.approx(2 / (1 / row["recall"] + 1 / row["precision"]))
        others = {name: confusion[index, column] for column, name in enumerate(given.names) if column != index}
        assert others[row["most_taken_for"]] == max(others.values()) == row["most_taken_for_images"]
    assert given.names[3:] == ["class 3", "class 4"]


def test_mistakes_come_surest_first() -> None:
    given = predictions()
    mistakes = given.mistakes()
    assert set(mistakes) == {index for index in range(400) if given.predicted[index] != given.labels[index]}
    assert (np.diff(given.confidence[mistakes]) <= 0).all()


def test_pictures_of_extremes(tmp_path: Path) -> None:
    labels = np.zeros(3, int)
    dataset = ImageDataset(np.zeros((3, 2, 2, 3), np.uint8), labels, ("only",), "set", "test")
    perfect = _given(np.ones((3, 1)), dataset)
    assert draw_mistakes(perfect, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
    assert draw_reliability(calibration(perfect), tmp_path / "one.png").stat().st_size > 1000


class Page(HTMLParser):
    """Collects what a page refers to and the texts of its cells."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_of_a_run_is_one_file(tmp_path: Path) -> None:
    done = tool("train", *tiny_run(tmp_path, "TRAIN.EPOCHS=2", "NAME=<script>alert(1)<script>&"))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "<script>alert(1)<script>&"
    (run / "explain").mkdir()
    (run / "explain" / "lime.png").write_bytes((run / "loss.png").read_bytes())
    done = tool("report", run)
    assert done.returncode == 0, done.stderr
    assert f"wrote {run / 'report.html'}" in done.stdout
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert "script" not in page.tags
    assert len(page.sources) == 7  # two curves, predictions, mistakes, confusion, reliability, an explanation
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in page.sources)
    assert not re.search(r"https?://", text)
    summary = json.loads((run / "report" / "report.json").read_text())
    results = json.loads((run / "results.json").read_text())
    assert summary["top1"] == pytest.approx(results["selected"]["test"]["top1"], abs=1e-9)
    assert summary["top5"] == pytest.approx(results["selected"]["test"]["top5"], abs=1e-9)
    assert f"{100 * summary['top1']:.2f} %" in text
    with (run / "report" / "mistakes.csv").open() as file:
        assert len(list(csv.DictReader(file))) == round((1 - summary["top1"]) * 360)


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    for folder, said in ((tmp_path, "no config"), (tmp_path / "nothing", "no such weights")):
        done = tool("report", folder)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert said in done.stderr
