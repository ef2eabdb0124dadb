"""Read ``.pdparams``, pickles of numpy arrays. Source: ``paddle/framework/io.py``, ``io_utils.py`` of 2.0 to 3.3."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.weights.pytorch import widen
from errors import UserError
from utils.pickles import Array

NAMES = "StructuredToParameterName@@"
SLICES = "UnpackBigParamInfor@@"


def unwrap(value: object) -> object:
    """Return the array of a tensor, which Paddle may write as a pair of its name and its array."""
    return value[1] if type(value) is tuple and len(value) == 2 and type(value[0]) is str else value


def fetcher() -> Callable[[Array], np.ndarray]:
    """Return the function that gives an array's numbers: Paddle writes bfloat16 as the uint16 of the same bits."""
    widened: dict[int, np.ndarray] = {}

    def fetch(array: Array) -> np.ndarray:
        if array.values.dtype != np.uint16:
            return array.values
        if id(array) not in widened:
            widened[id(array)] = widen(array.values)
            widened[id(array)].flags.writeable = False
        return widened[id(array)]

    return fetch


def join_slices(tree: object, limit: int, title: str) -> tuple[object, bool]:
    """Join arrays beyond a gigabyte, which protocols 2 and 3 cut; return the tree and whether a layer's state it is.

    ``limit``: bytes that the joined arrays may have, which are those of the file.
    """
    if not isinstance(tree, dict):
        return tree, False
    of_layer = tree.pop(NAMES, None) is not None
    cuts = tree.pop(SLICES, {})
    try:
        for name, cut in cuts.items():
            parts = [unwrap(tree.pop(part)).values for part in cut["slices"]]
            limit -= sum(part.nbytes for part in parts)
            if limit < 0:
                raise ValueError("the same slice again and again")
            tree[name] = Array(np.concatenate(parts).reshape(cut["OriginShape"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{title} is damaged: the slices of its large parameters do not fit together") from None
    return tree, of_layer
