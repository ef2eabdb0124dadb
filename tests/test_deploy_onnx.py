"""ONNX: every family in ONNX Runtime and OpenVINO, int8, and what paddle2onnx does not know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn
from test_export import FAMILIES, SMALL, small_network

from configs.load import load_config
from deploy.engines import ONNX, installed, load_exported
from deploy.export import export, log_probabilities
from engine.data import build_eval_loader
from engine.model import load_model
from errors import UserError
from models import create_model
from processes import tool


@pytest.mark.skipif(installed("paddle2onnx"), reason="paddle2onnx is installed")
def test_without_paddle2onnx_the_line_that_installs_it_is_printed(tmp_path: Path) -> None:
    config, model = small_network()
    with pytest.raises(UserError, match=r"paddle2onnx.*not installed: .*requirements-deploy\.txt"):
        export(config, model, tmp_path / "out", ["class"] * 10, format="onnx")
    assert not (tmp_path / "out").exists()


needs_onnx = [pytest.mark.slow, pytest.mark.skipif(not (installed("paddle2onnx") and installed("onnxruntime")),
                                                   reason="paddle2onnx or onnxruntime is not installed")]
FULL_SIZE = ["iformer_small", "coatnet_0", "coatnet_0_simple", "dfformer_s18", "cdfformer_s18", "gfformer_s18",
             "mobileformer_26m", "mobileformer_26m_pvit", "convmixer_768_32", "poolformer_s12"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_onnx) for name in [*FAMILIES, *FULL_SIZE]])
def test_every_family_is_converted(name: str, tmp_path: Path) -> None:
    """Full-size networks at 64 pixels; ``export`` itself compares batches of 1 and 3."""
    size = 64 if name in FULL_SIZE else 32
    config = load_config(SMALL, [f"MODEL.NAME={name}", f"DATA.IMAGE_SIZE={size}"])
    paddle.seed(0)
    model = create_model(name, num_classes=10, image_size=size)
    model.eval()
    export(config, model, tmp_path / "out", ["class"] * 10, format="onnx")
    images = np.random.default_rng(1).standard_normal((9, 3, size, size)).astype(np.float32)
    expected = log_probabilities(model(paddle.to_tensor(images)).numpy())
    for engine in ("onnxruntime", *(["openvino"] if installed("openvino") else [])):
        found = log_probabilities(load_exported(tmp_path / "out", engine).run(images))
        np.testing.assert_allclose(found, expected, atol=1e-4 * expected.std())


@pytest.mark.slow
@pytest.mark.skipif(not installed("paddle2onnx"), reason="paddle2onnx is not installed")
def test_an_operator_without_onnx_is_named(tmp_path: Path) -> None:
    class Spectrum(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(32, 10)

        def forward(self, x: paddle.Tensor) -> paddle.Tensor:
            return self.head(paddle.fft.irfft2(paddle.fft.rfft2(x)).flatten(1)[:, :32])

    model = Spectrum()
    model.eval()
    with pytest.raises(UserError, match=r"paddle2onnx cannot convert fft_c2r$"):
        export(load_config(SMALL), model, tmp_path / "out", ["class"] * 10, format="onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not installed("paddle2onnx"), reason="paddle2onnx is not installed")
def test_int8_is_small_and_agrees(tmp_path: Path, cifar10_root: str) -> None:
    out = tmp_path / "out"
    done = tool("export", "-w", "iformer_cifar", "-o", f"DATA.ROOT={cifar10_root}", out, "--format", "int8")
    assert done.returncode == 0, done.stderr
    config = load_config(out / "config.yaml")
    model, _ = load_model(config, "iformer_cifar")
    assert (out / ONNX).stat().st_size < 0.35 * sum(4 * parameter.size for parameter in model.parameters())
    images = next(iter(build_eval_loader(config, "test")))[0]
    images = paddle.to_tensor(images)
    with paddle.no_grad():
        expected = model(images).numpy().argmax(1)
    assert (load_exported(out).run(images.numpy()).argmax(1) == expected).mean() > 0.97
