"""CPU operators for training, compiled from C++, each with Paddle's own operator of the same meaning as a fallback.

Importing this package does no work. Paddle is imported, and the C++ compiled (once, into a cache), when an operator is
first used. Paddle's operators run wherever the compiled ones do not apply: GPUs, dtypes other than float32, static
graphs, machines without a compiler.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from errors import UserError, nearest

MODES = ("auto", "stock")

_MODULES = {
    "attend_map": "multihead_attention", "attend_tokens": "multihead_attention", "attention": "multihead_attention",
    "average_pool": "maps", "batch_norm": "maps", "channel_shuffle": "maps", "channels_first": "maps",
    "channels_last": "maps", "conv2d": "convolution", "convmixer_block": "fused", "dynamic_relu": "maps",
    "feed_forward": "fused", "filter_spectrum": "filter", "gelu": "rows", "group_norm": "maps",
    "inception_mixer": "fused", "layer_norm": "rows", "linear": "rows", "mbconv": "fused", "mean": "rows",
    "pool_mixer": "fused", "product": "rows", "residual": "maps", "self_attention": "multihead_attention",
    "star_relu": "maps",
}
"""Operators and their modules, which are imported at first use."""

__all__ = ["MODES", "bfloat16_products", "configure", "mode", "rounds_to_bfloat16", "status", "using", *_MODULES]

_mode = "auto"
_bfloat16 = False


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    operator = getattr(importlib.import_module(f"kernels.{_MODULES[name]}"), name)
    globals()[name] = operator
    return operator


def configure(mode: str) -> None:
    """Choose the operators: ``auto`` (compiled where they apply) or ``stock`` (Paddle's everywhere).

    Raises:
        UserError: for any other mode.
    """
    global _mode
    if mode not in MODES:
        raise UserError(f"RUNTIME.KERNELS is {mode!r}, expected one of {', '.join(MODES)}{nearest(str(mode), MODES)}.")
    _mode = mode


def mode() -> str:
    """Return the chosen mode."""
    return _mode


@contextmanager
def using(mode: str) -> Iterator[None]:
    """Choose the operators until the end of the block (see :func:`configure`)."""
    before = _mode
    configure(mode)
    try:
        yield
    finally:
        configure(before)


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Use mixed precision on the CPU until the end of the block; backward passes follow their forward pass.

    ``linear``, ``product``, dense ``conv2d`` and attention round their operands to bfloat16 and sum in float32.
    ``feed_forward``, ``inception_mixer``, ``mbconv`` and ``convmixer_block`` keep what is between their steps in
    bfloat16 too. All other operators and the tensors between operators stay float32. ``status()["bfloat16"]`` is
    whether the processor has such products.
    """
    global _bfloat16
    before, _bfloat16 = _bfloat16, True
    try:
        yield
    finally:
        _bfloat16 = before


def rounds_to_bfloat16() -> bool:
    """Return whether this is within :func:`bfloat16_products`."""
    return _bfloat16


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
