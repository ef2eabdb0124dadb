"""The one list of keys: each with its default, the values that it takes, and its meaning.

``configs/load.py`` merges YAML files into this tree and refuses whatever is not listed here.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from yacs.config import CfgNode

Check = tuple[Callable[[Any], bool], str]  # whether a value of the right type is valid, and what is expected

# The data sets by DATA.NAME, with the module of datasets/ that reads each.
DATASETS = {"cifar10": "cifar", "cifar100": "cifar", "cifar100_coarse": "cifar", "mnist": "mnist", "digits": "digits",
            "imagefolder": "imagefolder"}


def _one_of(*choices: str) -> Check:
    return (lambda value: value in choices), "one of " + ", ".join(choices)


def _between(low: float, high: float = math.inf, *, open_high: bool = False) -> Check:
    if open_high or high == math.inf:
        return (lambda value: low <= value < high), f"{low} <= value < {high}" if open_high else f"{low} or more"
    return (lambda value: low <= value <= high), f"{low} <= value <= {high}"


def _numbers(count: int, expected: str, holds: Callable[[list[float]], bool] = lambda v: True) -> Check:
    """Check a list of non-negative numbers, and then what ``holds`` says of them."""
    return (lambda v: len(v) == count and all(_is_number(x) and 0 <= x < math.inf for x in v) and holds(v)), expected


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_size(value: int | list[int]) -> bool:
    sides = value if isinstance(value, list) else [value, value]
    return len(sides) == 2 and all(type(side) is int and 1 <= side <= 4096 for side in sides)


def _is_text(path: str) -> bool:
    """Return whether a path is printable but for bytes that are not UTF-8, which Python has as surrogates."""
    return re.sub("[\udc80-\udcff]", "", path).isprintable()


def _is_path(points: list[Any]) -> bool:
    rows = [isinstance(p, list) and len(p) == 2 and all(_is_number(x) and 0 <= x < math.inf for x in p) for p in points]
    if not rows or not all(rows):
        return False
    times = [point[0] for point in points]
    return times[0] == 0 and times[-1] == 1 and all(a < b for a, b in pairwise(times))


_ANY = (lambda value: True), ""
_COUNT = _between(1)
_NON_NEGATIVE = _between(0)
_RATE = _between(0.0, 10.0)  # beyond is a slip
_FRACTION = _between(0.0, 1.0)
_BELOW_1 = _between(0.0, 1.0, open_high=True)
_IN_UNIT = "3 numbers in [0, 1], STD above 0: pixels are in [0, 1], so divide grey levels by 255"
_FOLDER = (lambda path: bool(path) and _is_text(path), "the name of a folder")
_NAME = (lambda name: name not in (".", "..") and not set("/\\") & set(name) and name.isprintable(),
         "a name without slashes and line breaks")
_DEVICE = (lambda v: re.fullmatch("auto|cpu|gpu(:[0-9]{1,4})?", v) is not None,
           "auto, cpu, gpu, or gpu:<number> such as gpu:0")
_SCALE = _numbers(2, "[smallest, largest] with 0 < smallest <= largest <= 1", lambda v: 0 < v[0] <= v[1] <= 1)
_RATIO = _numbers(2, "[smallest, largest] with 0 < smallest <= largest", lambda v: 0 < v[0] <= v[1])
_POINTS = (_is_path, "[part of training, factor of LR] pairs, the first part 0, the last 1, ascending")

KEYS: dict[str, tuple[Any, Check]] = {
    "NAME": ("", _NAME),  # of the run and its folder; empty: the config file's name
    "OUTPUT": ("output", _FOLDER),  # runs: OUTPUT/NAME

    "MODEL.NAME": ("iformer_small", _ANY),  # from tools/summary.py, or paddle/<network of paddle.vision.models>
    "MODEL.NUM_CLASSES": (10, _between(1, 1_000_000)),  # outputs of the head; at least the classes of the dataset
    "MODEL.DROP_PATH": (0.0, _BELOW_1),  # stochastic depth rate of the last block, rising linearly from 0
    "MODEL.ARGS": (CfgNode(new_allowed=True), _ANY),  # constructor arguments: any architecture can be written here

    "DATA.NAME": ("cifar10", _one_of(*DATASETS)),  # digits come with scikit-learn, without a download
    "DATA.ROOT": ("data", (_is_text, "a folder or an archive")),  # AI Studio's data/dataNNNN/ is found as well
    "DATA.DOWNLOAD": (True, _ANY),  # fetch the archive into ROOT where it is missing
    "DATA.IMAGE_SIZE": (224, (_is_size, "a side or [height, width] in pixels, each from 1 to 4096")),  # of the input
    "DATA.BATCH_SIZE": (128, _COUNT),  # training images per optimizer step; a short last batch is dropped
    "DATA.EVAL_BATCH_SIZE": (128, _COUNT),  # images per batch of evaluation; none is dropped
    "DATA.PIPELINE": ("batch", _one_of("batch", "reference")),  # same pixels; batch: compiled where possible
    "DATA.WORKERS": (2, _between(0, 64)),  # threads that prepare batches; 0: the training thread
    "DATA.HOLDOUT": (5000, _NON_NEGATIVE),  # training images held out to select the best epoch; 0: select on test
    "DATA.MAX_IMAGES": (0, _NON_NEGATIVE),  # for trials: at most so many images per split, stratified; 0: all

    # Of training images, in this order; evaluation only scales (EVAL_CROP_PCT) and normalises.
    "AUGMENT.CROP": ("random_resized", _one_of("random_resized", "pad", "none")),  # pad: then crop; none: resize
    "AUGMENT.CROP_SCALE": ([0.08, 1.0], _SCALE),  # random_resized: area of the crop / area of the image
    "AUGMENT.CROP_RATIO": ([0.75, 1.3333333333], _RATIO),  # random_resized: width / height
    "AUGMENT.CROP_PADDING": (4, _between(0, 4096)),  # pad: black pixels on each side, at the size of the input
    "AUGMENT.BRIGHTNESS": (0.0, _FRACTION),  # colour jitter: a factor from [1 - x, 1 + x]
    "AUGMENT.CONTRAST": (0.0, _FRACTION),  # colour jitter: a factor from [1 - x, 1 + x]
    "AUGMENT.SATURATION": (0.0, _FRACTION),  # colour jitter as Paddle draws it (twice: see ColorJitter)
    "AUGMENT.HUE": (0.0, _between(0.0, 0.5)),  # colour jitter: a shift from [-x, x] turns
    "AUGMENT.HFLIP": (0.5, _FRACTION),  # probability of a horizontal flip
    "AUGMENT.ROTATION": (0.0, _between(0.0, 180.0)),  # largest rotation to either side, in degrees
    "AUGMENT.RANDAUGMENT_N": (0, _between(0, 14)),  # RandAugment: operations per image; 0: off
    "AUGMENT.RANDAUGMENT_M": (9.0, _between(0.0, 30.0)),  # RandAugment: magnitude
    "AUGMENT.ERASING": (0.0, _FRACTION),  # probability of erasing a random rectangle
    "AUGMENT.MIXUP": (0.0, _NON_NEGATIVE),  # alpha of batch mixup; 0: off
    "AUGMENT.CUTMIX": (0.0, _NON_NEGATIVE),  # alpha of batch cutmix; 0: off
    "AUGMENT.MIX_PROB": (1.0, _FRACTION),  # probability that a batch is mixed
    "AUGMENT.MIX_SWITCH_PROB": (0.5, _FRACTION),  # probability of cutmix where both are on
    "AUGMENT.INTERPOLATION": ("bilinear", _one_of("nearest", "bilinear", "bicubic")),  # of crops and resizes
    "AUGMENT.EVAL_CROP_PCT": (0.0, _FRACTION),  # of the side that evaluation sees (timm: 0.9); 0: the whole image
    "AUGMENT.MEAN": ([0.485, 0.456, 0.406], _numbers(3, _IN_UNIT, lambda v: max(v) <= 1)),  # of pixels in [0, 1], RGB
    "AUGMENT.STD": ([0.229, 0.224, 0.225], _numbers(3, _IN_UNIT, lambda v: min(v) > 0 and max(v) <= 1)),  # likewise

    "LOSS.LABEL_SMOOTHING": (0.1, _BELOW_1),  # part of the target spread over all classes, in evaluation too

    "OPTIMIZER.NAME": ("adam", _one_of("adam", "adamw", "muon", "sgd")),  # decay: L2 in adam, sgd; else decoupled
    "OPTIMIZER.LR": (1e-3, _RATE),  # peak learning rate
    "OPTIMIZER.WEIGHT_DECAY": (1e-5, _NON_NEGATIVE),
    "OPTIMIZER.DECAY_ALL": (True, _ANY),  # false: no decay of biases, norms and other one-dimensional parameters
    "OPTIMIZER.BETAS": ([0.9, 0.999], _numbers(2, "2 numbers with 0 <= value < 1", lambda v: max(v) < 1)),  # Adam's
    "OPTIMIZER.EPSILON": (1e-8, (lambda v: 0 < v < 1, "0 < value < 1")),  # Adam's
    "OPTIMIZER.MOMENTUM": (0.9, _BELOW_1),  # sgd, muon (its authors: 0.95)

    # The learning rate is a pure function of the global step.
    "SCHEDULE.NAME": ("cosine", _one_of("cosine", "piecewise_linear", "constant")),  # LR to MIN_LR; through POINTS; LR
    "SCHEDULE.MIN_LR": (0.0, _RATE),  # cosine: learning rate at the end
    "SCHEDULE.WARMUP_EPOCHS": (0.0, _NON_NEGATIVE),  # of linear rise from WARMUP_LR; fractions allowed
    "SCHEDULE.WARMUP_LR": (0.0, _RATE),
    "SCHEDULE.POINTS": ([[0.0, 0.0], [0.4, 1.0], [0.8, 0.05], [1.0, 0.0]], _POINTS),  # [part of training, factor]

    "TRAIN.EPOCHS": (100, _between(1, 1_000_000)),
    "TRAIN.MAX_STEPS": (0, _NON_NEGATIVE),  # for trials: end after so many steps of the same schedule; 0: off
    "TRAIN.PRECISION": ("float32", _one_of("float32", "bfloat16", "float16", "auto")),  # auto: bfloat16 where fast
    "TRAIN.AMP_LEVEL": ("O1", _one_of("O1", "O2")),  # of mixed precision on a GPU: O1 chosen, O2 most operators
    "TRAIN.EMA_DECAY": (0.0, _BELOW_1),  # EMA of the weights, evaluated and saved in their place; 0: off
    "TRAIN.GRAD_CLIP": (0.0, _NON_NEGATIVE),  # largest global norm of the gradient; 0: off
    "TRAIN.ACCUMULATE": (0, _NON_NEGATIVE),  # micro-batches per batch; 0: one, on a CPU as many as memory needs
    "TRAIN.SYNC_BATCH_NORM": (False, _ANY),  # several processes: batch norms see the whole batch, not their shard
    "TRAIN.ON_NAN": ("stop", _one_of("stop", "skip")),  # at a non-finite loss: stop; skip (also for such a gradient)
    "TRAIN.LOG_EVERY": (10, _COUNT),  # steps between rows of steps.csv
    "TRAIN.EVAL_EVERY": (1, _COUNT),  # epochs between evaluations
    "TRAIN.CHECKPOINT_MINUTES": (10.0, (lambda v: v > 0, "more than 0")),  # inside an epoch; each epoch ends with one
    "TRAIN.KEEP_CHECKPOINTS": (2, _COUNT),  # newest checkpoints kept

    "RUNTIME.DEVICE": ("auto", _DEVICE),  # auto: a GPU where there is one
    "RUNTIME.EVAL_PRECISION": ("float32", _one_of("float32", "bfloat16")),  # of eval.py, predict.py, explain.py
    "RUNTIME.THREADS": (0, _between(0, 1024)),  # of the CPU's operators; 0: one per core
    "RUNTIME.SEED": (42, _between(0, 2**31 - 1)),  # of weights, order, augmentation and dropout
    "RUNTIME.DETERMINISTIC": (True, _ANY),  # deterministic operators on a GPU (slower); the CPU's always are
    "RUNTIME.KERNELS": ("auto", _one_of("auto", "stock")),  # auto: compiled CPU operators where they can be built
}

# Keys that take values of more types than their default's.
TYPES: dict[str, tuple[type, ...]] = {"DATA.IMAGE_SIZE": (int, list)}


def default_config() -> CfgNode:
    """Return the tree of defaults: iFormer-S on CIFAR-10 as its source trains it, mixup off."""
    config = CfgNode()
    for key, (default, _) in KEYS.items():
        *sections, leaf = key.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[leaf] = copy.deepcopy(default)
    return config
