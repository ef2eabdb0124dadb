"""User errors, and how names from outside appear in their messages; every folder may import this module."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can correct; the tools print its one sentence and exit with code 2."""


def nearest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """Return the end of an error message, `` (nearest: a, b)``, or nothing where none is near in any case."""
    lowered = {choice.lower(): choice for choice in choices}
    matches = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=count, cutoff=0.5)]
    return f" (nearest: {', '.join(matches)})" if matches else ""


def is_url(path: object) -> bool:
    """Return whether a path is a URL of any kind; as a `Path` it has one slash only."""
    return re.match(r"[A-Za-z][\w+.-]+:/", str(path)) is not None


def printable(text: object, limit: int = 100) -> str:
    """Return a text or path from outside without control characters and undecodable bytes, at most so long."""
    text = str(text)[: 4 * limit + 1]
    if not text.isascii():
        text = "/".join(map(file_name, text.split("/")))
    shown = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "..."


def file_name(name: str) -> str:
    """Return the name of a file as text in Unicode's form NFC, whatever bytes it has on disk.

    Bytes that are not UTF-8 are read as GB18030 (archives made on a Chinese Windows), else shown as ``\\xNN``.
    """
    try:
        raw = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # surrogates that no file system gives
        return name.encode("utf-8", "backslashreplace").decode()
    for encoding in ("utf-8", "gb18030"):
        try:
            return unicodedata.normalize("NFC", raw.decode(encoding))
        except UnicodeDecodeError:
            continue
    return raw.decode("utf-8", "backslashreplace")
