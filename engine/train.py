"""One training run from its config to its folder, as `tools/train.py` and a notebook's cell both call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from engine import distributed, runtime
from engine.interrupts import Interrupted
from engine.run import RunFolder, log, run_folder
from engine.trainer import Trainer

FolderHook = Callable[[Path], Any]


def train(config: CfgNode, *, resume: bool = False, overwrite: bool = False, weights: str = "",
          folder: Path | None = None, settings: Sequence[str] = (), after_epoch: FolderHook = lambda folder: None,
          at_end: FolderHook = lambda folder: None) -> dict[str, Any]:
    """Train the run of a config; returns what its ``results.json`` holds.

    ``folder`` is where the run stands if not in ``OUTPUT/NAME``; ``weights`` names a file to start from; ``settings``
    are what ``runtime.prepare`` returned, for the record. ``after_epoch`` and ``at_end`` are called in the process
    that writes, with the run's folder. Raises Interrupted when a signal (in a notebook: its stop button) has ended
    the run after saving, and UserError for what the user can mend.
    """
    run = RunFolder(folder) if folder else run_folder(config)
    results: dict[str, Any] = {}
    stopped: Interrupted | None = None
    with distributed.process_group(config):
        device = distributed.on_all_processes(lambda: _start(config))
        distributed.on_main_process(lambda: run.open(config, resume=resume, overwrite=overwrite))
        try:
            if distributed.is_main():
                run.record_environment({**runtime.environment(device, list(settings)),
                                        "processes": distributed.world_size()}, resume=resume)
            log.info("device %s; set in the environment: %s; processes: %d", device, ", ".join(settings) or "nothing",
                     distributed.world_size())
            results = Trainer(config, run, resume=resume, weights=weights).fit(after_epoch)
            if distributed.is_main():
                at_end(run.path)
            log.info("wrote %s", run.path)
        except Interrupted as interrupted:  # no failure: the processes part as after a run's end
            stopped = interrupted
        finally:
            run.close()
    if stopped:
        raise stopped
    return results


def _start(config: CfgNode) -> str:
    device = runtime.start(config)
    runtime.check_precision(config.TRAIN.PRECISION, config.TRAIN.AMP_LEVEL)
    return device
