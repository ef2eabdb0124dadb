"""Released checkpoints in ``checkpoints/NAME/``: found by name, and checked against their SHA-256."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from errors import UserError, is_url, nearest, printable
from utils import ROOT
from utils.fileio import reading

FOLDER = ROOT / "checkpoints"
WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
RESULTS = "results.json"
SUMS = "SHA256SUMS"

EXPORTED = "an exported model; pass the weights or the run folder that it was exported from"
CHECKPOINT = ("a training checkpoint, with the optimizer's state; pass its run folder, whose best_model.pdparams holds "
              "the selected weights (train.py --resume continues from checkpoints)")
_OTHERS = {
    ".pdiparams": EXPORTED, ".pdmodel": EXPORTED, "inference.json": EXPORTED, ".onnx": EXPORTED,
    ".pdopt": "an optimizer's state; pass the .pdparams beside it",
    ".index.json": "the index of weights split over several files; join them into one file first",
}


def released_names(folder: Path | None = None) -> list[str]:
    """Return the names of all released checkpoints in ``checkpoints/`` or another folder, sorted."""
    return sorted(path.parent.name for path in (folder or FOLDER).glob(f"[!.]*/{SUMS}"))


def find_released(weights: str | Path) -> Path | None:
    """Return the folder of the released checkpoint that ``weights`` names, or None.

    ``weights`` is its name, its folder, or a file in that. What exists as a path is never taken for a name.
    """
    path = Path(os.path.expanduser(weights))
    if path.exists():
        folder = path if path.is_dir() else path.parent
        return folder if (folder / SUMS).is_file() and (folder / WEIGHTS).is_file() else None
    if path.name and path.with_name(path.name + ".pdparams").exists():
        return None
    return folder_of(str(weights))


def folder_of(name: str) -> Path | None:
    """Return the folder of the released checkpoint of a name, None where there is none; no other path is looked at."""
    return FOLDER / name if name in released_names() else None


def describe_other(path: Path) -> str:
    """Say what a file or folder is that is not weights, and what to pass instead; "" for anything else."""
    if path.is_dir():
        if any(path.glob("*.pdiparams")) or any(path.glob("*.pdmodel")):
            return EXPORTED
        if path.name == "checkpoints" and (path.parent / CONFIG).is_file():
            return f"the folder of a run's checkpoints; pass the run folder {printable(path.parent, 300)}"
    elif path.parent.name == "checkpoints" and path.stem.isdecimal() and (path.parent.parent / CONFIG).is_file():
        return CHECKPOINT
    return next((meaning for end, meaning in _OTHERS.items() if path.name.endswith(end)), "")


def check_released(folder: Path) -> None:
    """Raise UserError where a file of a released checkpoint is not, byte for byte, the one that was released."""
    sums = read_sums(folder / SUMS)
    for name in (WEIGHTS, CONFIG, RESULTS):
        if name not in sums:
            raise UserError(f"{folder / SUMS}: {name} is not in it; restore the folder as it was released")
    for name, expected in sums.items():
        with reading(folder / name):
            found = file_sha256(folder / name)
        if found != expected:
            raise UserError(f"{folder / name} has sha256 {found}, expected {expected} ({SUMS}): it is damaged or was "
                            "changed; restore it as it was released, for example with git checkout")


def read_sums(path: Path) -> dict[str, str]:
    """Return the checksums of a file as ``sha256sum`` writes them, by name; UserError where it is none."""
    with reading(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    matches = [re.fullmatch(r"([0-9a-f]{64})  ([\w][\w.-]*)", line) for line in lines]
    if not all(matches) or len({match[2] for match in matches}) < len(matches):
        raise UserError(f"{path}: not a list of checksums, expected a line 'sha256  name' for each file")
    return {match[2]: match[1] for match in matches}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def unknown_weights(weights: str | Path) -> UserError:
    """Return the error for weights that do not exist."""
    names = released_names()
    if is_url(weights):
        return UserError(f"{printable(weights, 300)} is a URL; download the file first, for example with curl -LO")
    kinds = "a run folder, .pdparams, .safetensors, a PyTorch file" + (", or a name in checkpoints/" if names else "")
    return UserError(f"{printable(weights, 300)}: no such weights{nearest(str(weights), names)}; expected {kinds}")
