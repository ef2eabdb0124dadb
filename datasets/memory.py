"""Memory for batches that is used again: fresh pages from the operating system cost as much as filling them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

KEPT = 8  # blocks that wait for their next use; more are given back


class Memory:
    """Gives float32 arrays whose memory comes back when the last array or view of it is gone."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=KEPT)

    def array(self, shape: Sequence[int]) -> np.ndarray:
        """Return an uninitialised float32 array of this shape."""
        size = math.prod(shape)
        try:
            block = self._free.popleft()
        except IndexError:
            block = None
        if block is None or block.size < size:
            block = np.empty(size, np.float32)
        return np.asarray(_Lease(self._free, block, block[:size].reshape(shape)))


class _Lease:
    """What numpy keeps as the base of an array and of all its views, and drops with the last of them."""

    def __init__(self, free: deque[np.ndarray], block: np.ndarray, view: np.ndarray) -> None:
        self._free, self._block = free, block
        self.__array_interface__ = view.__array_interface__

    def __del__(self) -> None:
        self._free.append(self._block)
