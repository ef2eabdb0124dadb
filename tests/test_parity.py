"""The fidelity ladder: every fixture of the references, logits to gradients, with and without compiled operators."""

import pytest

import kernels
from analysis.parity import REFERENCE, compare, fixture_names

SMALL = [name for name in fixture_names(REFERENCE) if name.endswith(("_32", "_64", "_256_8")) and "768" not in name]
# Those of a small image, and one with gradients for the families whose small fixture has logits alone.
QUICK = [*SMALL, "coatnet_0", "mobileformer_26m", "mobileformer_26m_pvit", "poolformer_s12"]


@pytest.mark.parametrize(("name", "mode"), [
    *(pytest.param(name, "auto", marks=[] if name in QUICK else pytest.mark.slow) for name in fixture_names(REFERENCE)),
    *((name, "stock") for name in SMALL)])
def test_network_equals_its_reference(name: str, mode: str) -> None:
    with kernels.using(mode):
        assert not compare(name, REFERENCE).missed
