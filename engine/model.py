"""Networks: build one from a config, find and load its weights, and predict."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from yacs.config import CfgNode

from configs.load import to_plain
from datasets.transforms import build_eval_transforms
from engine import released, runtime
from engine.weights import LoadReport, load_weights
from errors import UserError
from models import create_model

# Constructor arguments that have their own keys.
_OWN_KEYS = {"num_classes": "the key is MODEL.NUM_CLASSES", "image_size": "the key is DATA.IMAGE_SIZE",
             "drop_path_rate": "the key is MODEL.DROP_PATH", "in_chans": "images have three channels"}


def build_model(config: CfgNode) -> nn.Layer:
    """Return the network of a config, freshly initialised from its seed.

    Any error of the constructor for the user's MODEL.ARGS is raised as a UserError.
    """
    model, size, arguments = config.MODEL, config.DATA.IMAGE_SIZE, to_plain(config.MODEL.ARGS)
    for name, value in arguments.items():
        if name in _OWN_KEYS:
            raise UserError(f"MODEL.ARGS.{name} is not taken: {_OWN_KEYS[name]}")
        if name.endswith("drop_rate") and not (type(value) in (int, float) and 0 <= value < 1):
            raise UserError(f"MODEL.ARGS.{name} is {value!r}, expected 0 <= value < 1")  # or Paddle fails later
    runtime.seed_everything(config.RUNTIME.SEED)
    try:
        return create_model(model.NAME, model.NUM_CLASSES, size, drop_path_rate=model.DROP_PATH, **arguments)
    except UserError:
        raise
    except Exception as error:
        if not arguments:
            raise
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"MODEL.ARGS {arguments} build no {model.NAME}: {type(error).__name__}: {reason}") from error


def find_weights(weights: str) -> Path:
    """Return the file that ``weights`` names; UserError where there is none or a released checkpoint was changed.

    ``weights`` is a file with or without ``.pdparams``, a run folder (its selected weights), or the name or folder of
    a released checkpoint.
    """
    folder = released.find_released(weights)
    if folder:
        released.check_released(folder)
        return folder / released.WEIGHTS
    path = Path(os.path.expanduser(weights))
    if path.is_dir():
        found = path / "best_model.pdparams"
        if not found.exists():
            other = released.describe_other(path) or "not a run folder with weights: it has no best_model.pdparams"
            raise UserError(f"{path} is {other}")
        return found
    for candidate in (path, path.with_name(path.name + ".pdparams")):
        if candidate.is_file():
            return candidate
    raise released.unknown_weights(weights)


def load_model(config: CfgNode, weights: str | Path) -> tuple[nn.Layer, LoadReport]:
    """Return the network of a config in evaluation mode with loaded weights, and the report on loading them."""
    path = find_weights(str(weights))
    model = build_model(config)
    report = load_weights(model, path)
    model.eval()
    return model, report


@paddle.no_grad()
def predict(config: CfgNode, model: nn.Layer, images: Sequence[np.ndarray]) -> np.ndarray:
    """Return class probabilities ``[N, num_classes]`` of RGB images, uint8 ``[H, W, 3]`` each, of any sizes."""
    transform = build_eval_transforms(config.AUGMENT, config.DATA.IMAGE_SIZE)
    batches, size = [], config.DATA.EVAL_BATCH_SIZE
    for start in range(0, len(images), size):
        batch = transform.batch(images, np.arange(start, min(start + size, len(images))), (0,))
        with runtime.autocast(config.RUNTIME.EVAL_PRECISION):
            logits = model(paddle.to_tensor(batch))
        batches.append(F.softmax(logits.astype("float32"), axis=-1).numpy())
    return np.concatenate(batches)
