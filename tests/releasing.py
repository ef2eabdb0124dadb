"""Two real runs that differ in their seeds, and a copy of the suite in which one of them is released."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import load_config
from engine.train import train
from processes import ROOT, TINY

PARTS = ("analysis", "configs", "datasets", "engine", "kernels", "models", "tools", "utils", "errors.py")


def two_runs(output: Path) -> list[Path]:
    """Train a tiny network twice in this process; returns the runs' folders."""
    config = f"{ROOT}/configs/quickstart.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tools/train.py", "-c", config, "-o", f"OUTPUT={output}"])
        for seed in (42, 43):
            own = [f"OUTPUT={output}", "TRAIN.EPOCHS=2", f"NAME=seed{seed}", f"RUNTIME.SEED={seed}"]
            train(load_config(config, [*TINY, *own]))
    return [output / "seed42", output / "seed43"]


def copy_with_release(copy: Path, runs: list[Path]) -> Path:
    """Copy the suite's files, and release the first run there as ``toy``, with the seeds of both."""
    for part in PARTS:
        source = ROOT / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / part)
    done = run_in(copy, "release", str(runs[0]), "--name", "toy", "--seeds", str(runs[1]))
    assert done.returncode == 0, done.stderr
    assert "# Result: " in done.stdout and "top-1 on digits (checkpoints/toy)." in done.stdout
    return copy


def run_in(suite: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``tools/<name>.py`` of a copy of the suite to its end."""
    return subprocess.run([sys.executable, f"tools/{name}.py", *arguments], cwd=suite, capture_output=True, text=True,
                          timeout=300, check=False, env={**os.environ})
