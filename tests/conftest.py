"""What all tests share: Paddle with its threads set, and where the real CIFAR-10 stands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine import runtime

runtime.prepare()


@pytest.fixture(scope="session")
def cifar10_root() -> str:
    """Return the folder or archive named by CIFAR10_ROOT; skip where there is none."""
    root = os.environ.get("CIFAR10_ROOT", "")
    if not root or not Path(root).exists():
        pytest.skip("CIFAR10_ROOT does not name a folder with cifar-10-python.tar.gz")
    return root


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the folders of two short runs that differ in their seeds."""
    from releasing import two_runs

    return two_runs(tmp_path_factory.mktemp("private-folder"))


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory, runs: list[Path]) -> Path:
    """Return a copy of the suite in which the first of them is released as ``toy``."""
    from releasing import copy_with_release

    return copy_with_release(tmp_path_factory.mktemp("clone"), runs)
