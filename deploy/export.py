"""Export a trained network as a folder that Paddle inference, PaddleX 3 and ONNX Runtime open."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import paddle
import yaml
from paddle import nn
from yacs.config import CfgNode

from configs.load import dump_config
from datasets import build_dataset
from datasets.transforms import build_eval_transforms
from deploy.engines import CONFIG, DESCRIPTION, ONNX, PARAMETERS, PROGRAM, PROGRAMS, load_exported, require
from deploy.operators import exportable
from errors import UserError
from utils import pair
from utils.fileio import replaced_folder, write_text

FORMATS = ("paddle", "onnx", "int8")
OPSET = 17  # the first with LayerNormalization
MAX_DEVIATION = 1e-4  # of the logits, in their standard deviations
CHECKED_BATCHES = (1, 3)
CALIBRATION = 512  # training images
TOP = 5
FILES = {*PROGRAMS, PARAMETERS, f"{PARAMETERS}.info", ONNX, DESCRIPTION, CONFIG}  # .info: by Paddle 2


def export(config: CfgNode, model: nn.Layer, folder: Path, classes: Sequence[str], *, format: str = "paddle",
           logits: bool = False, overwrite: bool = False) -> dict[str, float]:
    """Write a network in evaluation mode as a program with its weights, and check it against the network.

    The program takes float32 ``[B, 3, H, W]`` for any B and the config's ``DATA.IMAGE_SIZE`` and gives probabilities
    ``[B, num_classes]``. Beside it are ``inference.yml`` (preprocessing and labels, as in PaddleClas) and
    ``config.yaml``.

    Args:
        model: on the CPU.
        folder: to write: ``inference.json`` and ``inference.pdiparams``, or ``inference.onnx``.
        classes: names of the outputs, in their order.
        format: "paddle", "onnx", or "int8", an ONNX program whose products and convolutions are of 8 bits.
        logits: leave out the softmax at the end.

    Returns the largest deviation of the logits from the network's, in standard deviations of these, by engine; none is
    above ``MAX_DEVIATION`` but that of int8. Raises UserError where ``folder`` holds something else or cannot be
    written, for weights whose logits are not finite, preprocessing that ``inference.yml`` cannot express, operators
    that ONNX lacks, missing packages and, for int8, missing training images.
    """
    _check_folder(folder, overwrite)
    if format != "paddle":
        require("onnxruntime", "paddle2onnx")
    calibration = calibration_batches(config) if format == "int8" else ()
    description = describe(config, classes, logits)
    height, width = pair(config.DATA.IMAGE_SIZE)
    images = np.random.default_rng(0).standard_normal((max(CHECKED_BATCHES), 3, height, width)).astype(np.float32)
    with paddle.no_grad():
        expected = model(paddle.to_tensor(images)).numpy()
    if not np.isfinite(expected).all():
        raise UserError(f"the logits of {config.MODEL.NAME} with these weights are not finite")
    spec = paddle.static.InputSpec([None, 3, height, width], "float32", "image")
    with replaced_folder(folder.resolve()) as made:  # "." and ".." have no name
        with exportable():
            paddle.jit.save(model if logits else nn.Sequential(model, nn.Softmax()), str(made / Path(PROGRAM).stem),
                            input_spec=[spec])
        write_text(made / DESCRIPTION, yaml.safe_dump(description, sort_keys=False, allow_unicode=True))
        write_text(made / CONFIG, dump_config(config))
        if format != "paddle":
            convert(made)
            deviation = _deviation(made, "onnxruntime", images, expected)
            if format == "int8":
                quantize(made, calibration)
                deviation = _deviation(made, "onnxruntime", images, expected, limit=math.inf)
            return {"ONNX Runtime": deviation}
        return {"Paddle inference": _deviation(made, "paddle", images, expected),
                "Paddle inference with oneDNN": _deviation(made, "onednn", images, expected)}


def describe(config: CfgNode, classes: Sequence[str], logits: bool = False) -> dict[str, object]:
    """Return the content of ``inference.yml``: preprocessing and labels, in PaddleClas' and PaddleX' terms.

    Raises UserError for an evaluation crop of an image size that is not square.
    """
    augment, (height, width) = config.AUGMENT, pair(config.DATA.IMAGE_SIZE)
    resize: dict[str, object] = {"size": [width, height]}
    if augment.INTERPOLATION != "bilinear":  # the default; PaddleClas and PaddleX call it differently
        resize["interpolation"] = augment.INTERPOLATION.upper()
    operators: list[dict[str, object]] = [{"ResizeImage": resize}]
    if augment.EVAL_CROP_PCT:
        if height != width:
            raise UserError(f"DATA.IMAGE_SIZE is {height}×{width}; AUGMENT.EVAL_CROP_PCT is exported for squares only, "
                            "expected 0")
        operators = [{"ResizeImage": {"resize_short": math.floor(height / augment.EVAL_CROP_PCT), "backend": "pil",
                                      "interpolation": augment.INTERPOLATION.upper()}},
                     {"CropImage": {"size": height}}]
    operators += [{"NormalizeImage": {"channel_num": 3, "mean": list(augment.MEAN), "order": "", "scale": 1 / 255,
                                      "std": list(augment.STD)}},
                  {"ToCHWImage": None}]
    return {"Global": {"model_name": config.MODEL.NAME, "output": "logits" if logits else "softmax"},
            "PreProcess": {"transform_ops": operators},
            "PostProcess": {"Topk": {"topk": min(TOP, config.MODEL.NUM_CLASSES), "label_list": list(classes)}}}


def convert(folder: Path) -> None:
    """Replace the Paddle program of a folder by ``inference.onnx``; raises UserError naming what ONNX lacks.

    In a process of its own: paddle2onnx aborts on an operator that it does not know.
    """
    import onnxruntime

    call = (f"import paddle2onnx; paddle2onnx.export({PROGRAM!r}, {PARAMETERS!r}, {ONNX!r}, opset_version={OPSET}, "
            "optimize_tool='None')")  # the default installs packages
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", call], cwd=folder, capture_output=True, text=True)
    path = folder / ONNX
    if done.returncode or not path.is_file():
        said = done.stdout + done.stderr
        operators = {*re.findall(r"\[OP: pd_op\.(\w+)\]", said), *_unknown_operators(folder / PROGRAM)}
        raise UserError(f"paddle2onnx cannot convert {', '.join(sorted(operators)) or said.strip()[-300:]}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # fold constants and norms
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    for name in (PROGRAM, PARAMETERS):
        (folder / name).unlink()


def _unknown_operators(program: Path) -> set[str]:
    """Return the operators of a program that paddle2onnx's library does not mention: it does not tell them itself."""
    from paddle2onnx import paddle2onnx_cpp2py_export

    known = Path(paddle2onnx_cpp2py_export.__file__).read_bytes()
    operators = re.findall(r'"#":"1\.(?!a_)(\w+)"', program.read_text(encoding="utf-8"))
    return {name for name in operators if name.encode() not in known}


