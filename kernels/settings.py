"""Which operators run, and in which precision; no Paddle here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from errors import UserError, nearest

MODES = ("auto", "stock")

_mode = "auto"
_bfloat16 = False


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
