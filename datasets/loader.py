"""From a data set to batches: the order of an epoch, threads that prepare what comes next, mixup and CutMix."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from datasets import AUGMENT, MIX, ORDER, ImageDataset, generator
from datasets.batch import BatchPipeline
from datasets.transforms import Pipeline
from errors import UserError

Transforms = Pipeline | BatchPipeline
Batch = tuple[np.ndarray, np.ndarray]
AHEAD = 2  # batches in preparation for each worker


class TrainLoader:
    """Batches of an epoch in random order, each image freshly transformed, drawn as ``datasets.generator`` says.

    ``rows``: the images of each batch that are prepared here, where several processes share it; None: all.
    """

    def __init__(self, dataset: ImageDataset, transform: Transforms, batch_size: int, seed: int, workers: int = 0,
                 rows: np.ndarray | None = None) -> None:
        if len(dataset) < batch_size:
            raise UserError(f"DATA.BATCH_SIZE is {batch_size}, but {dataset.name} has only {len(dataset)} images in "
                            f"its split '{dataset.split}'")
        self.dataset, self.transform, self.batch_size = dataset, transform, batch_size
        self.seed, self.workers, self.rows = seed, workers, rows

    def __len__(self) -> int:
        """Return the number of batches of an epoch, without a short last one."""
        return len(self.dataset) // self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        """Return the indices of all images in the order of an epoch; batches are its consecutive pieces."""
        return generator(self.seed, ORDER, epoch).permutation(len(self.dataset))

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Yield (images float32 ``[B, 3, H, W]``, labels int64 ``[B]``) from batch ``start_batch`` on."""
        batches = self.order(epoch)[: len(self) * self.batch_size].reshape(-1, self.batch_size)[start_batch:]
        batches = batches if self.rows is None else batches[:, self.rows]
        return _prepared(self, batches, (self.seed, AUGMENT, epoch))


class EvalLoader:
    """All images in their order, the last batch as short as it is.

    Where several processes share the evaluation, number ``part`` of ``parts`` takes every ``parts``-th batch.
    """

    def __init__(self, dataset: ImageDataset, transform: Transforms, batch_size: int, workers: int = 0, part: int = 0,
                 parts: int = 1) -> None:
        self.dataset, self.transform, self.batch_size, self.workers = dataset, transform, batch_size, workers
        self.part, self.parts = part, parts

    def __len__(self) -> int:
        """Return the number of batches of part 0; no part has more, none more than one less."""
        return -(-len(self.dataset) // (self.batch_size * self.parts))

    def positions(self) -> np.ndarray:
        """Return the indices of the images that this part takes, in the order in which they come."""
        every = np.arange(len(self.dataset))
        return every[every // self.batch_size % self.parts == self.part]

    def __iter__(self) -> Iterator[Batch]:
        """Yield (images float32 ``[B, 3, H, W]``, labels int64 ``[B]``)."""
        size, positions = self.batch_size, self.positions()
        batches = (positions[start : start + size] for start in range(0, len(positions), size))
        return _prepared(self, batches, (0, AUGMENT))  # a key of which nothing is drawn


def _prepared(loader: TrainLoader | EvalLoader, batches: Iterable[np.ndarray], key: tuple[int, ...]) -> Iterator[Batch]:
    """Yield the batches of these indices in order, prepared ahead of their use by the loader's threads, if it has any.

    Threads, not processes: cv2 and numpy release the interpreter's lock, nothing passes through shared memory,
    and an error arrives here with its own traceback. Leaving the loop early stops the threads.
    """
    def load(indices: np.ndarray) -> Batch:
        return loader.transform.batch(loader.dataset.images, indices, key), loader.dataset.labels[indices]

    if loader.workers == 0:
        yield from map(load, batches)
        return
    pool = ThreadPoolExecutor(loader.workers, thread_name_prefix="loader")
    try:
        ahead: deque = deque()
        for batch in batches:
            ahead.append(pool.submit(load, batch))
            if len(ahead) > AHEAD * loader.workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# Mixup and CutMix -----------------------------------------------------------------------------------------------------


class Mix(NamedTuple):
    """What is done to one batch: ``ratio``, the weight of the image itself; ``box`` (top, bottom, left, right) is
    filled from its mirror in CutMix and None in mixup."""

    ratio: float
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class BatchMix:
    """Mixup with Beta(mixup, mixup), CutMix with Beta(cutmix, cutmix), either off at 0.

    By batch: each image with its mirror in the batch, one ratio for all. Label smoothing is the loss's business.
    Sources: Zhang et al., mixup, ICLR 2018; Yun et al., CutMix, ICCV 2019; the rules for drawing are timm's
    (``timm.data.Mixup``, mode "batch").

    ``prob``: a batch is mixed at all; ``switch_prob``: by CutMix where both are on.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5

    def draw(self, seed: int, iteration: int, height: int, width: int) -> Mix:
        """Return what happens to the batch of ``iteration``; the same for every process of a run."""
        rng = generator(seed, MIX, iteration)
        if not (self.mixup or self.cutmix) or rng.random() >= self.prob:
            return Mix(1.0)
        use_cutmix = self.cutmix > 0 and (self.mixup == 0 or rng.random() < self.switch_prob)
        alpha = self.cutmix if use_cutmix else self.mixup
        ratio = float(rng.beta(alpha, alpha))
        if not use_cutmix:
            return Mix(ratio)
        cut_h, cut_w = int(height * (1 - ratio) ** 0.5), int(width * (1 - ratio) ** 0.5)
        y, x = int(rng.integers(height)), int(rng.integers(width))
        top, bottom = max(y - cut_h // 2, 0), min(y + (cut_h + 1) // 2, height)
        left, right = max(x - cut_w // 2, 0), min(x + (cut_w + 1) // 2, width)
        return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mix_images(images: np.ndarray, mix: Mix) -> np.ndarray:
    """Return the mixed batch of ``[B, 3, H, W]``."""
    if mix.ratio == 1:
        return images
    if mix.box is None:
        return images * mix.ratio + images[::-1] * (1 - mix.ratio)
    top, bottom, left, right = mix.box
    mixed = images.copy()
    mixed[:, :, top:bottom, left:right] = images[::-1][:, :, top:bottom, left:right]
    return mixed


def mix_labels(labels: np.ndarray, num_classes: int, mix: Mix) -> np.ndarray:
    """Return the targets of the mixed batch, float32 ``[B, num_classes]``, from int64 ``[B]``."""
    targets = np.eye(num_classes, dtype=np.float32)[labels]
    return mix.ratio * targets + (1 - mix.ratio) * targets[::-1] if mix.ratio < 1 else targets
