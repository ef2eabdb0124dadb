"""The page of a run and the table of an evaluation: numbers against plain counting, hostile names, one file."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from sklearn.metrics import precision_recall_fscore_support

from analysis import error_analysis
from analysis.error_analysis import Predictions, calibration, draw_reliability
from datasets import ImageDataset
from engine.evaluate import Evaluation, EvaluationReport, LabelSmoothingCrossEntropy, evaluate
from processes import command
from utils.fileio import read_csv


def predictions_of(logits: np.ndarray, labels: np.ndarray, names: str) -> Predictions:
    images = np.random.default_rng(6).integers(0, 255, (len(labels), 8, 8, 3)).astype(np.uint8)
    dataset = ImageDataset(images, labels, tuple(names), "set", "test")
    return Predictions(np.zeros(len(labels)), logits.astype(np.float32), labels, 1.0, dataset)


@pytest.fixture(scope="module")
def given() -> Predictions:
    """Return 400 random predictions of five outputs for three classes, right more often than not."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, 400)
    logits = rng.standard_normal((400, 5)) * 2
    logits[np.arange(400), labels] += 1.5
    return predictions_of(logits, labels, "abc")


def test_calibration_is_that_of_plain_counting(given: Predictions) -> None:
    gaps = []
    for low in range(10):
        inside = [index for index in range(400)
                  if low / 10 < given.probabilities[index].max() <= (low + 1) / 10]
        if inside:
            right = sum(given.probabilities[index].argmax() == given.labels[index] for index in inside)
            gap = abs(right / len(inside) - sum(given.probabilities[index].max() for index in inside) / len(inside))
            gaps.append((gap, len(inside)))
    found = calibration(given.probabilities, given.labels, bins=10)
    assert sum(images for _, images in gaps) == 400 == sum(row["images"] for row in found["bins"])
    assert found["ece"] == pytest.approx(sum(gap * images / 400 for gap, images in gaps), rel=1e-12)
    assert found["mce"] == pytest.approx(max(gaps)[0], rel=1e-12)
    one_hot = np.eye(5)[given.labels]
    assert found["brier"] == pytest.approx(((given.probabilities - one_hot) ** 2).sum(1).mean(), rel=1e-12)
    assert found["negative_log_likelihood"] == pytest.approx(-np.log(given.probabilities[one_hot == 1]).mean())


def test_calibration_of_extremes(tmp_path: Path) -> None:
    labels = np.arange(40) % 4
    right, wrong = calibration(np.eye(4)[labels], labels), calibration(np.eye(4)[(labels + 1) % 4], labels)
    assert right["ece"] == right["mce"] == right["brier"] == 0
    assert wrong["ece"] == wrong["mce"] == 1 and wrong["brier"] == 2
    assert np.isfinite(wrong["negative_log_likelihood"])
    np.testing.assert_array_equal(error_analysis.softmax(np.array([[1000.0, -1000.0]])), [[1, 0]])
    assert draw_reliability(right, tmp_path / "one.png").stat().st_size > 1000
    perfect = predictions_of(np.ones((3, 1)), np.zeros(3, int), "o")
    assert error_analysis.draw_errors(perfect, tmp_path / "none.png") is None and not (tmp_path / "none.png").exists()


def test_the_table_of_classes_counts(given: Predictions) -> None:
    confusion, rows = given.confusion, error_analysis.class_table(given)
    assert [row["class"] for row in rows] == ["a", "b", "c"]
    found = precision_recall_fscore_support(given.labels, given.predicted, labels=range(3))
    assert [[row[key] for row in rows] for key in ("precision", "recall", "f1", "images")] == [
        pytest.approx(each) for each in found]
    for index, row in enumerate(rows):
        others = {name: confusion[index, column] for column, name in enumerate(given.names) if column != index}
        assert others[row["most_taken_for"]] == max(others.values()) == row["most_taken_for_images"]
    assert given.names[3:] == ["class 3", "class 4"]


def test_errors_come_most_confident_first(given: Predictions, tmp_path: Path) -> None:
    rows = read_csv(error_analysis.write_errors(given, tmp_path / "mistakes.csv"))
    assert {int(row["index"]) for row in rows} == set(np.flatnonzero(given.predicted != given.labels))
    confidence = [float(row["confidence"]) for row in rows]
    assert confidence == sorted(confidence, reverse=True)
    assert all(row["true"] == given.names[given.labels[int(row["index"])]] != row["predicted"] for row in rows)


