"""Big tensors in huge pages: Paddle takes each from the operating system and gives it back, page by page.

A step of ConvMixer-256/8 spends half of its time on that: every tensor above 32 MB is mapped, its pages of 4 KB are
cleared one fault at a time, and unmapped. With pages of 2 MB the same memory costs a fraction; the peak stays as it
is, where keeping freed memory in the process nearly doubled it. The GNU C library reads the setting
(``glibc.malloc.hugetlb``) when a process starts, so a command of the suite replaces itself by itself, once, before it
has done anything: same process number, same arguments.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
SETTING = "glibc.malloc.hugetlb"
_RESTARTED = "PADDLE_HYBRID_RESTARTED"
_COMMANDS = Path(__file__).resolve().parent.parent / "tools"
_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with() -> None:
    """Replace this process by one with huge pages, where they help and nothing can be lost; else return.

    They help where the kernel gives huge pages to those who ask (``madvise``); where it gives them to all or none,
    there is nothing to do, nor where the user has chosen. Only a process that was started to run a file of ``tools/``
    and has loaded nothing heavy begins anew: no notebook, test runner, debugger or script of one's own.
    """
    chosen = os.environ.get(VARIABLE, "")
    if SETTING in chosen or _RESTARTED in os.environ or not (_helpful() and _possible()):
        return
    tunables = ":".join(filter(None, (chosen, f"{SETTING}=1")))
    environment = {**os.environ, VARIABLE: tunables, _RESTARTED: "1"}
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    with suppress(OSError):  # then this process goes on as it is
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def taken() -> dict[str, str]:
    """Return what ``restart_with`` has put into the environment, once: children have not done so themselves."""
    return {VARIABLE: os.environ[VARIABLE]} if os.environ.pop(_RESTARTED, None) else {}


def _helpful() -> bool:
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
        recent = name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
        return recent and "[madvise]" in _SWITCH.read_text(encoding="ascii")
    except (AttributeError, OSError, ValueError):  # another system, or another C library
        return False


def _possible() -> bool:
    main = sys.modules["__main__"]
    if "paddle" in sys.modules or sys.gettrace() or threading.active_count() > 1:
        return False
    spec = getattr(main, "__spec__", None)
    program = spec.name if spec else sys.argv[0]
    if sys.orig_argv[-len(sys.argv):] != [program, *sys.argv[1:]]:
        return False  # another program runs the command's file inside itself
    return Path(getattr(main, "__file__", None) or "/").resolve().parent == _COMMANDS and bool(sys.executable)
