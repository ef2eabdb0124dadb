"""CPU operators for training, compiled from C++, each with Paddle's own operator of the same meaning as a fallback.

Importing this package does no work. Paddle is imported, and the C++ compiled (once, into a cache), when an operator is
first used. Paddle's operators run wherever the compiled ones do not apply: GPUs, dtypes other than float32, static
graphs, machines without a compiler.
"""

from __future__ import annotations

import importlib
from typing import Any

from kernels.settings import MODES, bfloat16_products, configure, mode, using

_MODULES = {
    "attend_map": "bridges", "attend_tokens": "bridges", "attention": "multihead_attention", "average_pool": "planes",
    "batch_norm": "batchnorm", "channel_shuffle": "planes", "channels_first": "planes", "channels_last": "planes",
    "conv2d": "convolution", "convmixer_block": "convmixer_block", "dynamic_relu": "planes",
    "feed_forward": "feed_forward", "filter_spectrum": "filter", "gelu": "rows", "group_norm": "maps",
    "inception_mixer": "inception", "layer_norm": "rows", "linear": "rows", "mbconv": "mbconv",
    "pool_difference": "pooling", "pool_mixer": "pooling", "product": "matmul", "residual": "maps",
    "self_attention": "multihead_attention", "star_relu": "maps",
}
"""Operators and their modules, which are imported at first use."""

__all__ = ["MODES", "bfloat16_products", "configure", "mode", "status", "using", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    operator = getattr(importlib.import_module(f"kernels.{_MODULES[name]}"), name)
    globals()[name] = operator
    return operator


def status() -> dict[str, Any]:
    """Describe what runs on the CPU, for the log; compiles the operators in ``auto`` mode.

    Returns:
        ``mode``; ``in_use``; ``reason`` (why not, else None); and of the library in use ``library`` (path),
        ``compiler``, ``flags``, ``threads``, ``products`` (oneDNN or Paddle), ``bfloat16`` (whether
        :func:`bfloat16_products` has an effect) and ``amx`` (whether these products use AMX).
    """
    if mode() == "stock":
        return {"mode": "stock", "in_use": False, "reason": "stock operators were asked for"}
    from kernels import build

    library = build.library()
    if isinstance(library, build.Unavailable):
        return {"mode": mode(), "in_use": False, "reason": library.reason}
    return {"mode": mode(), "in_use": True, "reason": None, **library.about()}
