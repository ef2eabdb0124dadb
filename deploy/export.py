"""A trained network as an inference model of Paddle, compared with the network as it is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle
from paddle import inference, nn
from yacs.config import CfgNode

from errors import UserError
from utils.fileio import replaced_folder, write_json

PROGRAM, PARAMETERS, PREPROCESSING = "inference.json", "inference.pdiparams", "preprocessing.json"
LARGEST_DEVIATION = 1e-4  # of the logits, in their standard deviations


def export(config: CfgNode, model: nn.Layer, folder: Path, classes: Sequence[str], overwrite: bool = False) -> float:
    """Write a network in evaluation mode as a program with its weights, and what images have to go through before.

    The program takes float32 ``[B, 3, H, W]`` for any B and the config's ``DATA.IMAGE_SIZE``, and gives logits
    ``[B, num_classes]``.

    Args:
        config: of the network.
        model: on the CPU.
        folder: to be made, with ``inference.json``, ``inference.pdiparams`` and ``preprocessing.json``.
        classes: names of the outputs, in their order.
        overwrite: whether an exported model may be replaced.

    Returns:
        The largest deviation of the program's logits from the network's, in standard deviations of these.

    Raises:
        UserError: where ``folder`` holds something else, or cannot be written, and for weights that give no finite
            logits.
    """
    _check_place(folder, overwrite)
    size = config.DATA.IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    images = np.random.default_rng(0).standard_normal((2, 3, height, width)).astype(np.float32)
    with paddle.no_grad():
        expected = model(paddle.to_tensor(images)).numpy()
    if not np.isfinite(expected).all():
        raise UserError(f"{config.MODEL.NAME} gives logits that are no finite numbers with these weights")
    spec = paddle.static.InputSpec([None, 3, height, width], "float32", "image")
    with replaced_folder(folder.resolve()) as made:  # "." and ".." have no name
        paddle.jit.save(model, str(made / Path(PROGRAM).stem), input_spec=[spec])
        off = float(np.abs(run_exported(made, images) - expected).max())
        deviation = off / (float(expected.std()) or 1.0)  # a head of zeros gives equal logits
        if not deviation <= LARGEST_DEVIATION:
            raise RuntimeError(f"the exported program's logits are {deviation:.1e} of their standard deviation off")
        augment = config.AUGMENT
        write_json(made / PREPROCESSING, {
            "model": config.MODEL.NAME, "input": "float32 [B, 3, height, width], RGB, (value / 255 - mean) / std",
            "height": height, "width": width, "interpolation": augment.INTERPOLATION,
            "crop_pct": augment.EVAL_CROP_PCT, "mean": list(augment.MEAN), "std": list(augment.STD),
            "output": "logits [B, classes]", "classes": list(classes)})
    return deviation


def run_exported(folder: Path, images: np.ndarray) -> np.ndarray:
    """Return the logits that Paddle's inference engine computes on the CPU for ``[B, 3, H, W]``, float32.

    Without oneDNN, which Paddle 3.3 turns on of itself and for which it cannot translate iFormer's upsampling.
    """
    config = inference.Config(str(folder / PROGRAM), str(folder / PARAMETERS))
    config.disable_gpu()
    config.disable_onednn()
    config.disable_glog_info()
    predictor = inference.create_predictor(config)
    predictor.get_input_handle(predictor.get_input_names()[0]).copy_from_cpu(images)
    predictor.run()
    return predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()


def _check_place(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ["a file"]
    others = [name for name in found if name not in (PROGRAM, PARAMETERS, PREPROCESSING)]
    if others:
        raise UserError(f"{folder} is no exported model: it holds {others[0]}; name a folder that is not there yet")
    if found and not overwrite:
        raise UserError(f"{folder} holds an exported model already: replace it with --overwrite, or name another "
                        "folder")
