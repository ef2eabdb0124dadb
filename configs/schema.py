"""The one list of keys: each with its default, its meaning, and the values that it takes.

``configs/load.py`` merges YAML files into this tree; whatever is not listed here is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from yacs.config import CfgNode


def default_config() -> CfgNode:
    """Return the tree of defaults: iFormer-S on CIFAR-10 as its source trains it, mixup off."""
    c = CfgNode()
    c.NAME = ""  # name of the run and of its folder; empty: the config file's name
    c.OUTPUT = "output"  # folder of runs: a run writes into OUTPUT/NAME

    c.MODEL = CfgNode()
    c.MODEL.NAME = "iformer_small"  # a name that tools/summary.py lists, or paddle/<network of paddle.vision.models>
    c.MODEL.NUM_CLASSES = 10  # outputs of the head; at least the classes of the dataset
    c.MODEL.DROP_PATH = 0.0  # stochastic depth rate of the last block, rising linearly from 0
    c.MODEL.ARGS = CfgNode(new_allowed=True)  # constructor arguments: whole architectures can be written here

    c.DATA = CfgNode()
    c.DATA.NAME = "cifar10"  # cifar10, cifar100, cifar100_coarse, mnist, digits (needs no network), imagefolder
    c.DATA.ROOT = "data"  # folder or archive; AI Studio's data/dataNNNN/ is found as well
    c.DATA.DOWNLOAD = True  # fetch the archive into ROOT where it is missing
    c.DATA.IMAGE_SIZE = 224  # side, or [height, width], that the network sees, in pixels
    c.DATA.BATCH_SIZE = 128  # training images for one optimizer step; the last short batch of an epoch is dropped
    c.DATA.EVAL_BATCH_SIZE = 128  # images for one step of evaluation; all are counted
    c.DATA.PIPELINE = "batch"  # batch: compiled transforms where they can be; reference: one by one; the same pixels
    c.DATA.WORKERS = 2  # threads that prepare batches; 0 prepares them in the training thread
    c.DATA.HOLDOUT = 5000  # training images held out to select the best epoch; 0 selects on the test set
    c.DATA.MAX_IMAGES = 0  # for trials: at most so many images of each split, every class its share; 0 is all

    c.AUGMENT = CfgNode()  # of training images, in this order; evaluation only scales (EVAL_CROP_PCT) and normalises
    c.AUGMENT.CROP = "random_resized"  # random_resized; pad (then crop at random); none (resize)
    c.AUGMENT.CROP_SCALE = [0.08, 1.0]  # random_resized: smallest and largest share of the image's area
    c.AUGMENT.CROP_RATIO = [0.75, 1.3333333333]  # random_resized: smallest and largest width / height
    c.AUGMENT.CROP_PADDING = 4  # pad: black pixels added on each side, at the size that the network sees
    c.AUGMENT.BRIGHTNESS = 0.0  # colour jitter: a factor from [1 - x, 1 + x]
    c.AUGMENT.CONTRAST = 0.0  # colour jitter: a factor from [1 - x, 1 + x]
    c.AUGMENT.SATURATION = 0.0  # colour jitter as Paddle draws it (twice: see datasets/color.py)
    c.AUGMENT.HUE = 0.0  # colour jitter: a shift from [-x, x] turns, at most 0.5
    c.AUGMENT.HFLIP = 0.5  # probability of a horizontal flip
    c.AUGMENT.ROTATION = 0.0  # largest rotation to either side, in degrees
    c.AUGMENT.RANDAUGMENT_N = 0  # RandAugment: operations for each image; 0 is off
    c.AUGMENT.RANDAUGMENT_M = 9.0  # RandAugment: magnitude, 0 to 30
    c.AUGMENT.ERASING = 0.0  # probability of erasing a random rectangle
    c.AUGMENT.MIXUP = 0.0  # alpha of batch mixup; 0 is off
    c.AUGMENT.CUTMIX = 0.0  # alpha of batch cutmix; 0 is off
    c.AUGMENT.MIX_PROB = 1.0  # probability that a batch is mixed at all
    c.AUGMENT.MIX_SWITCH_PROB = 0.5  # probability of cutmix where both are on
    c.AUGMENT.INTERPOLATION = "bilinear"  # of crops and resizes: nearest, bilinear, bicubic
    c.AUGMENT.EVAL_CROP_PCT = 0.0  # 0: evaluation sees the whole image; else this share of its middle (timm: 0.9)
    c.AUGMENT.MEAN = [0.485, 0.456, 0.406]  # of the pixels in [0, 1], red green blue
    c.AUGMENT.STD = [0.229, 0.224, 0.225]

    c.LOSS = CfgNode()
    c.LOSS.LABEL_SMOOTHING = 0.1  # share of the target spread over all classes; evaluation reports the same loss

    c.OPTIMIZER = CfgNode()
    c.OPTIMIZER.NAME = "adam"  # adam (weight decay as L2 in the gradient); adamw, muon (decoupled); sgd (momentum, L2)
    c.OPTIMIZER.LR = 1e-3  # peak learning rate
    c.OPTIMIZER.WEIGHT_DECAY = 1e-5
    c.OPTIMIZER.DECAY_ALL = True  # False: no weight decay for biases, norms and other one-dimensional parameters
    c.OPTIMIZER.BETAS = [0.9, 0.999]  # adam, adamw, and muon where it is AdamW
    c.OPTIMIZER.EPSILON = 1e-8  # the same
    c.OPTIMIZER.MOMENTUM = 0.9  # sgd, muon (whose authors take 0.95)

    c.SCHEDULE = CfgNode()  # the learning rate is a pure function of the iteration
    c.SCHEDULE.NAME = "cosine"  # cosine (LR to MIN_LR), piecewise_linear (through POINTS), constant
    c.SCHEDULE.MIN_LR = 0.0  # cosine: learning rate at the end
    c.SCHEDULE.WARMUP_EPOCHS = 0.0  # epochs (fractions allowed) of linear rise from WARMUP_LR before the schedule
    c.SCHEDULE.WARMUP_LR = 0.0
    c.SCHEDULE.POINTS = [[0.0, 0.0], [0.4, 1.0], [0.8, 0.05], [1.0, 0.0]]  # [share of training, share of LR]

    c.TRAIN = CfgNode()
    c.TRAIN.EPOCHS = 100
    c.TRAIN.MAX_STEPS = 0  # for trials: end after so many iterations of the same schedule; 0 is off
    c.TRAIN.PRECISION = "float32"  # or mixed: bfloat16, float16 (GPU, loss scaling); auto: bfloat16 where it is fast
    c.TRAIN.AMP_LEVEL = "O1"  # of mixed precision on a GPU: O1, chosen operators; O2, all but those that must not
    c.TRAIN.EMA_DECAY = 0.0  # EMA of the weights, evaluated and saved in their place; 0 is off
    c.TRAIN.GRAD_CLIP = 0.0  # largest global norm of the gradient; 0 is off
    c.TRAIN.ACCUMULATE = 0  # micro-batches of a batch (gradient accumulation); 0: one, on a CPU as many as memory needs
    c.TRAIN.SYNC_BATCH_NORM = False  # several processes: batch norms see the whole batch, not their shard
    c.TRAIN.ON_NAN = "stop"  # at a non-finite loss: stop; skip (the step, for a non-finite gradient too)
    c.TRAIN.LOG_EVERY = 10  # iterations between rows of steps.csv
    c.TRAIN.EVAL_EVERY = 1  # epochs between evaluations
    c.TRAIN.CHECKPOINT_MINUTES = 10.0  # minutes between checkpoints inside an epoch; each epoch ends with one
    c.TRAIN.KEEP_CHECKPOINTS = 2  # newest checkpoints kept

    c.RUNTIME = CfgNode()
    c.RUNTIME.DEVICE = "auto"  # auto (gpu where there is one), cpu, gpu, gpu:1
    c.RUNTIME.THREADS = 0  # threads of the CPU's operators; 0: one for each core
    c.RUNTIME.SEED = 42  # of weights, order, augmentation and dropout
    c.RUNTIME.DETERMINISTIC = True  # choose deterministic operators on a GPU (slower); the CPU is deterministic
    c.RUNTIME.KERNELS = "auto"  # auto: the compiled CPU operators where they can be built; stock: Paddle's own
    return c


Check = tuple[Callable[[Any], bool], str]


def _one_of(*choices: str) -> Check:
    return (lambda value: value in choices), "one of " + ", ".join(choices)


def _between(low: float, high: float = math.inf, *, open_high: bool = False) -> Check:
    if high == math.inf:
        return (lambda value: low <= value < high), f"{low} or more"
    if open_high:
        return (lambda value: low <= value < high), f"{low} <= value < {high}"
    return (lambda value: low <= value <= high), f"{low} <= value <= {high}"


def _numbers(count: int, low: float, *, ascending: bool = False) -> Check:
    def check(value: list[Any]) -> bool:
        return (len(value) == count and all(_is_number(x) and low <= x < math.inf for x in value)
                and (not ascending or list(value) == sorted(value)))

    return check, f"{count} numbers from {low} up" + (" in ascending order" if ascending else "")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_size(value: int | list[int]) -> bool:
    sides = value if isinstance(value, list) else [value, value]
    return len(sides) == 2 and all(type(side) is int and 1 <= side <= 4096 for side in sides)


def _is_path(points: list[Any]) -> bool:
    rows = [isinstance(p, list) and len(p) == 2 and all(_is_number(x) and 0 <= x < math.inf for x in p) for p in points]
    if not rows or not all(rows):
        return False
    shares = [point[0] for point in points]
    return shares[0] == 0 and shares[-1] == 1 and all(a < b for a, b in pairwise(shares))


_SHARE = _between(0.0, 1.0)
_COUNT = _between(1)
_NON_NEGATIVE = _between(0)

# Keys that take more than any value of their default's type.
CHECKS: dict[str, Check] = {
    "OUTPUT": (lambda path: bool(path) and path.isprintable(), "the name of a folder"),
    "NAME": (lambda name: name not in (".", "..") and not set("/\\") & set(name) and name.isprintable(),
             "a name without slashes and line breaks"),
    "MODEL.NUM_CLASSES": _between(1, 1_000_000),
    "MODEL.DROP_PATH": _between(0.0, 1.0, open_high=True),
    "DATA.NAME": _one_of("cifar10", "cifar100", "cifar100_coarse", "mnist", "digits", "imagefolder"),
    "DATA.ROOT": (str.isprintable, "a folder or an archive"),
    "DATA.IMAGE_SIZE": (_is_size, "a side or [height, width] in pixels, each from 1 to 4096"),
    "DATA.BATCH_SIZE": _COUNT,
    "DATA.EVAL_BATCH_SIZE": _COUNT,
    "DATA.PIPELINE": _one_of("batch", "reference"),
    "DATA.WORKERS": _between(0, 64),
    "DATA.HOLDOUT": _NON_NEGATIVE,
    "DATA.MAX_IMAGES": _NON_NEGATIVE,
    "AUGMENT.CROP": _one_of("random_resized", "pad", "none"),
    "AUGMENT.CROP_SCALE": (lambda v: _numbers(2, 0.0, ascending=True)[0](v) and v[0] > 0 and v[1] <= 1,
                           "[smallest, largest] with 0 < smallest <= largest <= 1"),
    "AUGMENT.CROP_RATIO": (lambda v: _numbers(2, 0.0, ascending=True)[0](v) and v[0] > 0,
                           "[smallest, largest] with 0 < smallest <= largest"),
    "AUGMENT.CROP_PADDING": _between(0, 4096),
    "AUGMENT.BRIGHTNESS": _SHARE,
    "AUGMENT.CONTRAST": _SHARE,
    "AUGMENT.SATURATION": _SHARE,
    "AUGMENT.HUE": _between(0.0, 0.5),
    "AUGMENT.HFLIP": _SHARE,
    "AUGMENT.ROTATION": _between(0.0, 180.0),
    "AUGMENT.RANDAUGMENT_N": _between(0, 14),
    "AUGMENT.RANDAUGMENT_M": _between(0.0, 30.0),
    "AUGMENT.ERASING": _SHARE,
    "AUGMENT.MIXUP": _NON_NEGATIVE,
    "AUGMENT.CUTMIX": _NON_NEGATIVE,
    "AUGMENT.MIX_PROB": _SHARE,
    "AUGMENT.MIX_SWITCH_PROB": _SHARE,
    "AUGMENT.INTERPOLATION": _one_of("nearest", "bilinear", "bicubic"),
    "AUGMENT.EVAL_CROP_PCT": _SHARE,
    "AUGMENT.MEAN": _numbers(3, 0.0),
    "AUGMENT.STD": (lambda v: _numbers(3, 0.0)[0](v) and min(v) > 0, "3 numbers above 0"),
    "LOSS.LABEL_SMOOTHING": _between(0.0, 1.0, open_high=True),
    "OPTIMIZER.NAME": _one_of("adam", "adamw", "muon", "sgd"),
    "OPTIMIZER.LR": _NON_NEGATIVE,
    "OPTIMIZER.WEIGHT_DECAY": _NON_NEGATIVE,
    "OPTIMIZER.BETAS": (lambda v: _numbers(2, 0.0)[0](v) and max(v) < 1, "2 numbers with 0 <= value < 1"),
    "OPTIMIZER.EPSILON": (lambda v: 0 < v < 1, "0 < value < 1"),
    "OPTIMIZER.MOMENTUM": _between(0.0, 1.0, open_high=True),
    "SCHEDULE.NAME": _one_of("cosine", "piecewise_linear", "constant"),
    "SCHEDULE.MIN_LR": _NON_NEGATIVE,
    "SCHEDULE.WARMUP_EPOCHS": _NON_NEGATIVE,
    "SCHEDULE.WARMUP_LR": _NON_NEGATIVE,
    "SCHEDULE.POINTS": (_is_path, "[share of training, share of LR] pairs, the first share 0, the last 1, ascending"),
    "TRAIN.EPOCHS": _between(1, 1_000_000),
    "TRAIN.MAX_STEPS": _NON_NEGATIVE,
    "TRAIN.PRECISION": _one_of("float32", "bfloat16", "float16", "auto"),
    "TRAIN.AMP_LEVEL": _one_of("O1", "O2"),
    "TRAIN.EMA_DECAY": _between(0.0, 1.0, open_high=True),
    "TRAIN.GRAD_CLIP": _NON_NEGATIVE,
    "TRAIN.ACCUMULATE": _NON_NEGATIVE,
    "TRAIN.ON_NAN": _one_of("stop", "skip"),
    "TRAIN.LOG_EVERY": _COUNT,
    "TRAIN.EVAL_EVERY": _COUNT,
    "TRAIN.CHECKPOINT_MINUTES": (lambda v: v > 0, "more than 0"),
    "TRAIN.KEEP_CHECKPOINTS": _COUNT,
    "RUNTIME.DEVICE": (lambda v: v in ("auto", "cpu", "gpu") or re.fullmatch("gpu:[0-9]{1,4}", v) is not None,
                       "auto, cpu, gpu, or gpu:<number>"),
    "RUNTIME.THREADS": _between(0, 1024),
    "RUNTIME.SEED": _between(0, 2**31 - 1),
    "RUNTIME.KERNELS": _one_of("auto", "stock"),
}

# Keys that take values of more types than their default's.
TYPES: dict[str, tuple[type, ...]] = {"DATA.IMAGE_SIZE": (int, list)}
