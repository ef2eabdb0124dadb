"""Small trainings inside the test's own process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.load import load_config
from engine.run import run_folder
from engine.trainer import Trainer
from processes import TINY


@contextmanager
def opened(output: Path, *pairs: str, resume: bool = False) -> Iterator[Trainer]:
    """Open a run of a tiny network on the digits in ``output``, for the length of a ``with`` block."""
    config = load_config("configs/quickstart.yaml", [*TINY, f"OUTPUT={output}", "DATA.WORKERS=0", *pairs])
    run = run_folder(config)
    run.open(config, resume=resume, overwrite=False)
    try:
        yield Trainer(config, run, resume=resume)
    finally:
        run.close()


def trained(output: Path, *pairs: str, resume: bool = False) -> dict[str, Any]:
    """Train such a run to its end; returns its results."""
    with opened(output, *pairs, resume=resume) as trainer:
        return trainer.fit()
