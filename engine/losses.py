"""The loss of all recipes."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import nn


class LabelSmoothingCrossEntropy(nn.Layer):
    """Cross entropy against a target of which ``label_smoothing`` is spread evenly over all classes.

    ``(1 - s) · nll + s · mean over classes of -log p`` (Szegedy et al., "Rethinking the Inception Architecture",
    2016, section 7). Logits ``[B, classes]``; targets are class indices ``[B]`` or distributions ``[B, classes]``
    (mixup, cutmix). Returns the mean over images, or the loss of each image ``[B]`` with ``reduction="none"``.
    """

    def __init__(self, label_smoothing: float = 0.1) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: paddle.Tensor, target: paddle.Tensor, reduction: str = "mean") -> paddle.Tensor:
        log_probabilities = F.log_softmax(logits.astype("float32"), axis=-1)
        if target.ndim == 1:
            likelihood = paddle.take_along_axis(log_probabilities, target.unsqueeze(1), axis=1).squeeze(1)
        else:
            likelihood = (target * log_probabilities).sum(-1)
        smooth = self.label_smoothing
        losses = -(1.0 - smooth) * likelihood - smooth * log_probabilities.mean(-1)
        return losses.mean() if reduction == "mean" else losses
