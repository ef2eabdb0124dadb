"""tools/explain.py as a user calls it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest

from analysis.explain.methods import Explanation, explain
from configs.load import load_config
from engine.model import build_model
from engine.weights import save_weights
from errors import UserError
from processes import ROOT, TINY, call, command, overrides

if find_spec("interpretdl") is None:
    pytest.skip("requirements-explain.txt is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the arguments that name a small network, its weights drawn but not trained."""
    weights = tmp_path_factory.mktemp("explain") / "tiny.pdparams"
    save_weights(weights, build_model(load_config(ROOT / "configs" / "quickstart.yaml", TINY)).state_dict())
    return ["-c", "configs/quickstart.yaml", "-w", str(weights), *overrides(*TINY)]


def test_every_method_in_one_sheet(arguments: list[str], tmp_path: Path) -> None:
    file = tmp_path / "a photograph.png"
    cv2.imwrite(str(file), np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    out = tmp_path / "out"
    command("explain", *arguments, "--method", "all", "--index", "3", "--samples", "150", "--superpixels", "12",
            "--curves", "3", "--out", out, file)
    names = {path.name for path in out.iterdir()}
    methods = ("lime", "gradcam", "scorecam", "ig", "smoothgrad", "occlusion")
    assert names == {"all.png", "all.json", "all_curves.png", *(f"{image}_{method}.npz" for method in methods
                                                                for image in ("a_photograph", "test_image_3"))}
    summary = json.loads((out / "all.json").read_text(encoding="utf-8"))
    assert [record["name"] for record in summary["images"]] == ["a photograph.png", "test image 3"]
    assert summary["images"][0]["true"] is None and summary["images"][1]["true"] == "9"
    assert summary["images"][0]["layer"] == "blocks2.0" and set(methods) < set(summary["curves"]["deletion"])
    with np.load(out / "test_image_3_lime.npz") as kept:
        assert kept["weights"].shape == (len(kept["classes"]), kept["segments"].max() + 1)
        np.testing.assert_allclose(kept["maps"][0], kept["weights"][0][kept["segments"]], rtol=1e-6)
    for method in methods:
        with np.load(out / f"test_image_3_{method}.npz") as kept:
            assert kept["maps"].shape == (len(kept["classes"]), 32, 32) and np.isfinite(kept["maps"]).all()
    sheet = cv2.imread(str(out / "all.png"))
    assert sheet.shape[1] > 7 * 150 and sheet.std() > 20


def test_invalid_arguments_are_refused(arguments: list[str]) -> None:
    for words, said in ((["--method", "grad-cam", "--index", "0"], "'grad-cam' is unknown: expected all or one of"),
                        (["--index", "360"], "--index 360: expected 0 to 359"),
                        ([], "no images: name files, or test images by --index 0 1 2 or --count 12")):
        with pytest.raises(UserError, match=said):
            command("explain", *arguments, *words)


def test_ctrl_c_ends_it_with_130_and_leaves_what_was_done(arguments: list[str], tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def explain_one(*positional: object, **options: object) -> Explanation:
        if list(tmp_path.iterdir()):
            raise KeyboardInterrupt
        return explain(*positional, **options)

    monkeypatch.setattr("analysis.explain.gallery.explain", explain_one)
    ended = call("explain", *arguments, "--method", "gradcam", "--index", "0", "1", "--out", str(tmp_path))
    assert ended.returncode == 130 and ended.stderr == "interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["test_image_0_gradcam.npz"]
