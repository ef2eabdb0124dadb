"""Compiles the C++ operators once into a cache and loads them.

A library is kept at ``<cache>/kernels/<key>/kernels-<sha256 of the file>.so``. The key holds everything that
the machine code depends on; the name tells whether the file is whole, so that a truncated or altered one is
built again. Files appear by renaming, hence several processes may build at once; a lock only spares them the
double work. Whatever goes wrong is a reason to use Paddle's operators, never an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paddle
from paddle.base import core

FOLDER = Path(__file__).parent
SOURCES = tuple(sorted(FOLDER.glob("*.cc")))
HEADERS = tuple(sorted(FOLDER.glob("*.h")))
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp")
OWN_FLAGS = {
    "augment.cc": ("-ffp-contract=off",),  # its last bits are those of cv2 and numpy
    "optimizer.cc": ("-ffp-contract=off", "-fno-math-errno"),  # and Paddle's; a root sets no errno
}
COMPILERS = ("g++", "c++", "clang++")
TIMEOUT_SECONDS = 180

log = logging.getLogger("suite")

_lock = threading.Lock()
_library: Library | Unavailable | None = None


@dataclass(frozen=True)
class Unavailable:
    """There is no compiled library, and why."""

    reason: str


class Library:
    """The compiled operators, loaded; each is registered with Paddle at its first use."""

    def __init__(self, path: Path, compiler: str) -> None:
        self.path = path
        self.compiler = compiler
        self.handle = ctypes.CDLL(str(path))
        self.lanes: int = self.handle.vector_lanes()
        self.onednn = bool(self.handle.has_onednn())  # whether Paddle's wheel carries that library
        self.bfloat16 = bool(self.handle.has_bfloat16())  # whether the processor multiplies such numbers
        self.arguments: dict[str, int] = {}  # numbers of arguments of the operators in use

    def register(self, name: str) -> int:
        """Register an operator with Paddle and return how many arguments it has."""
        with _lock:
            self.arguments[name] = self.handle[f"register_{name}"]()
            with contextlib.suppress(AttributeError):
                self.handle[f"register_{name}_gradient"]()
            core.load_op_meta_info_and_register_op(str(self.path))
        return self.arguments[name]

    def about(self) -> dict[str, Any]:
        """Return path, compiler, flags, threads and the library of matrix products for the log."""
        return {
            "library": str(self.path),
            "compiler": self.compiler,
            "flags": " ".join(FLAGS),
            "threads": self.handle.openmp_threads(),
            "products": "oneDNN" if self.onednn else "Paddle",
            "bfloat16": self.bfloat16,
            "amx": bool(self.handle.has_amx()),
        }


def library() -> Library | Unavailable:
    """Return the operators, compiled and loaded at the first call; or why there are none."""
    global _library
    if _library is None:
        with _lock:
            if _library is None:
                try:
                    _library = _load()
                except Exception as error:  # whatever it is, training goes on with Paddle's operators
                    _library = Unavailable(f"{type(error).__name__}: {error}")
                if isinstance(_library, Unavailable):
                    log.warning("Paddle's stock operators are used, which are slower: %s", _library.reason)
    return _library


def _load() -> Library | Unavailable:
    if not sys.platform.startswith("linux"):
        return Unavailable(f"the compiled operators are made for Linux, not {sys.platform}")
    compiler = _compiler()
    if compiler is None:
        return Unavailable(f"no C++ compiler found (looked for CXX, {', '.join(COMPILERS)})")
    version = _call([*compiler, "--version"]).splitlines()[0]
    folder = cache_folder() / _key(version, compiler)
    try:
        path = _cached(folder) or _build_once(folder, compiler)
    except OSError as error:  # a read-only or full cache: build for this process alone
        log.warning("%s cannot be written (%s): operators are compiled for this process alone", folder, error.strerror)
        with tempfile.TemporaryDirectory(prefix="paddle-hybrid-") as private:
            return Library(_build(Path(private), compiler), version)
    return Library(path, version)


def cache_folder() -> Path:
    """Return the folder of all compiled operators: below PADDLE_HYBRID_CACHE or the user's cache folder."""
    own = os.environ.get("PADDLE_HYBRID_CACHE")
    if own:
        return Path(own).expanduser() / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paddle-hybrid" / "kernels"


