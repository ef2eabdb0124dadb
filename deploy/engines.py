"""Run exported networks: Paddle inference, ONNX Runtime or OpenVINO on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import yaml
from paddle import nn

from errors import UserError, nearest, printable

PROGRAM, PARAMETERS, ONNX = "inference.json", "inference.pdiparams", "inference.onnx"
PROGRAMS = (PROGRAM, "inference.pdmodel")  # as Paddle 3 and Paddle 2 write it; both are read
DESCRIPTION, CONFIG = "inference.yml", "config.yaml"
REQUIREMENTS = "requirements-deploy.txt"
Run = Callable[[np.ndarray], np.ndarray]


class ExportedModel(nn.Layer):
    """An exported network that replaces the network: float32 ``[B, 3, H, W]`` to logits ``[B, num_classes]``.

    Where the program ends with a softmax, logits are the logarithms of its probabilities. It has no parameters and no
    gradients.
    """

    def __init__(self, run: Run, description: dict[str, Any], engine: str) -> None:
        super().__init__()
        self._run, self.description, self.engine = run, description, engine
        self.classes: list[str] = [str(name) for name in description["PostProcess"]["Topk"]["label_list"]]
        self.eval()

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return logits of numpy images."""
        outputs = self._run(np.ascontiguousarray(images, np.float32))
        if self.description["Global"].get("output") == "logits":
            return outputs
        return np.log(np.maximum(outputs, np.finfo(np.float32).tiny))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return paddle.to_tensor(self.run(x.numpy()))


def load_exported(folder: str | Path, engine: str | None = None, threads: int = 0) -> ExportedModel:
    """Load the exported network of a folder.

    Args:
        folder: as ``deploy.export`` writes it, or a classification model of PaddleClas with its label list.
        engine: a key of ``ENGINES``; by default the first that fits the folder's files and is installed.
        threads: of the engine; 0 leaves them to it.

    Raises:
        UserError: for a folder that is none, an unknown engine, an engine that is not installed, a damaged program.
    """
    folder = Path(folder)
    description = read_description(folder)
    fitting = [name for name, (files, _, _) in ENGINES.items() if any((folder / file).is_file() for file in files)]
    if not fitting:
        raise UserError(f"{folder}: no program, expected {PROGRAM} or {ONNX}")
    if engine is None:
        engine = next((name for name in fitting if installed(ENGINES[name][1])), fitting[0])
    elif engine not in fitting:
        raise UserError(f"{folder}: no program for engine {engine!r}{nearest(engine, ENGINES)}; expected "
                        f"{', '.join(fitting)}")
    _, package, start = ENGINES[engine]
    require(package)
    try:
        run = start(folder, threads)
    except Exception as error:  # whatever an engine raises on a file that it cannot read
        reason = printable(str(error).strip().partition("\n")[0])
        raise UserError(f"{folder}: {engine} cannot load it: {reason}") from error
    return ExportedModel(run, description, engine)


def read_description(folder: Path) -> dict[str, Any]:
    """Return the content of ``inference.yml``; raises UserError where it is missing, damaged or of another task."""
    path = folder / DESCRIPTION
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(found["Global"]["model_name"], str) or not found["PostProcess"]["Topk"]["label_list"]:
            raise ValueError("no Global.model_name or PostProcess.Topk.label_list")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not the description of an exported classifier: {printable(reason)}") from None
    return found


def installed(package: str) -> bool:
    """Return whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def require(*packages: str) -> None:
    """Raise UserError with the line that installs what is missing."""
    missing = [package for package in packages if not installed(package)]
    if missing:
        raise UserError(f"{', '.join(missing)} is not installed: python -m pip install -r {REQUIREMENTS}")


def _start_paddle(folder: Path, threads: int, onednn: bool = False) -> Run:
    from paddle import inference

    program = next(folder / name for name in PROGRAMS if (folder / name).is_file())
    config = inference.Config(str(program), str(folder / PARAMETERS))
    config.disable_gpu()
    config.disable_glog_info()
    if onednn:
        config.enable_mkldnn()
    else:
        config.disable_mkldnn()
    if threads:
        config.set_cpu_math_library_num_threads(threads)
    predictor = inference.create_predictor(config)
    image = predictor.get_input_handle(predictor.get_input_names()[0])
    output = predictor.get_output_handle(predictor.get_output_names()[0])

    def run(images: np.ndarray) -> np.ndarray:
        image.copy_from_cpu(images)
        predictor.run()
        return output.copy_to_cpu()

    return run


def _start_onednn(folder: Path, threads: int) -> Run:
    return _start_paddle(folder, threads, onednn=True)


def _start_onnxruntime(folder: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / ONNX, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _start_openvino(folder: Path, threads: int) -> Run:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    compiled = openvino.Core().compile_model(folder / ONNX, "CPU", {"INFERENCE_PRECISION_HINT": "f32", **settings})
    return lambda images: compiled(images)[0]


# The programs of each engine, its package, and what loads it.
ENGINES: dict[str, tuple[tuple[str, ...], str, Callable[[Path, int], Run]]] = {
    "paddle": (PROGRAMS, "paddle", _start_paddle),
    "onednn": (PROGRAMS, "paddle", _start_onednn),
    "onnxruntime": ((ONNX,), "onnxruntime", _start_onnxruntime),
    "openvino": ((ONNX,), "openvino", _start_openvino),
}
