"""The fidelity ladder: every fixture of the references, logits to gradients, with and without compiled operators."""

from __future__ import annotations

import pytest

import kernels
from analysis.parity import REFERENCE, compare, fixture_names

SMALL = [name for name in fixture_names(REFERENCE) if name.endswith(("_32", "_64", "_256_8")) and "768" not in name]
# Those of a small image, and one with gradients for the families whose small fixture has logits alone.
QUICK = [*SMALL, "coatnet_0", "mobileformer_26m", "mobileformer_26m_pvit", "poolformer_s12"]


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                  for name in fixture_names(REFERENCE)])
def test_network_equals_its_reference(name: str) -> None:
    parity = compare(name, REFERENCE)
    print(parity)
    assert not parity.missed


@pytest.mark.parametrize("name", SMALL)
def test_network_equals_its_reference_with_stock_operators(name: str) -> None:
    with kernels.using("stock"):
        parity = compare(name, REFERENCE)
    assert not parity.missed
