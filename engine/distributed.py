"""Several processes training as one: what each takes of a batch, and how their results become one.

A launcher starts the processes (docs/TRAINING.md); each holds the whole network and a share of every batch. A run of
one process goes through the same functions, which then do nothing.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import paddle
from yacs.config import CfgNode

from configs.load import flatten
from engine import control
from engine.checkpoint import Checkpoint
from errors import UserError

log = logging.getLogger("suite")
Result = TypeVar("Result")
_line: control.Line | None = None  # none: this process is the only one
_size = 1


def rank() -> int:
    """Return the number of this process; 0 is the one that writes."""
    return _line.rank if _line else 0


def world_size() -> int:
    """Return the number of processes of this run."""
    return _size


def is_main() -> bool:
    """Tell whether this process is the one that writes."""
    return rank() == 0


@contextmanager
def process_group(config: CfgNode) -> Iterator[None]:
    """Make this process one of those that a launcher started together, for the length of a ``with`` block.

    An error in one process ends all of them: it is told once, by process 0. Raises UserError where they differ in
    their configs or the device cannot be had.
    """
    global _line, _size
    size = int(os.environ.get("PADDLE_TRAINERS_NUM") or 1)
    if size < 2:
        yield
        return
    _choose_backend(config)
    with redirect_stderr(io.StringIO()):  # Paddle lists its changed flags
        paddle.distributed.init_parallel_env()
    number = paddle.distributed.get_rank()
    line = control.Line(number, _connections(number, size), _tell)
    _line, _size = line, size
    if number:
        log.addHandler(logging.NullHandler())
        log.propagate = False
    code, failure = 1, ""
    try:
        _compare(config)
        yield
        code = 0
    except UserError as error:
        code, failure = 2, str(error)
        if number == 0:
            raise
        raise SystemExit(code) from None
    except Exception as error:
        failure = f"a defect, told in full in its own log: {type(error).__name__}: {error}"
        raise
    finally:
        line.end(code, failure if number else "")
        _line, _size = None, 1


def all_gather_object(value: Any) -> list[Any]:
    """Wait for all processes and return the value (anything JSON takes) of each, by rank."""
    return _line.exchange(value) if _line else [value]


def on_all_processes(action: Callable[[], Result]) -> Result:
    """Do something in every process; a UserError in any of them is raised in all. No collectives inside."""
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        if not _line:
            raise
        failure = str(error)
    for number, text in enumerate(all_gather_object(failure)):
        if text is not None:
            raise UserError(f"process {number}: {text}" if number else text)
    return result


def on_main_process(action: Callable[[], Result]) -> Result | None:
    """Do something in process 0 while the others wait, and raise in all the UserError that it raises there."""
    return on_all_processes(lambda: action() if is_main() else None)


def main_process_first(action: Callable[[], Result]) -> Result:
    """Do something in process 0, then in all others: what is downloaded is there when they look for it."""
    result = on_main_process(action)
    return on_all_processes(lambda: result if is_main() else action())


def shard_indices(batch: int) -> np.ndarray | None:
    """Return which images of a batch this process takes, ascending; None for all.

    Image i and its mirror ``batch - 1 - i``, which mixup and cutmix pair, stay together and stay mirrors. Raises
    UserError for a batch too small for every process to have two.
    """
    return _shard(batch, rank(), world_size()) if world_size() > 1 else None


def shard_sizes(batch: int) -> list[int]:
    """Return how many images of a batch each process takes."""
    return [len(_shard(batch, number, world_size())) for number in range(world_size())] if world_size() > 1 else [batch]


def _shard(batch: int, rank: int, size: int) -> np.ndarray:
    if batch < 2 * size:
        raise UserError(f"DATA.BATCH_SIZE is {batch}, expected at least two images for each of {size} processes")
    pairs = (batch + 1) // 2
    first = np.arange(pairs * rank // size, pairs * (rank + 1) // size)
    return np.unique(np.concatenate([first, batch - 1 - first]))


def all_reduce(tensor: paddle.Tensor) -> None:
    """Replace a tensor by its sum over the processes, the same in all of them."""
    if _line:
        all_gather_object(None)  # Gloo waits for half a minute only
        collective(paddle.distributed.all_reduce, tensor)


@paddle.no_grad()
def all_reduce_coalesced(tensors: Sequence[paddle.Tensor]) -> None:
    """Replace float32 tensors by their sums over the processes, in one message."""
    if not _line:
        return
    flat = paddle.concat([tensor.flatten() for tensor in tensors])
    all_reduce(flat)
    for tensor, piece in zip(tensors, paddle.split(flat, [tensor.size for tensor in tensors]), strict=True):
        tensor.copy_(piece.reshape(tensor.shape), False)


def collective(operation: Callable[..., Any], *arguments: Any) -> None:
    """Call one of Paddle's collectives; where it fails since a process has died, that ends this one in a moment."""
    try:
        operation(*arguments)
    except RuntimeError:
        threading.Event().wait(2 * control.GRACE_SECONDS)
        raise


