"""Where data sets are searched for: the folder that is named, AI Studio's folders, and caches of other frameworks."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from errors import UserError, printable
from utils.fileio import reading

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")
CACHES = ("~/.keras/datasets", "~/.cache/paddle/dataset")
SHOWN = 8  # entries of a folder in a message


def data_root(root: str = "") -> Path:
    """Return ``DATA.ROOT`` as a path: ``data`` by default, ``~`` expanded."""
    return Path(os.path.expanduser(root or "data"))


def search_paths(root: str = "", caches: Sequence[str] = ()) -> Iterator[Path]:
    """Yield the folders to search for ``root``: itself, then the folders ``data*`` in it, as on AI Studio.

    Without a root, or with the default ``data``, ``~/data`` and ``caches`` follow. UserError where ``root`` is the name
    of an archive that does not exist.
    """
    path = data_root(root)
    if path.name.endswith((*ARCHIVES, ".gz")) and not path.exists():
        raise UserError(f"DATA.ROOT is {printable(path, 300)}: no such file")
    default = [path, *(Path(os.path.expanduser(folder)) for folder in ("~/data", *caches))]
    for folder in default if root in ("", "data") else [path]:
        yield folder
        yield from (Path(found) for found in sorted(glob.glob(f"{glob.escape(str(folder))}/data*/")))


def contents(folder: Path) -> str:
    """Return what a folder holds, for the end of a message about what it does not."""
    if folder.is_file():
        return " (which is a file)"
    if not folder.is_dir():
        return " (which does not exist)"
    with reading(folder), os.scandir(folder) as entries:
        names = sorted(entry.name + "/" * is_folder(entry) for entry in entries if not entry.name.startswith("."))
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f" (it holds {', '.join(printable(name, 60) for name in names[:SHOWN]) or 'nothing'}{rest})"


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a visible folder or a link to one."""
    try:
        return entry.is_dir() and not entry.name.startswith(".")
    except OSError:  # a link to itself
        return False


def folders_below(folder: Path, depth: int, limit: int = 500) -> Iterator[Path]:
    """Yield the visible folders up to ``depth`` levels below a folder, the upper ones first, at most ``limit``."""
    level = [folder]
    for _ in range(depth):
        found: list[Path] = []
        for parent in level:
            try:
                with os.scandir(parent) as entries:
                    found += sorted(Path(entry) for entry in entries if is_folder(entry))
            except OSError:  # not readable: the data set is elsewhere
                continue
        level = found[:limit]
        limit -= len(level)
        yield from level
