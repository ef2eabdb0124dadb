"""Training metrics: sums over images, kept on the device until they are read."""

from __future__ import annotations

import paddle


class RunningMean:
    """Means over images of loss and accuracy; adding needs no synchronisation with the device, reading does."""

    def __init__(self, sums: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> None:
        self._sums = paddle.to_tensor(sums, dtype="float64")

    def add(self, loss: paddle.Tensor, correct: paddle.Tensor, images: int) -> None:
        """Add a batch: its mean loss, its number of correct images, and its number of images."""
        batch = [loss.astype("float64") * images, correct.astype("float64"), paddle.full([], images, "float64")]
        self._sums = self._sums + paddle.stack(batch)

    def sums(self) -> tuple[float, float, float]:
        """Return (sum of losses, correct images, images)."""
        loss, correct, images = self._sums.tolist()
        return loss, correct, images

    def means(self) -> tuple[float, float]:
        """Return (mean loss, accuracy); NaN before the first batch."""
        loss, correct, images = self.sums()
        return (loss / images, correct / images) if images else (float("nan"), float("nan"))
