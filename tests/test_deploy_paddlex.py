"""PaddleX 3 opens an exported network as model, pipeline and server, with the labels and scores of ``predict.py``."""

import base64
import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pytest

from deploy.engines import installed
from processes import ROOT, free_port, python, tool, wait

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not installed("paddlex"), reason="paddlex is not installed")]
NAME = "iformer_cifar"
IN_PADDLEX = """
import sys, json
import deploy.paddlex
from paddlex import create_model, create_pipeline
what, *images = sys.argv[1:]
yaml = what.endswith(".yaml")
opened = create_pipeline(pipeline=what) if yaml else create_model(model_name={name!r}, model_dir=what)
for result in opened.predict(images):
    assert len(result["class_ids"]) == 5
    print("RESULT", json.dumps([result["label_names"], [float(score) for score in result["scores"]]]))
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return image files of several sizes: photograph-like, small, grey."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    noise = rng.integers(0, 256, (6, 9, 3), np.uint8)
    files = {"photo.jpg": cv2.resize(noise, (300, 200), interpolation=cv2.INTER_CUBIC), "small.png": noise,
             "grey.png": cv2.resize(noise[..., 0], (32, 32), interpolation=cv2.INTER_CUBIC)}
    for name, image in files.items():
        cv2.imwrite(str(folder / name), image)
    return [folder / name for name in files]


@pytest.fixture(scope="module")
def expected(images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[str], list[float]]]:
    """Return the five labels and scores that ``predict.py`` prints for each image."""
    done = tool("predict", "-w", NAME, *images, "--out", tmp_path_factory.mktemp("grid") / "grid.png")
    rows = re.findall(r"^  (\w+) +([\d.]+)%$", done.stdout, re.MULTILINE)
    return [([row[0] for row in rows[i:i + 5]], [float(row[1]) / 100 for row in rows[i:i + 5]])
            for i in range(0, len(rows), 5)]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the YAML of a pipeline with the exported network."""
    folder = tmp_path_factory.mktemp("exported")
    tool("export", "-w", NAME, folder / "model")
    text = (ROOT / "docs" / "DEPLOY.md").read_text(encoding="utf-8")
    yaml = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]
    (folder / "pipeline.yaml").write_text(yaml.replace("model_dir: exported", f"model_dir: {folder / 'model'}"))
    return folder / "pipeline.yaml"


def same(found: list, expected: list) -> None:
    assert [labels for labels, _ in found] == [labels for labels, _ in expected]
    for (_, scores), (_, wanted) in zip(found, expected, strict=True):
        np.testing.assert_allclose(scores, wanted, atol=6e-5)  # predict.py prints hundredths of a percent


@pytest.mark.parametrize("pipelined", [False, True])
def test_labels_and_scores_are_those_of_predict(pipelined: bool, pipeline: Path, images: list[Path],
                                                expected: list) -> None:
    opened = pipeline if pipelined else pipeline.parent / "model"
    printed = python(IN_PADDLEX.format(name=NAME), opened, *images)
    same([json.loads(line[7:]) for line in printed.splitlines() if line.startswith("RESULT")], expected)


def test_a_pipeline_is_served(pipeline: Path, images: list[Path], expected: list) -> None:
    port = free_port()
    with open(pipeline.parent / "server.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "deploy.paddlex", "--serve", "--pipeline", pipeline, "--host",
                                   "127.0.0.1", "--port", str(port)], cwd=ROOT, stdout=log, stderr=log)
    try:
        found = []
        for image in images:
            body = json.dumps({"image": base64.b64encode(image.read_bytes()).decode(), "topk": 5}).encode()
            request = urllib.request.Request(f"http://127.0.0.1:{port}/image-classification", body,
                                             {"Content-Type": "application/json"})
            answer = wait(lambda request=request: urllib.request.urlopen(request, timeout=60).read(), server)
            rows = json.loads(answer)["result"]["categories"]
            found.append(([row["name"] for row in rows], [row["score"] for row in rows]))
        same(found, expected)
    finally:
        server.terminate()
        server.wait(30)
