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
