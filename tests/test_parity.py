"""The fidelity ladder: every fixture of the references, logits to gradients, with and without compiled operators."""

from __future__ import annotations

import pytest

import kernels
from analysis.parity import REFERENCE, compare, fixture_names


@pytest.mark.parametrize("name", fixture_names(REFERENCE))
def test_network_equals_its_reference(name: str) -> None:
    parity = compare(name, REFERENCE)
    print(parity)
    assert not parity.missed


@pytest.mark.parametrize("name", [name for name in fixture_names(REFERENCE) if "32" in name or "64" in name])
def test_network_equals_its_reference_with_stock_operators(name: str) -> None:
    with kernels.using("stock"):
        parity = compare(name, REFERENCE)
    assert not parity.missed
