"""Whether a compiled operator applies, and its call."""

from __future__ import annotations

import paddle
from paddle.base import core

import kernels
from kernels import build

_FLOAT32 = (paddle.float32,)  # `in` compares identities first, which takes a fifth of the time of ==


@paddle.jit.not_to_static
def compiled(*tensors: paddle.Tensor | None) -> bool:
    """Return whether the compiled operators take these tensors: float32, on the CPU, not empty, in dynamic mode.

    None stands for an optional tensor that is missing.
    """
    if kernels.mode() != "auto" or not paddle.in_dynamic_mode():
        return False
    for tensor in tensors:
        if tensor is not None and not (
            tensor.dtype in _FLOAT32 and tensor.place.is_cpu_place() and 0 not in tensor.shape
        ):
            return False
    return type(build.library()) is build.Library


@paddle.jit.not_to_static
def compiled_bfloat16(*tensors: paddle.Tensor | None) -> bool:
    """Return whether operators of mixed precision take these tensors, as :func:`compiled`."""
    return kernels.rounds_to_bfloat16() and compiled(*tensors) and build.library().bfloat16


def run(
    name: str, *arguments: paddle.Tensor | list[paddle.Tensor] | float | bool | None, results: int = 1
) -> paddle.Tensor | list[paddle.Tensor]:
    """Run a compiled operator on the tensors and attributes of its C++ function.

    Returns its first result, or a list of the first ``results``.

    Raises:
        AttributeError: for an unknown operator.
        TypeError: for a wrong number of arguments, or an attribute of a wrong type.
        ValueError: for a tensor of a wrong dtype, shape or place.
    """
    library = build.library()
    expected = library.arguments.get(name) or library.register(name)
    if len(arguments) != expected:  # Paddle reads beyond their end
        raise TypeError(f"{name} takes {expected} arguments, got {len(arguments)}")
    try:
        found = core.eager._run_custom_op(f"hybrid_{name}", *arguments)
    except OSError as error:
        raise ValueError(f"{name}: {str(error).splitlines()[0]}") from None
    if results > 1:
        return found[:results]
    return found[0] if type(found) is list else found
