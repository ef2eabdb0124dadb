"""Synchronised batch norm on any device: ``paddle.nn.SyncBatchNorm`` has no CPU kernel (Paddle 3.3.1)."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import nn

from engine import distributed


class _Normalize(paddle.autograd.PyLayer):
    """``(x - mean) / sqrt(var + epsilon)`` over the images of all ranks, with the gradient through both statistics."""

    @staticmethod
    def forward(ctx, x, epsilon):
        axes = [0, *range(2, x.ndim)]
        shape = [1, x.shape[1]] + [1] * (x.ndim - 2)
        count = paddle.full([1], float(x.size // x.shape[1]))
        mean = x.mean(axes)
        spread = (x - mean.reshape(shape)).square().sum(axes)
        rows = paddle.zeros([distributed.world_size(), 2 * x.shape[1] + 1])
        rows[distributed.rank()] = paddle.concat([mean, spread, count])
        distributed.collective(paddle.distributed.all_reduce, rows)
        means, spreads, counts = rows.split([x.shape[1], x.shape[1], 1], axis=1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        variance = (spreads + counts * (means - mean).square()).sum(0) / total
        inverse = (variance + epsilon).rsqrt().reshape(shape)
        normalized = (x - mean.reshape(shape)) * inverse
        ctx.save_for_backward(normalized, inverse, total)
        return normalized, mean, variance

    @staticmethod
    def backward(ctx, gradient, *_):
        normalized, inverse, total = ctx.saved_tensor()
        axes = [0, *range(2, gradient.ndim)]
        sums = paddle.stack([gradient.sum(axes), (gradient * normalized).sum(axes)])
        distributed.collective(paddle.distributed.all_reduce, sums)
        mean, slope = (sums / total).unbind(0)
        return inverse * (gradient - mean.reshape(inverse.shape) - normalized * slope.reshape(inverse.shape))


class SyncBatchNorm(nn.Layer):
    """A batch norm of Paddle's, ``[B, C]`` or ``[B, C, H, W]``, or a ``NormAct``, synchronised; shares its parameters.

    A step sends two messages: 2 C + 1 numbers of each rank forward, 2 C backward. Statistics are in float32, and exact
    for shards of different sizes.
    """

    def __init__(self, layer: nn.Layer) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._mean, self._variance = layer._mean, layer._variance
        self._momentum, self._epsilon, self._frozen = layer._momentum, layer._epsilon, bool(layer._use_global_stats)
        self.before, self.after = getattr(layer, "before", None), getattr(layer, "after", None)

    def forward(self, x: paddle.Tensor, residual: paddle.Tensor | None = None,
                keep_scale: paddle.Tensor | None = None) -> paddle.Tensor:
        """Compute what ``models.layers.NormAct`` does."""
        x = x if self.before is None else getattr(F, self.before)(x)
        y = self._normalize(x)
        y = y if self.after is None else getattr(F, self.after)(y)
        y = y if keep_scale is None else y * keep_scale
        return y if residual is None else y + residual

    def _normalize(self, x: paddle.Tensor) -> paddle.Tensor:
        with paddle.amp.auto_cast(enable=False):
            values = x.astype("float32")
            if not self.training or self._frozen:
                return F.batch_norm(values, self._mean, self._variance, self.weight, self.bias,
                                    epsilon=self._epsilon).astype(x.dtype)
            y, mean, variance = _Normalize.apply(values, self._epsilon)
            with paddle.no_grad():
                for running, new in ((self._mean, mean), (self._variance, variance)):
                    running.copy_(self._momentum * running + (1 - self._momentum) * new.detach(), False)
            shape = [1, x.shape[1]] + [1] * (x.ndim - 2)
            return (y * self.weight.reshape(shape) + self.bias.reshape(shape)).astype(x.dtype)


def convert_sync_batch_norm(model: nn.Layer) -> None:
    """Replace every batch norm of a network in place; the names and values of its state stay."""
    for parent in model.sublayers(include_self=True):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.BatchNorm1D, nn.BatchNorm2D)):
                setattr(parent, name, SyncBatchNorm(child))
