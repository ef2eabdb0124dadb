"""Run exported networks: Paddle inference, ONNX Runtime or OpenVINO on the CPU."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

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

# Names in a program's JSON: weights, regions and blocks, and types and operators of Paddle's own dialects (builtin,
# pd_op, control flow). An operator of another dialect is code that somebody registered.
_NAME = re.compile(r"p|(?:region|block)_\d+|[012]\.\w+", re.ASCII)
# Operators that read or write files, call Python, start another engine, or talk to other processes.
_UNSAFE = re.compile(
    r"load|save|file|py_func|pylayer|run_program|engine|print|send|recv|barrier|comm_|\bc_|distributed")


class ExportedModel(nn.Layer):
    """An exported network that replaces the network: float32 ``[B, 3, H, W]`` to logits ``[B, num_classes]``.

    Where the program ends with a softmax, logits are the logarithms of its probabilities. It has no parameters and no
    gradients.
    """

    def __init__(self, run: Run, description: dict[str, Any], engine: str, path: Path) -> None:
        super().__init__()
        self._run, self.description, self.engine, self.path = run, description, engine, path
        self.classes = [printable(name, 1000) for name in description["PostProcess"]["Topk"]["label_list"]]
        self.eval()

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return logits of numpy images; raises UserError where the program cannot take them."""
        where = f"{self.path}: {self.engine} with images {list(images.shape)}"
        try:
            outputs = np.asarray(self._run(np.ascontiguousarray(images, np.float32)), np.float32)
        except Exception as error:  # whatever an engine raises
            raise UserError(f"{where}: {_reason(error)}") from error
        if outputs.shape != (len(images), len(self.classes)):
            raise UserError(f"{where} gives {list(outputs.shape)}, expected {[len(images), len(self.classes)]}: an "
                            f"output for each label of {DESCRIPTION}")
        if self.description["Global"].get("output") == "logits":
            return outputs
        return np.log(np.maximum(outputs, np.finfo(np.float32).tiny))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return paddle.to_tensor(self.run(x.numpy()))


def load_exported(folder: str | Path, engine: str | None = None, threads: int = 0) -> ExportedModel:
    """Load the exported network of a folder. Nothing in it is executed but operators on tensors.

    Args:
        folder: as ``deploy.export`` writes it, or a classification model of PaddleClas with its label list.
        engine: a key of ``ENGINES``; by default the first that fits the folder's files and is installed.
        threads: of the engine; 0: OMP_NUM_THREADS, or one per core.

    Raises UserError for a folder that is none, an unknown engine, an engine that is not installed, a damaged program,
    and one with operators or weights from outside the folder's files.
    """
    folder = Path(folder)
    description = read_description(folder)
    fitting = [name for name, each in ENGINES.items() if each.program_in(folder)]
    if not fitting:
        raise UserError(f"{folder}: no program, expected {PROGRAM} or {ONNX}")
    if engine is None:
        engine = next((name for name in fitting if installed(*ENGINES[name].packages)), fitting[0])
    elif engine not in fitting:
        unknown = "" if engine in ENGINES else nearest(engine, ENGINES)
        raise UserError(f"{folder}: no program for engine {engine!r}{unknown}; expected {', '.join(fitting)}")
    require(*ENGINES[engine].packages)
    program = ENGINES[engine].program_in(folder)
    threads = threads or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    try:
        run = ENGINES[engine].start(folder, threads)
    except Exception as error:  # whatever an engine raises on a file that it cannot read
        raise UserError(f"{program}: {engine} cannot load it: {_reason(error)}") from error
    return ExportedModel(run, description, engine, program)


def read_description(folder: Path) -> dict[str, Any]:
    """Return the content of ``inference.yml``; raises UserError where it is missing, damaged or of another task."""
    path = folder / DESCRIPTION
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        labels = found["PostProcess"]["Topk"]["label_list"]
        if not (isinstance(found["Global"]["model_name"], str) and isinstance(labels, list) and labels):
            raise ValueError("no Global.model_name or PostProcess.Topk.label_list")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not the description of an exported classifier: {printable(reason)}") from None
    return found


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


def require(*packages: str) -> None:
    """Raise UserError with the line that installs what is missing."""
    missing = [package for package in packages if not installed(package)]
    if missing:
        raise UserError(f"{', '.join(missing)} is not installed: python -m pip install -r {REQUIREMENTS}")


def _reason(error: Exception) -> str:
    """Return what an engine says in one line, without Paddle's and OpenVINO's places in C++."""
    said = str(error)
    lines = (said.partition("Error Message Summary:")[2] or said).splitlines()
    places = ("Exception from", "Check '", "In user code:")
    lines = [line for line in lines if line.strip("- ") and not line.startswith(places)]
    return printable(lines[0].strip(), 300) if lines else type(error).__name__