def _compiler() -> list[str] | None:
    asked = os.environ.get("CXX")
    for candidate in ([asked] if asked else []) + list(COMPILERS):
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    return None


def _compile_flags() -> list[str]:
    """Return where Paddle's headers are, and what its wheel carries."""
    include = Path(paddle.sysconfig.get_include())
    onednn = ["-DHYBRID_ONEDNN"] if any(path.name.startswith("libdnnl") for path in _libraries()) else []
    amx = ["-DMAY_USE_AMX"] if _may_use_amx() else []
    return [*FLAGS, *onednn, *amx, "-isystem", str(include), "-isystem", str(include / "third_party")]


def _may_use_amx() -> bool:
    """Ask Linux for the registers of AMX, as each process has to; the processor or a sandbox may refuse."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return platform.machine() == "x86_64" and not ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data)


def _libraries() -> list[Path]:
    """Return what to link of Paddle's wheel: Paddle, oneDNN 3, whose interface ``onednn.h`` declares, and OpenMP.

    A second OpenMP runtime would keep a second team of threads, and the idle team spins on the cores of the other.
    """
    root = Path(paddle.__file__).parent
    names = ("base/libpaddle.so", "libs/libphi*.so", "libs/libcommon.so", "libs/libdnnl.so.3", "libs/libiomp5.so")
    return [path for name in names for path in sorted(root.glob(name))]


def _link_flags() -> list[str]:
    """Return flags with which a missing symbol is an error here rather than the end of the process at a call."""
    libraries = _libraries()
    openmp = [] if any(path.name == "libiomp5.so" for path in libraries) else ["-fopenmp"]
    folders = [f"-Wl,-rpath,{folder}" for folder in sorted({str(path.parent) for path in libraries})]
    return ["-shared", "-Wl,-z,defs", "-Wl,-z,now", *map(str, libraries), *openmp, *folders]


def _key(version: str, compiler: list[str]) -> str:
    code = [path.read_bytes() for path in (*SOURCES, *HEADERS)]
    facts = [code, version, compiler, _compile_flags(), OWN_FLAGS, _link_flags(), paddle.__version__, _processor()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def _processor() -> list[str]:
    """Return what ``-march=native`` looks at."""
    lines = [platform.machine()]
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if not line.strip():
                break  # the other cores are the same
            if line.split(":")[0].strip() in {"model name", "cpu family", "model", "flags", "Features", "CPU part"}:
                lines.append(line)
    return lines


def _cached(folder: Path) -> Path | None:
    """Return the library in a cache folder whose content is what its name says."""
    return next((path for path in sorted(folder.glob(_name("*"))) if path.name == _name(_digest(path))), None)


def _name(digest: str) -> str:
    return f"kernels-{digest}.so"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _build_once(folder: Path, compiler: list[str]) -> Path:
    """Build into the cache, one process at a time, unless another has done so meanwhile."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        with contextlib.suppress(OSError):  # some network file systems have no locks; then two may build
            fcntl.flock(lock, fcntl.LOCK_EX)
        path = _cached(folder)
        if path is None:
            for broken in folder.glob(_name("*")):
                broken.unlink()
            path = _build(folder, compiler)
    return path


def _build(folder: Path, compiler: list[str]) -> Path:
    log.info("compiling CPU operators, once for this version of Paddle: about half a minute")
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as private:
        made = Path(private, "kernels.so")
        objects = [str(Path(private, source.stem + ".o")) for source in SOURCES]
        commands = [[*compiler, *_compile_flags(), *OWN_FLAGS.get(source.name, ()), "-c", str(source), "-o", target]
                    for source, target in zip(SOURCES, objects, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_call, commands))
        _call([*compiler, *objects, *_link_flags(), "-o", str(made)])
        with made.open("rb") as file:
            os.fsync(file.fileno())
        path = folder / _name(_digest(made))
        os.replace(made, path)
    return path


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{shlex.join(command)} failed: {next((x for x in lines if 'error' in x), lines[0])}")
    return done.stdout
