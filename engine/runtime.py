"""The machine of a run: threads, memory, device, precision and seeds.

``prepare`` must run before Paddle is imported: thread count and math library settings are read when Paddle's libraries
load. This module therefore imports Paddle inside its functions.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import io
import logging
import math
import mmap
import os
import platform
import stat
import subprocess
import sys
import tempfile
import warnings
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from errors import UserError
from utils import ROOT

_PACKAGES = ("opencv-python-headless", "pillow", "safetensors", "scikit-learn", "scipy", "visualdl", "PyYAML", "yacs")
# Environment variables that stop the GNU C library from returning freed memory, and mallopt's numbers of them.
_KEEP_MEMORY = {"MALLOC_MMAP_MAX_": ("0", -4), "MALLOC_TRIM_THRESHOLD_": ("-1", -1)}
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def prepare(threads: int = 0) -> list[str]:
    """Load Paddle with ``threads`` threads (0: this process's part of the cores), and keep freed memory.

    Variables that the user has set stay, except OMP_NUM_THREADS where ``threads`` is given. Returns what was set, as
    ``NAME=VALUE``. In a process that has already loaded Paddle only the memory setting takes effect.
    """
    home = ensure_home()
    settings = {"OMP_NUM_THREADS": str(threads or max(available_cores() // processes_here(), 1))}
    if "AuthenticAMD" in _cpu_description():
        # The MKLML in Paddle's wheel takes a slow path on AMD processors otherwise (PaddlePaddle/Paddle#75760).
        settings["MKL_DEBUG_CPU_TYPE"] = "5"
    if threads:
        os.environ.pop("OMP_NUM_THREADS", None)
    changed = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(changed)
    kept = configure_malloc()
    os.environ.setdefault("GLOG_minloglevel", "2")
    warnings.filterwarnings("ignore", message="No ccache found")
    warnings.filterwarnings("ignore", message="When training, we now always track global mean and variance")
    handlers = list(logging.root.handlers)
    with redirect_stderr(io.StringIO()):  # Paddle warns of every OMP_NUM_THREADS but 1
        import paddle  # noqa: F401
    logging.root.handlers[:] = handlers  # Paddle's own writes to where its warnings went, and so would ours
    return [f"{name}={value}" for name, value in (home | changed | kept).items()]


def ensure_home() -> dict[str, str]:
    """Set HOME to a private folder where it is missing or cannot be written, as in many containers.

    Kernels are cached there, and VisualDL and matplotlib write there when they are imported. Prints a line; returns
    what was set.
    """
    home = os.path.expanduser("~")  # stays "~" without HOME and without an entry in passwd
    if os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK):
        return {}
    folder = Path(tempfile.gettempdir(), f"paddle-hybrid-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise PermissionError
    except OSError:  # somebody else's
        folder = Path(tempfile.mkdtemp(prefix="paddle-hybrid-"))
    print(f"the home folder {home} cannot be written: caches go to {folder}", file=sys.stderr)
    os.environ["HOME"] = str(folder)
    return {"HOME": str(folder)}


def configure_malloc() -> dict[str, str]:
    """Let this process keep memory that it frees, in huge pages; returns environment variables that do the same.

    The GNU C library returns every block above 32 MB to the system at once, so that the pages of big tensors are
    mapped and cleared again and again: half of a training step of ConvMixer-256/8. Peak memory may rise (2.0 GB instead
    of 1.5 for 128 images). Does nothing where the environment configures malloc already or the C library is another.
    """
    chosen = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
    if any(name in os.environ for name in chosen) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return {}
    try:
        if not os.confstr("CS_GNU_LIBC_VERSION"):
            return {}
        libc = ctypes.CDLL(None)
        settings = {name: value for name, (value, number) in _KEEP_MEMORY.items() if libc.mallopt(number, int(value))}
    except (AttributeError, OSError, ValueError):
        return {}
    if settings.keys() == _KEEP_MEMORY.keys() and _reserve_huge_pages(libc):
        settings |= _HUGE_PAGES
    return settings


def _reserve_huge_pages(libc: ctypes.CDLL) -> bool:
    """Ask for pages of 2 MB where malloc will take memory: as many addresses as half of the machine's memory.

    They are taken and freed once. Returns whether it was done: only where the kernel gives huge pages on request and
    addresses are not limited. The tunable glibc.malloc.hugetlb does the same, but is read only when a process starts.
    In a virtual machine whose memory was slow, pages of 4 KB made a training step up to three times as long. While its
    memory was fast they made no difference, and the first use of 600 MB took up to 2 s longer in huge pages.
    """
    try:
        on_request = "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (OSError, ValueError):
        return False
    import resource  # not on every system

    limits = (resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if not on_request or any(limit != resource.RLIM_INFINITY for limit in limits):
        return False
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(half)  # addresses only: nothing is touched, so that no memory is taken
    if not block:
        return False
    start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
    refused = libc.madvise(start, block + half - start, mmap.MADV_HUGEPAGE)
    libc.free(block)
    return not refused


def available_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_quota())))


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Return the smallest quota of processors of this process's control groups, versions 1 and 2; inf without one."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    quotas = [math.inf]
    for line in ["0::/", *lines]:  # number:controllers:group; version 2 has no controllers
        controllers, _, group = line.partition(":")[2].partition(":")
        if not controllers or "cpu" in controllers.split(","):
            folder = root / controllers / group.lstrip("/")
            quotas += [_quota_of(each) for each in (folder, *folder.parents) if each.is_relative_to(root / controllers)]
    return min(quotas)


def _quota_of(folder: Path) -> float:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # no quota: "max", -1, or no such file
        return math.inf


def launched_processes() -> int:
    """Return the number of processes that a launcher started for this job; 1 without a launcher."""
    text = os.environ.get("PADDLE_TRAINERS_NUM") or "1"
    if not text.isdecimal():
        raise UserError(f"PADDLE_TRAINERS_NUM is {text!r}, expected the number of processes: unset it, or start them "
                        "with python -m paddle.distributed.launch")
    return int(text)


def processes_here() -> int:
    """Return the number of processes that a launcher started on this machine; 1 without a launcher."""
    host = os.environ.get("PADDLE_CURRENT_ENDPOINT", "").rpartition(":")[0]
    endpoints = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    return max(sum(endpoint.rpartition(":")[0] == host for endpoint in endpoints if endpoint), 1)


def start(config: CfgNode) -> str:
    """Set device, kernels and determinism; returns the device (``cpu`` or ``gpu:N``).

    Raises UserError for a missing GPU, and where the device cannot evaluate in RUNTIME.EVAL_PRECISION.
    """
    import paddle

    import kernels

    runtime = config.RUNTIME
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    device = runtime.DEVICE
    if device == "auto":
        device = "gpu" if gpus else "cpu"
    number = int(device.partition(":")[2] or 0)
    if device.startswith("gpu") and number >= gpus:
        build = "" if paddle.is_compiled_with_cuda() else " (this is the CPU build of Paddle; README.md has the GPU's)"
        raise UserError(f"RUNTIME.DEVICE is {runtime.DEVICE}, found {gpus} GPUs{build}; expected cpu or auto")
    if runtime.DETERMINISTIC:
        paddle.set_flags({"FLAGS_cudnn_deterministic": True} if gpus else {})
    kernels.configure(runtime.KERNELS)
    paddle.device.set_device(device)
    check_precision(runtime.EVAL_PRECISION, key="RUNTIME.EVAL_PRECISION")
    return paddle.device.get_device()


def seed_everything(seed: int, *path: int) -> None:
    """Seed Paddle's generators from seed and path, such as (seed, step), so that a resumed run is bit-identical."""
    import numpy as np
    import paddle

    paddle.seed(int(np.random.SeedSequence([seed, *path]).generate_state(1)[0]))


def choose_precision(precision: str, recorded: str = "") -> str:
    """Return a TRAIN.PRECISION with ``auto`` resolved: bfloat16 where the device multiplies it fast, else float32.

    ``recorded`` is the precision of the run that is resumed; float32 is kept.
    """
    if precision != "auto":
        return precision
    import paddle

    import kernels

    on_cpu = paddle.get_device().startswith("cpu")
    fast = kernels.status().get("bfloat16") if on_cpu else paddle.amp.is_bfloat16_supported()
    return "bfloat16" if fast and recorded != "float32" else "float32"


def check_precision(precision: str, level: str = "O1", key: str = "TRAIN.PRECISION") -> None:
    """Raise UserError where the device set by :func:`start` cannot compute in this (resolved) precision and AMP level.

    Paddle's CPU operators have no mixed precision; ours multiply bfloat16 where the processor does.
    """
    import paddle

    import kernels

    if precision == "float32" and level != "O1":
        raise UserError(f"TRAIN.AMP_LEVEL is {level}, but TRAIN.PRECISION is float32; expected bfloat16 or float16")
    if precision == "float32" or not paddle.get_device().startswith("cpu"):
        return
    if level != "O1":
        raise UserError(f"TRAIN.AMP_LEVEL is {level}, but levels are a GPU's; expected O1 on a CPU")
    found = kernels.status()
    if precision == "bfloat16" and found.get("bfloat16"):
        return
    if precision == "float16":
        reason = "a CPU trains in float32 or bfloat16"
    elif not found["in_use"]:
        reason = f"on a CPU this needs the compiled operators, and they are not in use ({found['reason']})"
    else:
        reason = "this processor has no instructions for it (AVX512_BF16)"
    raise UserError(f"{key} is {precision}, but {reason}; expected float32{' or auto' * key.startswith('TRAIN')}")


def autocast(precision: str, level: str = "O1") -> AbstractContextManager[Any]:
    """Return the context for a forward pass in a resolved precision; weights stay float32 at either level."""
    if precision == "float32":
        return nullcontext()
    import paddle

    import kernels

    if paddle.get_device().startswith("cpu"):
        return kernels.bfloat16_products()
    return paddle.amp.auto_cast(level=level, dtype=precision)


def environment(device: str, settings: list[str]) -> dict[str, Any]:
    """Return the contents of ``environment.json``: versions, machine, threads, commit, command.

    ``commit`` ends in ``-dirty`` where a tracked file differs from it, and is None outside a git checkout.
    """
    import numpy as np
    import paddle

    import kernels

    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _git_commit(ROOT),
        "python": platform.python_version(),
        "paddle": paddle.__version__,
        "numpy": np.__version__,
        "packages": {name: _version(name) for name in _PACKAGES},
        "system": platform.platform(),
        "processor": _cpu_description(),
        "cores": available_cores(),
        "device": device,
        "gpu": paddle.device.cuda.get_device_name() if device.startswith("gpu") else None,
        "kernels": kernels.status() if device == "cpu" else None,
        "kernels_in_use": device == "cpu" and kernels.status()["in_use"],
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "set_by_the_suite": settings,
    }


def _cpu_description() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    return f"{found.get('vendor_id', '')} {found.get('model name', '')}".strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit(root: Path) -> str | None:
    if not (root / ".git").exists():  # or git would find a repository around an unpacked archive
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
