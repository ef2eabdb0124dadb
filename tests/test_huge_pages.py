"""A command begins anew with huge pages, once, and nothing else about it changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from engine import huge_pages
from processes import ROOT

# A command that tells what it became, without loading Paddle.
COMMAND = """
import json, os, signal, sys
sys.path.insert(0, {root!r})
from engine import huge_pages
seen = os.environ.get("SEEN", "")
os.environ["SEEN"] = seen + "x"
if seen == "x" and "wait" in sys.argv:
    print("again", flush=True)
    signal.pause()
{loaded}
huge_pages.restart_with()
print(json.dumps([os.getpid(), sys.argv, os.environ.get("GLIBC_TUNABLES"), os.environ["SEEN"], huge_pages.taken(),
                  huge_pages.taken(), sys.stdin.read()]))
sys.exit(7)
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A command in a folder of commands of its own, beside which the module looks."""
    def write(loaded: str = "") -> Path:
        path = tmp_path / "tools" / "a command.py"
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        told = f"huge_pages._COMMANDS = huge_pages.Path({str(path.parent)!r})\nhuge_pages._helpful = lambda: True\n"
        path.write_text(COMMAND.format(root=str(ROOT), loaded=told + loaded))
        (path.parent / "plain.py").write_text(path.read_text())
        return path
    for name in (huge_pages.VARIABLE, huge_pages._RESTARTED):
        monkeypatch.delenv(name, raising=False)
    return write


def told(*words: str | Path, cwd: Path = ROOT, **environment: str) -> tuple[int, list]:
    """Run Python on these words; returns its process number and what the command printed."""
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd, stdin=subprocess.PIPE, text=True,
                               stdout=subprocess.PIPE, env={**os.environ, **environment})
    out, _ = process.communicate("input\n", timeout=60)
    assert process.returncode == 7
    return process.pid, json.loads(out)


def test_a_command_begins_anew_once(command):
    path = command()
    pid, found = told("-X", "utf8", path, "--name", "a b", "")
    tunables = "glibc.malloc.hugetlb=1"
    arguments = [str(path), "--name", "a b", ""]
    assert found == [pid, arguments, tunables, "xx", {"GLIBC_TUNABLES": tunables}, {}, "input\n"]
    assert told("-m", "tools.plain", cwd=path.parent.parent)[1][2:4] == [tunables, "xx"]


def test_what_the_user_has_set_stays(command):
    other = "glibc.malloc.check=0"
    assert told(command(), GLIBC_TUNABLES=other)[1][2:4] == [f"{other}:glibc.malloc.hugetlb=1", "xx"]
    off = "glibc.malloc.hugetlb=0"
    assert told(command(), GLIBC_TUNABLES=off)[1][2:5] == [off, "x", {}]


def test_nothing_begins_anew_where_something_could_be_lost(command, tmp_path):
    path = command()
    inside = f"import runpy, sys; sys.argv = [{str(path)!r}]; runpy.run_path({str(path)!r}, run_name='__main__')"
    assert told("-c", inside)[1][3] == "x"
    own = tmp_path / "own.py"
    own.write_text(path.read_text())
    assert told(own)[1][3] == "x"
    for loaded in ("sys.modules['paddle'] = sys", "sys.settrace(lambda *event: None)",
                   "import threading; threading.Thread(target=signal.pause, daemon=True).start()",
                   "huge_pages._helpful = lambda: False"):
        assert told(command(loaded))[1][3] == "x"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_process_that_was_started(command, number):
    process = subprocess.Popen([sys.executable, str(command()), "wait"], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert process.stdout.readline() == "again\n"
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == -number


@pytest.mark.skipif(not huge_pages._helpful(), reason="this kernel gives huge pages to all or to none")
def test_a_real_command_has_huge_pages():
    environment = {name: value for name, value in os.environ.items() if name != huge_pages.VARIABLE}
    command = [sys.executable, "tools/convert.py", "poolformer_s12", "none", "none.pdparams"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen = ""
    while process.poll() is None and "hugetlb" not in seen:
        with suppress(OSError):
            seen = Path(f"/proc/{process.pid}/environ").read_text()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert "glibc.malloc.hugetlb=1" in seen
