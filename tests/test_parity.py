"""The fidelity ladder: every fixture of the references, logits to gradients."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.parity import compare, fixture_names

REFERENCE = Path(__file__).parent / "reference"


@pytest.mark.parametrize("name", fixture_names(REFERENCE))
def test_network_equals_its_reference(name: str) -> None:
    parity = compare(name, REFERENCE)
    print(parity)
    assert not parity.missed
