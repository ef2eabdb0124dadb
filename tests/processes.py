"""Run the suite's commands as a user would: real processes, real exit codes."""

from __future__ import annotations

import importlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from tools import cli

ROOT = Path(__file__).parent.parent
# An iFormer of 26 thousand parameters: trains some hundred digits a second on any machine.
TINY = ["MODEL.ARGS.depths=[1, 1, 1, 1]", "MODEL.ARGS.embed_dims=[8, 16, 16, 32]", "MODEL.ARGS.num_heads=[2, 2, 2, 2]",
        "MODEL.ARGS.attention_heads=[1, 1, 1, 1]"]


def tool(name: str, *arguments: str | Path, cwd: Path = ROOT, timeout: float = 300,
         **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``tools/<name>.py`` to its end."""
    return subprocess.run(_command(name, arguments), cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, **environment}, check=False)


def call(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``tools/<name>.py`` to its end in this process, without the seconds that a new one takes to start."""
    module = importlib.import_module(f"tools.{name}")
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.run(module.main, module.parser(), list(map(str, arguments)))
        except SystemExit as end:
            return subprocess.CompletedProcess([name], end.code, out.getvalue(), err.getvalue())


def start_tool(name: str, *arguments: str | Path, cwd: Path = ROOT) -> subprocess.Popen[str]:
    """Start ``tools/<name>.py``, its two outputs in one pipe."""
    return subprocess.Popen(_command(name, arguments), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)


def overrides(*pairs: str) -> list[str]:
    """Return ``-o KEY=VALUE`` for each pair."""
    return [word for pair in pairs for word in ("-o", pair)]


def tiny_run(output: Path, *pairs: str) -> list[str]:
    """Return arguments of a small training on the digits into ``output``."""
    return ["-c", "configs/quickstart.yaml", *overrides(*TINY, f"OUTPUT={output}", *pairs)]


def wait_for(process: subprocess.Popen[str], file: Path, text: str, seconds: float = 120) -> None:
    """Wait until ``text`` is in ``file``; fails when the process ends before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if file.exists() and text in file.read_text(encoding="utf-8"):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    raise AssertionError(f"{text!r} did not appear in {file}")


def _command(name: str, arguments: Sequence[str | Path]) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
