"""Run the suite as a user would: commands in real processes with real exit codes, and small trainings in this one."""

import importlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from yacs.config import CfgNode

from configs.load import load_config
from engine.evaluate import Evaluation
from engine.state import Step, TrainingState
from engine.train import train
from tools import cli

ROOT = Path(__file__).parent.parent
# An iFormer of 26 thousand parameters: trains some hundred digits a second on any machine.
TINY = ["MODEL.ARGS.depths=[1, 1, 1, 1]", "MODEL.ARGS.embed_dims=[8, 16, 16, 32]", "MODEL.ARGS.num_heads=[2, 2, 2, 2]",
        "MODEL.ARGS.attention_heads=[1, 1, 1, 1]"]


def tool(name: str, *arguments: str | Path, code: int = 0, cwd: Path = ROOT, timeout: float = 300,
         **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``tools/<name>.py`` to its end, which must be that of an exit code; with one sentence for 2."""
    done = subprocess.run(_command(name, arguments), cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, **environment}, check=False)
    return _ended(done, code)


def python(code: str, *arguments: str | Path, cwd: Path = ROOT, timeout: float | None = 300) -> str:
    """Return what a program prints, run in a process that knows nothing of this one's imports."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr + done.stdout[-3000:]
    return done.stdout


def command(name: str, *arguments: object) -> str:
    """Return what ``tools/<name>.py`` prints, run in this process; its UserErrors are raised."""
    module, out = importlib.import_module(f"tools.{name}"), io.StringIO()
    with redirect_stdout(out):
        module.main(module.parser().parse_args(list(map(str, arguments))))
    return out.getvalue()


def call(name: str, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Do as :func:`tool` in this process, without the seconds that a new one takes to start."""
    module = importlib.import_module(f"tools.{name}")
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.run(module.main, module.parser(), list(map(str, arguments)))
        except SystemExit as end:
            return _ended(subprocess.CompletedProcess([name], end.code, out.getvalue(), err.getvalue()), code)


def _ended(done: subprocess.CompletedProcess[str], code: int) -> subprocess.CompletedProcess[str]:
    assert done.returncode == code, f"{done.args}\n{done.stderr}"
    assert code != 2 or len(done.stderr.splitlines()) == 1, done.stderr
    return done


def start_tool(name: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start ``tools/<name>.py``, its two outputs in one pipe."""
    return subprocess.Popen(_command(name, arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)


def overrides(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("-o", pair)]


def tiny_run(output: Path, *pairs: str) -> list[str]:
    """Return arguments of a small training on the digits into ``output``."""
    return ["-c", "configs/quickstart.yaml", *overrides(*TINY, f"OUTPUT={output}", *pairs)]


def wait(condition: Callable[[], Any], process: subprocess.Popen | None = None, seconds: float = 120) -> Any:
    """Return what ``condition`` returns as soon as that is true; fails when the process ends before."""
    deadline, last = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        try:
            if found := condition():
                return found
        except Exception as error:  # not there yet
            last = error
        assert process is None or process.poll() is None, process.stdout and process.communicate()[0]
        time.sleep(0.02)
    if process:
        process.kill()
    raise AssertionError(f"nothing after {seconds} s: {last}")


def wait_for(process: subprocess.Popen[str], file: Path, text: str) -> None:
    """Wait until ``text`` is in ``file``; fails when the process ends before."""
    wait(lambda: text in file.read_text(encoding="utf-8"), process)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _command(name: str, arguments: Sequence[str | Path]) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]


def tiny(output: Path, *pairs: str) -> CfgNode:
    """Return the config of a tiny network on 490 digits (19 steps of 25), with its run in ``output``."""
    return load_config("configs/quickstart.yaml", [
        *TINY, f"OUTPUT={output}", "DATA.WORKERS=0", "DATA.MAX_IMAGES=490", "DATA.BATCH_SIZE=25", *pairs])


def trained(output: Path, *pairs: str, **options: Any) -> dict[str, Any]:
    return train(tiny(output, *pairs), **options)


def signal_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let SIGTERM come after the step of this number (from 1)."""
    def stopped(original: Callable[..., Step], self: TrainingState, *arguments: Any) -> Step:
        taken = original(self, *arguments)
        if self.progress.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken

    _wrap(patch, "step", stopped)


def poison(patch: pytest.MonkeyPatch, *steps: int) -> None:
    """Put a NaN pixel into the images of these global steps (from 0)."""
    def poisoned(original: Callable[..., Step], self: TrainingState, images: np.ndarray, labels: np.ndarray, step: int,
                 *rest: Any) -> Step:
        if step in steps:
            images = images.copy()
            images[0, 0, 0, 0] = np.nan
        return original(self, images, labels, step, *rest)

    _wrap(patch, "step", poisoned)


def never_right(patch: pytest.MonkeyPatch, after: int) -> None:
    """Make evaluations during training wrong for every image after global step ``after``: no later epoch is best."""
    def wrong(original: Callable[..., Evaluation], self: TrainingState, *arguments: Any) -> Evaluation:
        found = original(self, *arguments)
        return replace(found, logits=-np.eye(10)[found.labels]) if self.progress.global_step > after else found

    _wrap(patch, "evaluate", wrong)


def _wrap(patch: pytest.MonkeyPatch, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(TrainingState, name)
    patch.setattr(TrainingState, name, lambda self, *arguments: wrapper(original, self, *arguments))
