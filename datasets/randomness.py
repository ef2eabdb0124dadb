"""Where every random draw of the data comes from: a generator named by numbers, never a global state."""

from __future__ import annotations

import numpy as np

ORDER, AUGMENT, MIX = 1, 2, 3  # one stream for each use, so that no two uses share draws


def generator(seed: int, stream: int, *key: int) -> np.random.Generator:
    """Return the generator of one use in training.

    Order of an epoch: ``generator(seed, ORDER, epoch)``; one image: ``generator(seed, AUGMENT, epoch, index)``;
    mixing of one batch: ``generator(seed, MIX, iteration)``. The draws depend on these numbers alone: not on
    the number of workers, not on the processes, not on where a run was resumed.
    """
    return np.random.default_rng([seed, stream, *key])
