"""Trained networks that a new one learns from, beside the labels."""

from __future__ import annotations

import logging

import paddle
import paddle.nn.functional as F
from paddle import nn
from yacs.config import CfgNode

from configs.load import load_config
from datasets.dataset import ImageDataset
from engine.data import check_classes
from engine.losses import LabelSmoothingCrossEntropy
from engine.model import load_model
from engine.weights import released
from errors import UserError, nearest

log = logging.getLogger("suite")

# What a teacher must have in common with its student, which see the same batch.
_SHARED_KEYS = ("MODEL.NUM_CLASSES", "DATA.IMAGE_SIZE", "AUGMENT.MEAN", "AUGMENT.STD")


class Teachers:
    """The mean prediction of released networks as a part of the target (knowledge distillation).

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531, with a
    temperature of 1. The teachers see the very images that their student sees, augmented and mixed.
    """

    def __init__(self, config: CfgNode, dataset: ImageDataset) -> None:
        """Load LOSS.TEACHERS; UserError where one is not there, or was made for other classes or images."""
        self.share = config.LOSS.TEACHER_SHARE
        self.networks = [_load(name, config, dataset) for name in config.LOSS.TEACHERS]
        self.cross_entropy = LabelSmoothingCrossEntropy(0.0)

    @paddle.no_grad()
    def probabilities(self, images: paddle.Tensor) -> paddle.Tensor:
        """Return the mean of the teachers' class probabilities, ``[B, classes]``, of images ``[B, 3, H, W]``."""
        found = [F.softmax(network(images).astype("float32"), axis=-1) for network in self.networks]
        return paddle.stack(found).mean(0)

    def loss(self, logits: paddle.Tensor, probabilities: paddle.Tensor, labels_loss: paddle.Tensor) -> paddle.Tensor:
        """Return ``(1 - share) · labels_loss + share · cross entropy`` of probabilities and logits ``[B, classes]``."""
        return (1.0 - self.share) * labels_loss + self.share * self.cross_entropy(logits, probabilities)


def _load(name: str, config: CfgNode, dataset: ImageDataset) -> nn.Layer:
    """Return the network of a released checkpoint in evaluation mode."""
    folder = released.folder_of(name)
    if folder is None:
        raise UserError(f"LOSS.TEACHERS names {name!r}, expected names of released checkpoints, which stand in "
                        f"{released.FOLDER}{nearest(name, released.released_names())}")
    released.check_released(folder)
    own = load_config(folder / released.CONFIG)
    for key in _SHARED_KEYS:
        section, leaf = key.split(".")
        found, expected = own[section][leaf], config[section][leaf]
        if found != expected:
            raise UserError(f"LOSS.TEACHERS: {name} has {key} {found}, expected that of this run, {expected}")
    check_classes(folder / released.WEIGHTS, dataset)
    log.info("teacher %s: sha256 %s", name, released.read_sums(folder / released.SUMS)[released.WEIGHTS])
    return load_model(own, folder)[0]
