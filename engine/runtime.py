"""The machine under a run: threads, device, precision and seeds.

``prepare`` must run before Paddle is imported elsewhere: the thread count and the math library's settings are read
when Paddle's libraries load. This module therefore imports Paddle inside its functions.
"""

from __future__ import annotations

import importlib.metadata
import io
import logging
import os
import platform
import subprocess
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import allocation
from errors import UserError
from utils.paths import ROOT

if TYPE_CHECKING:
    from yacs.config import CfgNode

_PACKAGES = ("opencv-python-headless", "pillow", "safetensors", "scikit-learn", "scipy", "visualdl", "PyYAML", "yacs")


def prepare(threads: int = 0) -> list[str]:
    """Load Paddle with threads (0: its share of the cores) and the AMD setting in its environment.

    What stands in the environment stays, but for OMP_NUM_THREADS where ``threads`` is given. Returns what was set, as
    ``NAME=VALUE``, for the log. Without effect on a process that has loaded Paddle already, but for the memory that it
    keeps from now on (see ``engine/allocation.py``).
    """
    wanted = {"OMP_NUM_THREADS": str(threads or max(available_cores() // processes_here(), 1))}
    if "AuthenticAMD" in _cpu_description():
        # The MKLML in Paddle's wheel takes a slow path on AMD processors otherwise (PaddlePaddle/Paddle#75760).
        wanted["MKL_DEBUG_CPU_TYPE"] = "5"
    if threads:
        os.environ.pop("OMP_NUM_THREADS", None)
    changed = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(changed)
    kept = allocation.keep_freed_memory()
    os.environ.setdefault("GLOG_minloglevel", "2")
    warnings.filterwarnings("ignore", message="No ccache found")
    warnings.filterwarnings("ignore", message="When training, we now always track global mean and variance")
    handlers = list(logging.root.handlers)
    with redirect_stderr(io.StringIO()):  # Paddle warns of every OMP_NUM_THREADS but 1
        import paddle  # noqa: F401
    logging.root.handlers[:] = handlers  # Paddle's own writes to where its warnings went, and so would ours
    return [f"{name}={value}" for name, value in (changed | kept).items()]


def available_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes_here() -> int:
    """Return how many processes a launcher has started on this machine, this one included; 1 without a launcher."""
    host = os.environ.get("PADDLE_CURRENT_ENDPOINT", "").rpartition(":")[0]
    endpoints = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    return max(sum(endpoint.rpartition(":")[0] == host for endpoint in endpoints if endpoint), 1)


def start(config: CfgNode) -> str:
    """Choose device, kernels and determinism for this process; returns the device (``cpu`` or ``gpu:N``).

    Raises UserError where a GPU is asked for and there is none.
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
    return paddle.device.get_device()


def seed_everything(seed: int, *path: int) -> None:
    """Seed Paddle's generators for the point ``path`` of a run, such as an iteration.

    What is random in step n (dropout, drop path) depends on (seed, n) alone, so that resuming needs no luck.
    """
    import numpy as np
    import paddle

    paddle.seed(int(np.random.SeedSequence([seed, *path]).generate_state(1)[0]))


def check_precision(precision: str, level: str = "O1") -> None:
    """Raise UserError where the device chosen by :func:`start` cannot train in this precision, at this level.

    Paddle's CPU operators have no mixed precision; ours have products of bfloat16 where the processor has them.
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
        reason = f"on a CPU the compiled operators do that, and they are not in use ({found['reason']})"
    else:
        reason = "this processor has no instructions for it (AVX512_BF16)"
    raise UserError(f"TRAIN.PRECISION is {precision}, but {reason}; expected float32")


def autocast(precision: str, level: str = "O1") -> AbstractContextManager[Any]:
    """Return the context in which a forward pass of training runs: mixed precision, or nothing for float32.

    On a GPU it is Paddle's, with the weights in float32 at either level; on a CPU :func:`kernels.bfloat16_products`.
    """
    if precision == "float32":
        return nullcontext()
    import paddle

    import kernels

    if paddle.get_device().startswith("cpu"):
        return kernels.bfloat16_products()
    return paddle.amp.auto_cast(level=level, dtype=precision)


def environment(device: str, settings: list[str]) -> dict[str, Any]:
    """Return what a run's ``environment.json`` records: versions, machine, threads, commit, command.

    ``commit`` ends in ``-dirty`` where a tracked file differs from it, and is None where the suite is no git checkout.
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
    if not (root / ".git").exists():  # or git would tell of a repository around an unpacked archive
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
