"""ONNX: every family in ONNX Runtime and OpenVINO, int8, and what paddle2onnx does not know."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn
from test_export import FAMILIES, SMALL, check_batches, exported_as, small_network

from configs.load import load_config
from deploy.engines import ONNX, installed, load_exported
from deploy.export import export
from engine.data import build_eval_loader
from engine.model import load_model
from errors import UserError
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


@pytest.mark.parametrize(("name", "size"), [pytest.param(name, size, marks=needs_onnx) for names, size in (
    (FAMILIES, 32), (FULL_SIZE, 64)) for name in names])
def test_every_family_is_converted(name: str, size: int, tmp_path: Path) -> None:
    """Small networks take every batch; full-size ones, at 64 pixels, one."""
    counts, arguments = (range(1, 34), FAMILIES[name]) if size == 32 else ((9,), {})
    model = exported_as("onnx", name, tmp_path / "out", size, **arguments)
    for engine in ("onnxruntime", *(["openvino"] if installed("openvino") else [])):
        check_batches(model, tmp_path / "out", engine, counts, size)


@pytest.mark.parametrize("engine", [pytest.param(name, marks=needs_onnx) for name in ("onnxruntime", "openvino")])
def test_programs_that_reach_outside_are_refused(engine: str, tmp_path: Path) -> None:
    import onnx

    config, network = small_network()
    export(config, network, tmp_path, ["class"] * 10, format="onnx", overwrite=True)
    path = tmp_path / ONNX
    content = path.read_bytes()

    def changed(change: Callable[[Any], object]) -> bytes:
        model = onnx.load_model_from_string(content)
        change(model)
        return model.SerializeToString()

    def outside(tensor: Any) -> None:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../../etc/passwd")

    def branch(model: Any) -> None:
        """Put a tensor with other values into a graph in a node's attribute."""
        graph = onnx.helper.make_graph([], "branch", [], [], [onnx.helper.make_tensor("inner", 1, [1], [0.0])])
        outside(graph.initializer[0])
        model.graph.node[0].attribute.append(onnx.helper.make_attribute("then_branch", graph))

    hostile = {
        "weights in other files": [changed(lambda model: outside(model.graph.initializer[0])), changed(branch)],
        "operator evil.Softmax is refused": [changed(lambda model: setattr(model.graph.node[-1], "domain", "evil"))],
        f"{engine} cannot load it": [changed(lambda model: setattr(model.graph.node[-1], "op_type", "Nothing")),
                                     content[:-1000], b"", b"<?xml version='1.0'?><net name='x' version='11'/>"],
    }
    for words, contents in hostile.items():
        for each in contents:
            path.write_bytes(each)
            with pytest.raises(UserError, match=words):
                load_exported(tmp_path, engine)
    path.write_bytes(changed(lambda model: setattr(
        model.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1)))
    with pytest.raises(UserError, match=rf"{engine} with images \[2, 3, 32, 32\]: "):
        load_exported(tmp_path, engine).run(np.ones((2, 3, 32, 32), np.float32))
    path.write_bytes(content)
    if engine == "openvino":
        images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
        whole, half = (load_exported(tmp_path, name).run(images) for name in ("openvino", "openvino_bf16"))
        assert 0 < abs(half - whole).max() < 0.1 * whole.std()


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
    tool("export", "-w", "iformer_cifar", "-o", f"DATA.ROOT={cifar10_root}", out, "--format", "int8")
    config = load_config(out / "config.yaml")
    model, _ = load_model(config, "iformer_cifar")
    assert (out / ONNX).stat().st_size < 0.35 * sum(4 * parameter.size for parameter in model.parameters())
    images = next(iter(build_eval_loader(config, "test")))[0]
    images = paddle.to_tensor(images)
    with paddle.no_grad():
        expected = model(images).numpy().argmax(1)
    assert (load_exported(out).run(images.numpy()).argmax(1) == expected).mean() > 0.97
