"""Read and write small files. A write is atomic: a reader finds the old file or the new one, never a part."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from errors import UserError, printable


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, sync it to disk, and rename it into place.

    Raises UserError where the folder cannot be written or the disk is full; ``path`` is then as it was.
    """
    if not path.name:
        raise UserError(f"{path}: the name of a folder, expected that of a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{printable(path, 300)}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # it is there only where something failed, and may then be out of reach too
            temporary.unlink()


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill that takes the place of ``target`` when the block ends without an error."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            target.rename(aside)
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        if aside.exists() and not target.exists():  # stopped between the two renames
            aside.rename(target)
        for leftover in (temporary, aside):
            shutil.rmtree(leftover, ignore_errors=True)


def remove_temporaries(folder: Path) -> None:
    """Delete what writers that were killed left in a folder into which nobody writes now."""
    for temporary in folder.glob(".*.*.tmp"):
        if temporary.suffixes[-2][1:].isdecimal():
            temporary.unlink(missing_ok=True)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{printable(path, 300)}: cannot be read: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8; bytes of a file name that are not become escapes, valid in JSON."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; raises UserError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected an object, found {printable(type(found).__name__)}")
    return found


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; file systems that cannot sync a folder are left alone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
