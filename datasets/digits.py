"""Handwritten digits that need no network: the 1,797 images which scikit-learn carries.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test part).
"""

from __future__ import annotations

import numpy as np

from datasets import ImageDataset, stratified_holdout

CLASSES = tuple("0123456789")
TEST_IMAGES = 360


def class_names(root: str = "", name: str = "digits") -> tuple[str, ...]:
    return CLASSES


def read(split: str, root: str = "", may_download: bool = False, name: str = "digits") -> ImageDataset:
    """Return the split ``train`` (1,437 images) or ``test`` (360) of the digits, 8×8, grey in three channels.

    The values 0..16 are scaled to 0..255. The source has no split of its own: the test images are stratified by class
    and drawn by the rule of the hold-outs. Writers are therefore in both splits, as in most published results.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=3)
    everything = ImageDataset(images, digits.target.astype(np.int64), CLASSES, "digits", "train")
    train, test = stratified_holdout(everything.labels, TEST_IMAGES)
    return everything.select({"train": train, "test": test}[split], split)