def test_the_page_of_a_run_is_one_file(runs: list[Path], tmp_path: Path) -> None:
    name = "<script>alert(1)<script>&"
    run = shutil.copytree(runs[0], tmp_path / name)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("NAME: seed42", f"NAME: {name!r}"))
    (run / "explain").mkdir()
    (run / "explain" / "lime.png").write_bytes(draw_reliability(calibration(np.eye(2), np.arange(2)),
                                                                tmp_path / "x.png").read_bytes())
    assert f"wrote {run / 'report.html'}" in command("report", run)
    text = (run / "report.html").read_text(encoding="utf-8")
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(text)
    assert "script" not in dict(tags) and "&lt;script&gt;" in text
    sources = [value for _, attributes in tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(sources) == 7  # two curves, predictions, mistakes, confusion, reliability, an explanation
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert not re.search(r"https?://", text)
    summary = json.loads((run / "report" / "report.json").read_text())
    results = json.loads((run / "results.json").read_text())
    assert summary["top1"] == pytest.approx(results["selected"]["test"]["top1"], abs=1e-9)
    assert summary["top5"] == pytest.approx(results["selected"]["test"]["top5"], abs=1e-9)
    assert f"{100 * summary['top1']:.2f} %" in text
    assert len(read_csv(run / "report" / "mistakes.csv")) == round((1 - summary["top1"]) * 360)


class Echo(paddle.nn.Layer):
    """Gives its input as logits, so that batches of logits are images."""

    def forward(self, images):
        return images


@pytest.mark.parametrize("classes", [7, 3])
def test_rows_are_those_of_an_independent_computation(classes, tmp_path, monkeypatch):
    moments = iter(np.cumsum([100.0] + [0.5 + 0.01 * index for index in range(24)]))
    clock = SimpleNamespace(perf_counter=lambda: float(next(moments)))
    lines: list[str] = []
    rng = np.random.default_rng(5)
    batches = [(rng.standard_normal((count, classes)).astype(np.float32), rng.integers(0, classes, count))
               for count in [8] * 23 + [3]]
    found: list[Evaluation] = []
    result = evaluate(Echo(), batches, LabelSmoothingCrossEntropy(0.1), observe=found.append)
    monkeypatch.setattr("engine.evaluate.time", clock)
    report = EvaluationReport(24, 10, lines.append)
    for each in found:
        report.add(each)
    report.write(tmp_path / "report.csv")
    rows = [{key: float(value) if value else None for key, value in row.items()}
            for row in read_csv(tmp_path / "report.csv")]
    assert [row["batch"] for row in rows] == [0, 10, 20, 23] and len(lines) == 4

    for row, line in zip(rows, lines, strict=True):
        index = int(row["batch"])
        for prefix, chosen in (("", batches[index : index + 1]), ("mean_", batches[: index + 1])):
            logits = np.concatenate([part[0] for part in chosen]).astype(np.float64)
            labels = np.concatenate([part[1] for part in chosen])
            target = np.full(logits.shape, 0.1 / classes)
            target[np.arange(len(labels)), labels] += 0.9
            log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            order = np.argsort(-logits, axis=1)
            assert row[f"{prefix}loss"] == pytest.approx(-(target * log_softmax).sum(1).mean(), rel=1e-6)
            assert row[f"{prefix}acc1"] == pytest.approx(100 * np.mean(order[:, 0] == labels), rel=1e-12)
            five = 100 * np.mean((order[:, :5] == labels[:, None]).any(1))
            assert row[f"{prefix}acc5"] == (None if classes < 5 else pytest.approx(five, rel=1e-12))
        seconds = [0.5 + 0.01 * each for each in range(index + 1)]
        assert row["seconds"] == pytest.approx(seconds[-1]) and row["mean_seconds"] == pytest.approx(np.mean(seconds))
        images = sum(len(labels) for _, labels in batches[: index + 1])
        assert row["images"] == len(batches[index][1])
        assert row["images_per_second"] == pytest.approx(row["images"] / seconds[-1])
        assert row["mean_images_per_second"] == pytest.approx(images / sum(seconds))
        assert line.startswith(f"Test: [{index:2}/24]  Time: {seconds[-1]:.3f}s ({np.mean(seconds):.3f}s)  Rate: ")
        assert f"Acc@1: {row['acc1']:.3f} ({row['mean_acc1']:.3f})" in line and ("Acc@5" in line) == (classes == 7)
    last = rows[-1]
    assert last["mean_loss"] == pytest.approx(result.loss, rel=1e-12)
    assert last["mean_acc1"] == pytest.approx(100 * result.top1, rel=1e-12)
    if classes == 7:
        assert last["mean_acc5"] == pytest.approx(100 * result.top5, rel=1e-12)
        assert report.summary() == (f"* Acc@1 {100 * result.top1:.3f} ({100 - 100 * result.top1:.3f}) "
                                    f"Acc@5 {100 * result.top5:.3f} ({100 - 100 * result.top5:.3f})")


def test_metrics_of_an_evaluation():
    """Of NaN logits none is right; classes without images have no accuracy."""
    logits = np.eye(6, dtype=np.float32)[[0, 1, 2, 2]]
    logits[3] = np.nan
    found = evaluate(Echo(), [(logits, np.array([0, 1, 0, 2]))], LabelSmoothingCrossEntropy(0.0))
    assert found.top1 == 0.5 and found.top5 == 0.75 and np.isnan(found.loss)
    assert found.per_class == [0.5, 1.0, 0.0, None, None, None]
    assert found.confusion.sum() == 4 and found.confusion[0, 2] == 1
