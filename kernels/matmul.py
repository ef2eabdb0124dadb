"""Matrix products without gradients: ``matmul.cc``."""

from __future__ import annotations

import paddle

from kernels import build, settings
from kernels.dispatch import compiled, run


def product(a: paddle.Tensor, b: paddle.Tensor, transpose_b: bool = False) -> paddle.Tensor:
    """Multiply two matrices, without gradients, for optimizers.

    Args:
        a: ``[m, k]``.
        b: ``[k, n]``, or ``[n, k]`` where ``transpose_b``.
        transpose_b: transpose ``b`` first.

    Returns:
        ``[m, n]``. Within :func:`kernels.bfloat16_products` operands are rounded where the processor has such products.
    """
    if compiled(a, b) and build.library().onednn:
        return run("product", a, b, transpose_b, settings.rounds_to_bfloat16() and build.library().bfloat16)
    return a.matmul(b, transpose_y=transpose_b)
