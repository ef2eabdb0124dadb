"""The table of an evaluation's batches against numbers computed another way."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from engine.evaluate import Evaluation, EvaluationReport, LabelSmoothingCrossEntropy, evaluate
from utils.fileio import read_csv


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
