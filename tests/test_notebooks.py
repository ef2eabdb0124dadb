"""The notebooks: run from start to end in a kernel of their own, and what is committed is what they are."""

import ast
import base64
import json
import os
import re
import shutil
import signal
import threading
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from configs.load import load_config
from kernels.build import cache_folder
from processes import ROOT, wait

nbformat = pytest.importorskip("nbformat", reason="requirements-dev.txt is not installed")
pytest.importorskip("interpretdl", reason="requirements-explain.txt is not installed")

from nbclient import NotebookClient  # noqa: E402

NOTEBOOKS = ("quickstart", "iformer", "coatnet_convmixer", "mobileformer", "dfformer")
SUITE = ("analysis", "configs", "datasets", "deploy", "engine", "kernels", "models", "notebooks", "references", "utils",
         "errors.py", "constraints.txt", "requirements.txt", "requirements-explain.txt")
RUN_FILES = {"config.yaml", "environment.json", "train.log", "history.csv", "steps.csv", "best_model.pdparams",
             "final_model.pdparams", "results.json", "loss.png", "accuracy.png", "predictions.png", "explain/lime.png",
             "explain/lime.json"}
LARGEST = 1_500_000  # bytes of a committed notebook
# A network that answers nothing, as on a machine without one.
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


@cache
def _committed(name: str) -> Any:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _text(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")


def _pictures(notebook: Any) -> list[np.ndarray]:
    data = [output.data["image/png"] for cell in _code(notebook) for output in cell.outputs
            if "image/png" in output.get("data", {})]
    return [cv2.imdecode(np.frombuffer(base64.b64decode(text), np.uint8), cv2.IMREAD_COLOR) for text in data]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the suite, with the committed notebooks and nothing that a run has left."""
    for name in SUITE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "output"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def _client(notebook: Any, folder: Path) -> NotebookClient:
    return NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_from_start_to_end(name: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CIFAR-10 where CIFAR10_ROOT names it; else without data and network, as in a fresh clone."""
    for variable, value in NO_NETWORK.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("PADDLE_HYBRID_CACHE", str(cache_folder().parent))
    monkeypatch.setenv("HOME", str(copy))  # no data in it
    committed = _committed(name)
    notebook = nbformat.read(copy / "notebooks" / f"{name}.ipynb", as_version=4)
    _client(notebook, copy / "notebooks").execute()

    assert [cell.source for cell in notebook.cells] == [cell.source for cell in committed.cells]
    runs = [folder for folder in (copy / "output").iterdir() if folder.is_dir()]
    assert len(runs) == (2 if name in ("coatnet_convmixer", "mobileformer") else 1)
    for run in runs:
        written = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
        assert written >= RUN_FILES, RUN_FILES - written
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        assert 0 < results["final"]["test"]["loss"] < 3
    assert len(_pictures(notebook)) == len(_pictures(committed))
    said = "".join(_text(cell) for cell in _code(notebook))
    stands_in = "take its place, so that every figure below is about them and says nothing of cifar10" in said
    assert stands_in == (name != "quickstart" and "CIFAR10_ROOT" not in os.environ)
    assert ("says nothing of mnist" in said) == (name == "mobileformer" and "MNIST_ROOT" not in os.environ)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_committed_shows_when_opened(name: str) -> None:
    """Run in order from a fresh kernel, with pictures, without errors, warnings or names of anybody's folders."""
    file, notebook = ROOT / "notebooks" / f"{name}.ipynb", _committed(name)
    assert file.stat().st_size < LARGEST
    cells = _code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert cells[0].source.startswith("FULL = False")
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    pictures = _pictures(notebook)
    assert len(pictures) >= 8 and all(picture.std() > 5 and min(picture.shape[:2]) > 100 for picture in pictures)
    written = json.dumps([cell.outputs for cell in cells if cell.outputs], ensure_ascii=False)
    written = re.sub(r'"image/png": "[^"]*"', "", written)
    assert not re.search(r"(?<![\w./])/(?:home|root|tmp|work|usr|opt|mnt|Users)/", written)
    assert "\\r" not in written and "Warning" not in written
    assert ("cifar10 at 32×32" in written) == (name != "quickstart")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_sections_and_languages(name: str) -> None:
    """Numbered from 0 without a gap, each in Chinese and English, its code in few lines."""
    notebook = _committed(name)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    headings = re.findall(r"^## (\d+) (.+)$", "\n".join(texts), re.MULTILINE)
    assert [int(number) for number, _ in headings] == list(range(len(headings))) and len(headings) >= 11
    for text in texts:
        assert re.search("[一-鿿]", text) and len(re.findall(r"[A-Za-z]{3,}", text)) > 5, text[:80]
        assert text.count("```") % 2 == 0 and text.count("$$") % 2 == 0
    for cell in _code(notebook):
        assert len(cell.source.splitlines()) <= 20
        own = (ast.FunctionDef, ast.ClassDef)  # all functions are the suite's
        assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, own)]


def test_configs_of_full_are_the_sources_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One switch: with FULL the config is the file's, to the last key."""
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    import start

    path = str(ROOT / "configs" / "quickstart.yaml")
    assert start.configure(path, ["TRAIN.EPOCHS=1"], True) == load_config(path)
    assert start.configure(path, ["TRAIN.EPOCHS=1"], False).TRAIN.EPOCHS == 1
    for name in NOTEBOOKS:
        named = re.findall(r'"(configs/\w+\.yaml)"', "\n".join(cell.source for cell in _code(_committed(name))))
        assert named and all((ROOT / path).is_file() for path in named)


def test_the_stop_button_saves(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT to the kernel, as Jupyter sends it: the run is saved, the kernel lives, and the run can be resumed."""
    cells = _code(_committed("quickstart"))
    roots = [cell.source for cell in cells if "sys.path" in cell.source or "start.prepare" in cell.source]
    tiny = ('config = start.configure("configs/quickstart.yaml", ["NAME=stopped", "TRAIN.EPOCHS=%s", '
            '"MODEL.ARGS={depths: [1, 1, 1, 1], embed_dims: [8, 16, 16, 32], num_heads: [2, 2, 2, 2], '
            'attention_heads: [1, 1, 1, 1]}"], False)')
    sources = ["FULL = False", *roots, "from engine.train import train", tiny % 2000, "train(config)", tiny % 1,
               'import engine.train\nprint("alive", (Path("output") / "stopped" / "checkpoints").is_dir())',
               "results = train(config, resume=True)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = _client(notebook, copy / "notebooks")
    client.allow_errors = True
    training, history = sources.index("train(config)"), copy / "output" / "stopped" / "history.csv"

    def interrupt(cell: Any, cell_index: int) -> None:
        if cell_index == training:
            threading.Thread(target=_interrupt_after, args=(history, client.km.provisioner.pid), daemon=True).start()

    client.on_cell_execute = interrupt
    client.execute()
    errors = [output.ename for cell in notebook.cells for output in cell.outputs if output.output_type == "error"]
    assert errors == ["Interrupted"]
    assert "SIGINT: saved output/stopped" in _text(notebook.cells[training])
    assert _text(notebook.cells[-2]) == "alive True\n"
    assert (copy / "output" / "stopped" / "results.json").is_file()


def _interrupt_after(file: Path, pid: int) -> None:
    """Send SIGINT when ``file`` has a first row."""
    wait(lambda: file.read_text(encoding="utf-8").count("\n") > 1)
    os.kill(pid, signal.SIGINT)
