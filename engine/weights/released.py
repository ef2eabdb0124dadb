"""Checkpoints that the suite carries in ``checkpoints/NAME/``: found by name, read only as they were released."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from errors import UserError, nearest
from utils.paths import ROOT

FOLDER = ROOT / "checkpoints"
WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
RESULTS = "results.json"
SUMS = "SHA256SUMS"


def released_names(folder: Path | None = None) -> list[str]:
    """Return the names of all released checkpoints in ``checkpoints/`` or another folder, sorted."""
    return sorted(path.parent.name for path in (folder or FOLDER).glob(f"[!.]*/{SUMS}"))


def find_released(weights: str | Path) -> Path | None:
    """Return the folder of the released checkpoint that ``weights`` names, or None.

    ``weights`` is its name, its folder, or a file in that. What exists as a path is never taken for a name.
    """
    path = Path(weights)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        return folder if (folder / SUMS).is_file() and (folder / WEIGHTS).is_file() else None
    if path.name and path.with_name(path.name + ".pdparams").exists():
        return None
    return folder_of(str(weights))


def folder_of(name: str) -> Path | None:
    """Return the folder of the released checkpoint of a name, None where there is none; no other path is looked at."""
    return FOLDER / name if name in released_names() else None


def check_released(folder: Path) -> None:
    """Raise UserError where a file of a released checkpoint is not, byte for byte, the one that was released."""
    sums = read_sums(folder / SUMS)
    for name in (WEIGHTS, CONFIG, RESULTS):
        if name not in sums:
            raise UserError(f"{folder / SUMS}: {name} is not in it; restore the folder as it was released")
    for name, expected in sums.items():
        try:
            found = file_sha256(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read: {error.strerror}; restore the folder as it was "
                            "released") from None
        if found != expected:
            raise UserError(f"{folder / name} has sha256 {found}, expected {expected} ({SUMS}): it is damaged or was "
                            "changed; restore it as it was released, for example with git checkout")


def read_sums(path: Path) -> dict[str, str]:
    """Return the checksums of a file as ``sha256sum`` writes them, by name; UserError where it is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
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
    """Return the mistake of naming weights that are not there."""
    names = released_names()
    kinds = "a run folder, .pdparams, .safetensors, a PyTorch file" + (", or a name in checkpoints/" if names else "")
    return UserError(f"{weights}: no such weights{nearest(str(weights), names)}; expected {kinds}")
