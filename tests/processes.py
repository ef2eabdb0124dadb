"""Run the suite's commands as a user would: real processes, real exit codes."""

from __future__ import annotations

import importlib
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

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
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _command(name: str, arguments: Sequence[str | Path]) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