def gather(parts: np.ndarray, positions: np.ndarray, count: int) -> np.ndarray:
    """Return float64 ``[K, count]`` from what each process has of it: ``[K, len(positions)]``.

    Every column comes from one process and is added to zeros: nothing is rounded, counted twice, or left out.
    """
    if not _line:
        return parts
    whole = np.zeros((len(parts), count))
    whole[:, positions] = parts
    tensor = paddle.to_tensor(whole)
    all_reduce(tensor)
    return tensor.numpy()


def broadcast(tensors: Iterable[paddle.Tensor]) -> None:
    """Give all processes the tensors of process 0."""
    if _line:
        all_gather_object(None)
        for tensor in tensors:
            collective(paddle.distributed.broadcast, tensor, 0)


def broadcast_checkpoint(saved: Checkpoint | None) -> Checkpoint | None:
    """Give all processes the checkpoint that process 0 has read, or its None."""
    if not _line:
        return saved
    header = saved and [str(saved.path), saved.progress, [
        [part, name, str(array.dtype), array.shape] for part, arrays in saved.parts.items()
        for name, array in arrays.items()]]
    header = all_gather_object(header)[0]
    if header is None:
        return None
    path, progress, entries = header
    parts: dict[str, dict[str, np.ndarray]] = {}
    for part, name, dtype, shape in entries:
        array = saved.parts[part][name] if saved else np.zeros(shape, dtype)
        if array.size:
            tensor = paddle.to_tensor(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            collective(paddle.distributed.broadcast, tensor, 0)
            array = tensor.numpy().view(dtype).reshape(shape)
        parts.setdefault(part, {})[name] = array
    return Checkpoint(Path(path), parts, progress)


def _choose_backend(config: CfgNode) -> None:
    """Settle NCCL or Gloo by the device, before Paddle does."""
    device, gloo = config.RUNTIME.DEVICE, os.environ.get("PADDLE_DISTRI_BACKEND") == "gloo"
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if ":" in device:
        raise UserError(f"RUNTIME.DEVICE is {device}, expected auto, cpu or gpu with several processes: the launcher's "
                        "--devices names the GPUs")
    if gloo and gpus and device != "cpu":
        raise UserError("Gloo is for CPUs: leave out --backend gloo, or add -o RUNTIME.DEVICE=cpu")
    if device == "cpu" or not gpus:
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"


def _connections(rank: int, size: int) -> dict[int, Any]:
    """Connect every process with process 0, whose address goes through a broadcast."""
    text = np.zeros(256, np.uint8)
    host = os.environ["PADDLE_CURRENT_ENDPOINT"].rpartition(":")[0]
    if rank == 0:
        listener, address = control.listen(host)
        text[: len(address)] = np.frombuffer(address.encode(), np.uint8)
    tensor = paddle.to_tensor(text)
    paddle.distributed.broadcast(tensor, 0)
    address = tensor.numpy().tobytes().rstrip(b"\0").decode()
    return control.connect(address, rank) if rank else control.accept(listener, address, size)


def _compare(config: CfgNode) -> None:
    """Raise UserError where the processes were started with different configs, but for their folders."""
    own = {key: repr(value) for key, value in flatten(config) if key not in ("OUTPUT", "DATA.ROOT")}
    for number, other in enumerate(all_gather_object(own)):
        differing = [key for key in own if other.get(key) != own[key]]
        if differing:
            raise UserError(f"processes {rank()} and {number} were started with different configs: "
                            f"{', '.join(differing)}")


def _tell(sentence: str) -> None:
    if log.handlers and is_main():
        log.error(sentence)
    else:
        print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr, flush=True)
