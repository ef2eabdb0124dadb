"""What the notebooks' first cells share: packages, the suite's folder, a config that fits the machine, and display."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.display import Markdown
    from yacs.config import CfgNode

ROOT = Path(__file__).parent.parent
# What a package is imported as, where that is not its name.
_MODULES = {"paddlepaddle": "paddle", "opencv-python-headless": "cv2", "scikit-learn": "sklearn", "PyYAML": "yaml",
            "Jinja2": "jinja2", "scikit-image": "skimage", "ipython": "IPython"}
PAGE_WIDTH = 960  # pixels
_INTERPRETDL = "interpretdl==0.8.0"
_WITHOUT_DATA = ["DATA.NAME=digits", "DATA.HOLDOUT=180", "DATA.MAX_IMAGES=0", "AUGMENT.HFLIP=0.0"]


def prepare() -> list[str]:
    """Make the suite's folder the working directory, install what is missing, and load Paddle with its settings.

    Only packages that cannot be imported at all are installed, in the versions that the suite's tests ran with, so
    that a Paddle for GPUs or a platform's own Jupyter stays. Returns what was set in the environment. Raises UserError
    where something is missing and cannot be installed.
    """
    os.chdir(ROOT)
    _install()
    from engine import runtime

    return runtime.prepare()


def configure(path: str, small: Sequence[str], full: bool) -> CfgNode:
    """Return the config in ``path``: as it is with ``full``, else with the overrides ``small``; and say what it is.

    The environment's ``CIFAR10_ROOT`` or ``MNIST_ROOT`` goes before DATA.ROOT. Where the data are neither found nor
    can be downloaded, the small form takes the built-in digits in their place; the full one raises UserError.
    """
    from configs.load import load_config
    from datasets import build_dataset
    from errors import UserError

    overrides = [] if full else list(small)
    config = load_config(path, overrides)
    root = os.environ.get(f"{config.DATA.NAME.upper()}_ROOT")
    if root:
        overrides.append(f"DATA.ROOT={root}")
        config = load_config(path, overrides)
    try:
        build_dataset(config.DATA, "test")
    except UserError as error:
        if full:
            raise
        wanted = config.DATA.NAME
        config = load_config(path, [*overrides, *_WITHOUT_DATA])
        print(f"没有 {wanted}：改用内置的手写数字（8×8 灰度图），下面的所有数字都是它的，与 {wanted} 无关。\n"
              f"No {wanted}: the built-in handwritten digits (8×8, grey) take its place, so that every figure below "
              f"is about them and says nothing of {wanted}.\n({error})")
    data = config.DATA
    splits = ("train", "holdout", "test") if data.HOLDOUT else ("train", "test")
    sizes = {split: len(build_dataset(data, split)) for split in splits}
    print(f"{path}{'' if full else ', small / 小设置'}: {config.MODEL.NAME}, {data.NAME} at {data.IMAGE_SIZE}×"
          f"{data.IMAGE_SIZE}\n{', '.join(f'{count:,} {split}' for split, count in sizes.items())} images; "
          f"{config.TRAIN.EPOCHS} epochs of {sizes['train'] // data.BATCH_SIZE} × {data.BATCH_SIZE}")
    return config


def show(*paths: Path) -> None:
    """Show pictures that the suite has written, at most as wide as a page and sharp on dense screens."""
    import cv2
    from IPython.display import Image, display

    for path in paths:
        width = cv2.imread(str(path)).shape[1]
        display(Image(filename=str(path), width=min(round(0.65 * width), PAGE_WIDTH)))


def table(rows: Sequence[Mapping[str, Any]]) -> Markdown:
    """Return rows of equal keys as a table to show; shares and other fractions with four digits."""
    from IPython.display import Markdown

    from analysis import formatting

    return Markdown(formatting.table(list(rows[0]), (map(_cell, row.values()) for row in rows)))


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _install() -> None:
    missing = [pin for name in ("requirements.txt", "requirements-explain.txt") for pin in _missing(ROOT / name)]
    commands = [["-c", str(ROOT / "constraints.txt"), *missing]] if missing else []
    if find_spec("interpretdl") is None:
        commands.append(["--no-deps", _INTERPRETDL])
    for arguments in commands:
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            from errors import UserError

            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"these packages are missing and could not be installed: {' '.join(arguments)} ({reason})")
        importlib.invalidate_caches()


def _missing(requirements: Path) -> Iterator[str]:
    """Yield the pins of a file of requirements that stand for no module here."""
    for line in requirements.read_text(encoding="utf-8").splitlines():
        name = line.partition("==")[0].strip()
        if name and name[0].isalnum() and find_spec(_MODULES.get(name, name.lower())) is None:
            yield line.strip()
