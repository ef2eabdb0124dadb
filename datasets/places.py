"""Where a data set may stand: the folder that is named, and what AI Studio makes of it."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from errors import UserError

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")


def places(root: str = "") -> Iterator[Path]:
    """Yield the folders to look into for ``root``: itself, then the folders ``data*`` in it, as on AI Studio.

    Without a root, or with the default ``data``, ``~/data`` follows, where AI Studio mounts data sets. UserError
    where ``root`` is the name of an archive that does not exist.
    """
    root = os.path.expanduser(root)
    if root.endswith((*ARCHIVES, ".gz")) and not Path(root).exists():
        raise UserError(f"DATA.ROOT names {root}, but there is no such file")
    for folder in ["data", os.path.expanduser("~/data")] if root in ("", "data") else [root]:
        yield Path(folder)
        yield from (Path(place) for place in sorted(glob.glob(f"{glob.escape(folder)}/data*/")))
