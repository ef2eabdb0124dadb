"""Muon: orthogonalised momentum for the matrices of a network, AdamW for its other parameters."""

from __future__ import annotations

import math

import paddle
from paddle import nn

import kernels
from engine.optimizers import AdamW

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the authors': of X, (X Xᵀ) X and (X Xᵀ)² X
_ITERATIONS = 5


def hidden_matrices(model: nn.Layer) -> list[paddle.Tensor]:
    """Return the trainable weights of fully connected layers and dense convolutions, without the head's.

    The head is the layer named by the network's ``head_name`` (``models.layers.Classifier``), else the last fully
    connected layer.
    """
    layers = [layer for layer in model.sublayers(include_self=True) if isinstance(layer, (nn.Linear, nn.Conv2D))]
    if hasattr(model, "head_name"):
        head = [layer for path, layer in model.named_sublayers() if f"{path}.".startswith(f"{model.head_name}.")]
    else:
        head = [layer for layer in layers if isinstance(layer, nn.Linear)][-1:]
    return [layer.weight for layer in layers
            if all(layer is not part for part in head) and getattr(layer, "_groups", 1) == 1 and layer.weight.trainable]


@paddle.no_grad()
def orthogonalize(matrix: paddle.Tensor) -> paddle.Tensor:
    """Return nearly ``U Vᵀ`` of the matrix's singular value decomposition ``U S Vᵀ``, ``[m, n]`` float32.

    Five Newton-Schulz iterations of Jordan et al. (see :class:`Muon`) with bfloat16 operands on CPUs that multiply
    them. Singular values that are not tiny end between 0.7 and 1.2.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t().contiguous() if tall else matrix
    x = x / (x.norm() + 1e-7)
    with kernels.bfloat16_products():
        for _ in range(_ITERATIONS):
            square = kernels.product(x, x, transpose_b=True)
            x = a * x + kernels.product(b * square + c * kernels.product(square, square), x)
    return x.t().contiguous() if tall else x


class Muon(AdamW):
    """Nesterov's momentum, orthogonalised, for ``matrices``; AdamW for the rest of ``parameters``.

    Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), for the step; filters
    ``[C', C, kh, kw]`` are matrices ``[C', C·kh·kw]``. Liu et al., arXiv 2502.16982, for the scale
    ``0.2 · sqrt(max(m, n))``, which gives the step the root mean square of AdamW's, so that one learning rate and one
    decoupled weight decay serve all parameters. Deviation: ``grad_clip`` bounds the norm of all gradients together.

    Args:
        others: positional arguments of ``paddle.optimizer.AdamW``.
        parameters: all parameters.
        matrices: those of them that Muon updates.
        momentum: decay of the momentum buffer.
        options: keyword arguments of ``paddle.optimizer.AdamW``.
    """

    def __init__(self, *others: float, parameters: list[paddle.Tensor], matrices: list[paddle.Tensor],
                 momentum: float, **options: object) -> None:
        super().__init__(*others, parameters=parameters, **options)
        self._momentum, self._matrices = momentum, matrices
        taken = set(map(id, matrices))
        self._others = [parameter for parameter in parameters if id(parameter) not in taken]

    @paddle.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient; none where Paddle's loss scaler found one that is not finite."""
        if self._get_auxiliary_var("found_inf"):
            return
        if self._grad_clip:
            pairs = [(parameter, parameter.grad) for parameter in self._parameter_list if parameter.grad is not None]
            for (_, gradient), (_, clipped) in zip(pairs, self._grad_clip(pairs), strict=True):
                gradient.copy_(clipped, False)
        everything, self._parameter_list = self._parameter_list, self._others
        try:
            super().step()
        finally:
            self._parameter_list = everything
        for matrix in self._matrices:
            if matrix.grad is not None:
                self._update_matrix(matrix, matrix.grad)

    def _update_matrix(self, matrix: paddle.Tensor, gradient: paddle.Tensor) -> None:
        if matrix.name not in self._accumulators["momentum"]:
            self._add_accumulator("momentum", matrix)
        velocity = self._get_accumulator("momentum", matrix)
        velocity.scale_(self._momentum).add_(gradient)
        rows = matrix.shape[0]
        update = orthogonalize((gradient + self._momentum * velocity).reshape([rows, -1]))
        rate = self.get_lr()
        decays = self._apply_decay_param_fun is None or self._apply_decay_param_fun(matrix.name)
        matrix.scale_(1.0 - rate * self._weight_decay * decays)
        matrix.subtract_((0.2 * math.sqrt(max(update.shape)) * rate * update).reshape(matrix.shape))
