"""Read and write small files. Writes are atomic: a reader finds the old file or the new one, never a part."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from errors import UserError, printable


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it to disk, and rename it to ``path``.

    Raises UserError where the folder cannot be written or the disk is full; ``path`` is then unchanged.
    """
    if not path.name:
        raise UserError(f"{path}: the name of a folder, expected that of a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # some file systems cannot sync a folder
            _sync(path.parent)
    except OSError as error:
        raise UserError(f"{printable(path, 300)}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # exists only after an error, and may be out of reach then
            temporary.unlink()


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces ``target`` when the block ends without an error."""
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
    """Delete what killed writers left in a folder that nobody else writes to."""
    for temporary in folder.glob(".*.*.tmp"):
        if temporary.suffixes[-2][1:].isdecimal():
            temporary.unlink(missing_ok=True)


@contextmanager
def reading(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn an OSError, or one of ``errors``, inside the block into a UserError that names the file."""
    try:
        yield
    except (OSError, *errors) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{printable(path, 300)}: cannot be read: {reason}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8; bytes of a file name that are not become escapes, valid in JSON."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; raises UserError for anything else."""
    with reading(path, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected an object, found {printable(type(found).__name__)}")
    return found


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], header: bool = True) -> str:
    """Return rows as CSV text. Floats keep all their digits, None is an empty cell."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def read_csv(path: Path, *, torn: bool = False) -> list[dict[str, str]]:
    """Read the rows of a CSV file with a heading; none where there is no file.

    ``torn`` drops an incomplete last row, as a killed writer leaves it. Raises UserError for a file that cannot be
    read and for any other row whose cells do not match the heading.
    """
    if not path.exists():
        return []
    with reading(path, UnicodeDecodeError, csv.Error):
        text = path.read_text(encoding="utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), restkey="", restval=None))
    if torn and rows and None in rows[-1].values():
        rows.pop()
    for number, row in enumerate(rows, 2):
        if "" in row or None in row.values():
            raise UserError(f"{path}: row {number} does not have as many cells as the heading")
    return rows


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
