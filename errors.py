"""The one module that every folder may import: mistakes of the user, told in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend; the tools print its one sentence and exit with code 2."""


def nearest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """Return the tail of an error message: `` (nearest: a, b)``, or nothing where none is near in whatever case."""
    lowered = {choice.lower(): choice for choice in choices}
    matches = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=count, cutoff=0.5)]
    return f" (nearest: {', '.join(matches)})" if matches else ""


def printable(text: object, limit: int = 100) -> str:
    """Return a text that came from a file such that a terminal can show it: no control characters, no novels."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text)[: limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "..."