def quantize(folder: Path, calibration: Iterable[np.ndarray]) -> None:
    """Quantise the weights and inputs of ``inference.onnx``'s convolutions and linear layers to 8 bits.

    Statically, by ONNX Runtime, from the ranges of activations on the calibration images. Attention and DFTs stay
    float32.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        batches = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"image": batch}

    path = folder / ONNX
    quantize_static(path, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                    op_types_to_quantize=["Conv", "Gemm", "MatMul"], activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8, extra_options={"MatMulConstBOnly": True})


def _deviation(folder: Path, engine: str, images: np.ndarray, expected: np.ndarray,
               limit: float = MAX_DEVIATION) -> float:
    """Return the largest deviation over several batch sizes; raises RuntimeError above ``limit``."""
    run = load_exported(folder, engine).run
    scale = float(expected.std()) or 1.0  # a head of zeros gives equal logits
    expected = log_probabilities(expected)
    off = max(float(np.abs(log_probabilities(run(images[:count])) - expected[:count]).max())
              for count in CHECKED_BATCHES)
    deviation = off / scale
    if not deviation <= limit:
        raise RuntimeError(f"{engine}: the exported logits deviate by {deviation:.1e} of their standard deviation")
    return deviation


def calibration_batches(config: CfgNode) -> list[np.ndarray]:
    """Return ``CALIBRATION`` training images, drawn with the seed 0 and transformed for evaluation, in batches."""
    dataset = build_dataset(config.DATA, "train")
    transform = build_eval_transforms(config.AUGMENT, config.DATA.IMAGE_SIZE)
    indices = np.random.default_rng(0).permutation(len(dataset))[:CALIBRATION]
    images = transform.batch(dataset.images, indices, (0,))
    return [images[start : start + 32] for start in range(0, len(images), 32)]


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the log-softmax of logits, or of log-probabilities, cut at -80: below, float32 softmax underflows."""
    logits = logits - logits.max(1, keepdims=True)
    return np.maximum(logits - np.log(np.exp(logits).sum(1, keepdims=True)), -80)


def _check_folder(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else {"a file"}
    others = sorted(found - FILES)
    if others or (found and DESCRIPTION not in found):
        raise UserError(f"{folder} is not an exported model: it holds {[*others, *sorted(found)][0]}; name a folder "
                        "that does not exist")
    if found and not overwrite:
        raise UserError(f"{folder} holds an exported model: replace it with --overwrite, or name another folder")
