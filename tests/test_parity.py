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
    assert parity.parameters == parity.reference_parameters
    assert parity.logits_float32 < 1e-4
    assert parity.logits_float64 < 1e-8
    if parity.loss is not None:
        assert parity.train_logits < 1e-6
        assert parity.loss < 1e-6
        assert parity.gradients < 1e-6
        assert parity.running_stats is None or parity.running_stats < 1e-6