def _check_program(path: Path) -> None:
    """Raise ValueError for a Paddle program with other operators than computations on tensors."""
    def check(name: Any, safe: bool) -> None:
        if not safe or _UNSAFE.search(name):
            raise ValueError(f"operator {name!r} is refused, expected computations on tensors")

    def check_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, name in pairs:  # of repeated keys too
            if key == "#":
                check(name, isinstance(name, str) and _NAME.fullmatch(name) is not None)
        return dict(pairs)

    if path.suffix == ".pdmodel":
        from paddle.base.proto.framework_pb2 import ProgramDesc

        for block in ProgramDesc.FromString(path.read_bytes()).blocks:
            for operator in block.ops:
                check(operator.type, True)
    else:
        json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=check_pairs)


def _check_parameters(path: Path) -> None:
    """Raise ValueError for weights whose headers do not fit the file: Paddle allocates what they say.

    A tensor is its version, levels of detail, version, and size of the description (20 bytes), the description, values.
    """
    from paddle.base import core
    from paddle.base.proto.framework_pb2 import VarType

    left = path.stat().st_size
    with path.open("rb") as file:
        while left:
            *zeros, size = struct.unpack("<IQIi", file.read(20))
            if any(zeros) or not 0 < size < 1000:
                raise ValueError(f"{path.name} is damaged")
            description = VarType.TensorDesc.FromString(file.read(size))
            values = math.prod(description.dims) * core.size_of_dtype(core.VarDesc.VarType(description.data_type))
            left -= 20 + size + values
            if left < 0 or min(description.dims, default=0) < 0:
                raise ValueError(f"{path.name} is damaged")
            file.seek(values, os.SEEK_CUR)


def _read_onnx(path: Path) -> bytes:
    """Return the bytes of an ONNX program; raises ValueError for custom operators and weights in other files."""
    import onnx

    content = path.read_bytes()
    for message in _messages(onnx.load_model_from_string(content)):
        if isinstance(message, onnx.NodeProto) and message.domain not in ("", "ai.onnx"):
            raise ValueError(f"operator {message.domain}.{message.op_type} is refused, expected ONNX' own")
        if isinstance(message, onnx.TensorProto) and (message.external_data or message.data_location):
            raise ValueError(f"weights in other files are refused, expected those of {message.name!r} in {ONNX}")
    return content


def _messages(message: Any) -> Iterator[Any]:
    """Yield a protobuf message and all messages in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type:
            for each in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(each)


def _start_paddle(folder: Path, threads: int, onednn: bool = False) -> Run:
    from paddle import inference
    from paddle.base.core import set_num_threads

    program = ENGINES["paddle"].program_in(folder)
    _check_program(program)
    _check_parameters(folder / PARAMETERS)
    config = inference.Config(str(program), str(folder / PARAMETERS))
    config.disable_gpu()
    config.disable_glog_info()
    if onednn:
        config.enable_mkldnn()
    else:
        config.disable_mkldnn()
    config.set_cpu_math_library_num_threads(threads)
    predictor = inference.create_predictor(config)
    image = predictor.get_input_handle(predictor.get_input_names()[0])
    output = predictor.get_output_handle(predictor.get_output_names()[0])

    def run(images: np.ndarray) -> np.ndarray:
        image.copy_from_cpu(images)
        predictor.run()
        set_num_threads(threads)  # `run` leaves one thread to the rest of the process
        return output.copy_to_cpu()

    return run


def _start_onnxruntime(folder: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(_read_onnx(folder / ONNX), options, providers=["CPUExecutionProvider"],
                                           enable_fallback=0)  # prints
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _start_openvino(folder: Path, threads: int, precision: str = "f32") -> Run:
    import openvino

    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError("this CPU has no bfloat16")
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    network = core.read_model(_read_onnx(folder / ONNX))
    free = network.is_dynamic()

    @lru_cache(maxsize=4)  # for a free batch it would take several times as long for one image
    def compiled(shape: tuple[int, ...]) -> Any:
        if free:
            network.reshape(list(shape))
        return core.compile_model(network, "CPU", settings)

    compiled((1, *network.inputs[0].partial_shape.get_min_shape()[1:]))  # refuses what it cannot run
    return lambda images: compiled(images.shape)(images)[0]


class Engine(NamedTuple):
    """The programs that an engine runs, the packages that it needs, and what loads it."""

    programs: tuple[str, ...]
    packages: tuple[str, ...]
    start: Callable[[Path, int], Run]

    def program_in(self, folder: Path) -> Path | None:
        """Return the engine's program in a folder; None where it has none."""
        return next((folder / name for name in self.programs if (folder / name).is_file()), None)


ENGINES = {
    "paddle": Engine(PROGRAMS, (), _start_paddle),
    "onednn": Engine(PROGRAMS, (), partial(_start_paddle, onednn=True)),
    "onnxruntime": Engine((ONNX,), ("onnxruntime", "onnx"), _start_onnxruntime),
    "openvino": Engine((ONNX,), ("openvino", "onnx"), _start_openvino),
    "openvino_bf16": Engine((ONNX,), ("openvino", "onnx"), partial(_start_openvino, precision="bf16")),
}
