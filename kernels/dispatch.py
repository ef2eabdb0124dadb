"""What every operator needs: whether the compiled library may take its tensors, and the call itself."""

from __future__ import annotations

import paddle

from kernels import build

_NO_TENSOR = (int, float, bool, type(None))


@paddle.jit.not_to_static
def usable(*tensors: paddle.Tensor | None) -> bool:
    """Tell whether the compiled operators take these tensors: float32 on the CPU, not empty, outside static graphs.

    Mixed precision needs no case of its own: that of Paddle has no effect on the CPU, and ours leaves tensors float32.
    """
    if not paddle.in_dynamic_mode() or not paddle.get_device().startswith("cpu"):
        return False
    for tensor in tensors:
        if tensor is not None and not (
            tensor.dtype == paddle.float32 and tensor.place.is_cpu_place() and 0 not in tensor.shape
        ):
            return False
    return not isinstance(build.library(), build.Unavailable)


def run(name: str, *arguments: object) -> None:
    """Call an operator on numbers, tensors (contiguous) and None, a null pointer."""
    function = getattr(build.library(), name)
    # By type: Paddle answers isinstance(item, paddle.Tensor) in Python.
    if function(*[item if type(item) in _NO_TENSOR else item.data_ptr() for item in arguments]):
        raise MemoryError(f"The compiled operator {name} found no memory for its sums.")
