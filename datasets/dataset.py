"""Labelled images, in memory or read when asked for, and the fixed rule that sets some of them aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

HOLDOUT_RULE = 20220525  # the one seed of all hold-outs; a run's own seed never moves an image between splits


@dataclass(frozen=True)
class ImageDataset:
    """One split of a data set.

    ``images[index]`` is uint8 ``[H, W, 3]`` in RGB; ``images`` is an array ``[N, H, W, 3]``, or a sequence of images
    of any sizes that are read when asked for. ``labels`` is int64 ``[N]`` with values below ``len(class_names)``,
    ``split`` one of train, holdout, test.
    """

    images: np.ndarray | Sequence[np.ndarray]
    labels: np.ndarray
    class_names: tuple[str, ...]
    name: str
    split: str

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: np.ndarray, split: str) -> ImageDataset:
        """Return the images at ``indices``, in that order, as another split."""
        return replace(self, images=self.images[indices], labels=self.labels[indices], split=split)


def stratified_holdout(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Split ``range(len(labels))`` into ``(kept, held_out)`` indices, both ascending.

    ``held_out`` has ``count`` members, stratified by class (largest remainders, ties to the lower class). They are
    drawn with numpy's RandomState, whose stream is frozen, so the split is the same on every machine.
    """
    order = np.random.RandomState(HOLDOUT_RULE).permutation(len(labels))
    sizes = np.bincount(labels)
    exact = sizes * count / len(labels)
    quotas = np.floor(exact).astype(int)
    quotas[np.argsort(quotas - exact, kind="stable")[: count - quotas.sum()]] += 1
    by_class = np.split(order[np.argsort(labels[order], kind="stable")], np.cumsum(sizes)[:-1])
    held_out = np.sort(np.concatenate([members[:quota] for members, quota in zip(by_class, quotas, strict=True)]))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out
