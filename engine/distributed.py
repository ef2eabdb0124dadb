"""Data-parallel training: the process group, its collectives, and each rank's shard of a batch.

``python -m paddle.distributed.launch`` starts the processes (docs/TRAINING.md). Tensors go through Paddle's collectives
(NCCL or Gloo). Without a launcher every function works as for a group of one.
"""

from __future__ import annotations

import io
import json
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import paddle
from yacs.config import CfgNode

from configs.load import flatten
from engine.checkpoint import Checkpoint
from engine.runtime import launched_processes
from errors import UserError

log = logging.getLogger("suite")
Result = TypeVar("Result")

GRACE_SECONDS = 30.0  # for rank 0 to report another rank's error before that rank ends
LOST_SECONDS = 5.0  # from the failure of a collective to the message why
# A machine that lost power or network is noticed within 25 seconds (the last in milliseconds).
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}


class _Peers:
    """Object collectives over one connection between rank 0 and each other rank, which also notices a dead process.

    A message is JSON: ``[null, value]``, or ``[exit code, error]`` from a rank that ends. Paddle's own collectives are
    no substitute: Gloo gives up after 30 s, NCCL waits for a dead process. A ``TCPStore.get`` takes 90 ms.
    """

    def __init__(self, rank: int, size: int, links: dict[int, Connection]) -> None:
        self.rank, self.size, self.error = rank, size, ""
        self._links = links
        for link in links.values():
            with socket.socket(fileno=os.dup(link.fileno())) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name, value in _KEEPALIVE.items():
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def all_gather(self, value: Any) -> list[Any]:
        """Return the value of every rank, by rank."""
        if self.rank:
            self._send(None, value)
            return self.receive()[0]
        received = self.receive()
        values = [value, *(received[peer] for peer in sorted(received))]
        self._send(None, values)
        return values

    def receive(self, timeout: float | None = None) -> dict[int, Any]:
        """Return the values of the peers, by rank; exit if one has ended. Stop after ``timeout`` seconds of silence."""
        waiting, values = {link: peer for peer, link in self._links.items()}, {}
        while waiting and (ready := wait(list(waiting), timeout)):
            for link in ready:
                peer = waiting.pop(link)
                try:
                    code, values[peer] = json.loads(link.recv_bytes())
                except (EOFError, OSError):
                    self._exit(peer, 2, "ended without a message (killed, or out of memory?); the newest checkpoint is "
                               "intact, continue with --resume", report=True)
                if code is not None:
                    self._exit(peer, code, values[peer], report=self.rank == 0)
        return values

    def end(self, code: int, error: str = "") -> None:
        """Leave the group. An exit code other than 0 ends the other ranks too, and rank 0 reports the error."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, since another rank was faster, hides the code
        self._send(code, error)
        if self.rank and code and not self._links[0].poll(GRACE_SECONDS):
            self._report(error)
        for link in self._links.values():
            link.close()

    def _send(self, code: int | None, value: Any) -> None:
        message = json.dumps([code, value]).encode()
        for link in self._links.values():
            with suppress(OSError):  # the next receive reports the lost peer
                link.send_bytes(message)

    def _exit(self, peer: int, code: int, error: str, *, report: bool) -> NoReturn:
        self.error = f"process {peer}: {error}"
        if report:
            self._report(self.error)
        raise SystemExit(code)

    def _report(self, error: str) -> None:
        if self.rank == 0 and log.handlers:
            log.error(error)
        else:
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)


_peers: _Peers | None = None  # None: a group of one


def rank() -> int:
    """Return the rank of this process. Rank 0 is the main process, the only one that writes."""
    return _peers.rank if _peers else 0


def world_size() -> int:
    return _peers.size if _peers else 1


def is_main() -> bool:
    return rank() == 0


@contextmanager
def process_group(config: CfgNode) -> Iterator[None]:
    """Join the group that the launcher started.

    An error in any process stops all; rank 0 reports it once. Raises UserError if the launcher's variables are missing,
    the device cannot be used by several processes, or the ranks' configs differ.
    """
    global _peers
    size = launched_processes()
    if size < 2:
        yield
        return
    _check_launcher(size)
    _choose_backend(config)
    with redirect_stderr(io.StringIO()):  # Paddle lists its changed flags
        paddle.distributed.init_parallel_env()
    number = paddle.distributed.get_rank()
    peers = _peers = _Peers(number, size, _connect(number, size))
    if number:
        log.addHandler(logging.NullHandler())
        log.propagate = False
    code, failure = 0, ""
    try:
        _check_same_config(config)
        yield
    except UserError as error:
        code, failure = 2, str(error)
        if number == 0:
            raise
        raise SystemExit(code) from None
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        failure = peers.error or f"{type(error).__name__}: {error} (traceback in its own log)"
        raise
    finally:
        peers.end(code, failure)
        _peers = None


def all_gather_object(value: Any) -> list[Any]:
    """Return the value (of JSON types) of every rank, by rank. Waits without limit for ranks that are alive."""
    return _peers.all_gather(value) if _peers else [value]


def on_all_processes(action: Callable[[], Result]) -> Result:
    """Call ``action`` in every process; a UserError in any is raised in all. ``action`` must not use collectives."""
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        failure = str(error)
        if not _peers:
            raise
    for number, text in enumerate(all_gather_object(failure)):
        if text is not None:
            raise UserError(f"process {number}: {text}" if number else text)
    return result


def on_main_process(action: Callable[[], Result]) -> Result | None:
    """Call ``action`` on the main process while the others wait; a UserError is raised in all."""
    return on_all_processes(lambda: action() if is_main() else None)


def main_process_first(action: Callable[[], Result]) -> Result:
    """Call ``action`` on the main process, then on the others, which find what it downloaded."""
    result = on_main_process(action)
    return on_all_processes(lambda: result if is_main() else action())


def shard_indices(batch: int) -> np.ndarray | None:
    """Return the ascending indices of this rank's images in a batch; None for all.

    Image i and its mirror ``batch - 1 - i``, which mixup and CutMix pair, are in the same shard. Raises UserError for
    fewer than two images a rank.
    """
    return _shard(batch, rank(), world_size()) if world_size() > 1 else None


def shard_sizes(batch: int) -> list[int]:
    """Return the number of a batch's images on each rank."""
    return [len(_shard(batch, number, world_size())) for number in range(world_size())] if world_size() > 1 else [batch]


def _shard(batch: int, rank: int, size: int) -> np.ndarray:
    if batch < 2 * size:
        raise UserError(f"DATA.BATCH_SIZE is {batch}, expected at least two images for each of {size} processes")
    pairs = (batch + 1) // 2
    first = np.arange(pairs * rank // size, pairs * (rank + 1) // size)
    return np.unique(np.concatenate([first, batch - 1 - first]))


def collective(operation: Callable[..., Any], *arguments: Any) -> None:
    """Call a collective of Paddle; if it fails because a process has ended, exit as that process's error says."""
    try:
        operation(*arguments)
    except RuntimeError:
        if _peers:
            _peers.receive(LOST_SECONDS)
        raise


def all_reduce(tensor: paddle.Tensor) -> None:
    """Replace a tensor by its sum over the ranks."""
    if _peers:
        all_gather_object(None)  # a barrier without Gloo's limit of 30 s
        collective(paddle.distributed.all_reduce, tensor)


@paddle.no_grad()
def all_reduce_coalesced(tensors: Sequence[paddle.Tensor]) -> None:
    """Replace float32 tensors by their sums over the ranks, in one message."""
    if not _peers:
        return
    flat = paddle.concat([tensor.flatten() for tensor in tensors])
    all_reduce(flat)
    for tensor, piece in zip(tensors, paddle.split(flat, [tensor.size for tensor in tensors]), strict=True):
        tensor.copy_(piece.reshape(tensor.shape), False)


def gather(parts: np.ndarray, positions: np.ndarray, count: int) -> np.ndarray:
    """Return float64 ``[K, count]`` from each rank's columns ``[K, len(positions)]``; every column is of one rank."""
    if not _peers:
        return parts
    whole = np.zeros((len(parts), count))
    whole[:, positions] = parts
    tensor = paddle.to_tensor(whole)
    all_reduce(tensor)  # adds zeros: exact
    return tensor.numpy()


def broadcast(tensors: Iterable[paddle.Tensor]) -> None:
    """Replace the tensors of every rank by those of rank 0."""
    if _peers:
        all_gather_object(None)
        for tensor in tensors:
            collective(paddle.distributed.broadcast, tensor, 0)


def broadcast_checkpoint(saved: Checkpoint | None) -> Checkpoint | None:
    """Return the checkpoint that rank 0 has read, or its None, on every rank."""
    if not _peers:
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


def _check_launcher(size: int) -> None:
    names = ("PADDLE_TRAINER_ID", "PADDLE_CURRENT_ENDPOINT", "PADDLE_TRAINER_ENDPOINTS")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise UserError(f"PADDLE_TRAINERS_NUM is {size}, but {', '.join(missing)} not set: start {size} processes with "
                        "python -m paddle.distributed.launch, or unset PADDLE_TRAINERS_NUM")


def _choose_backend(config: CfgNode) -> None:
    """Choose NCCL or Gloo by RUNTIME.DEVICE."""
    device, gloo = config.RUNTIME.DEVICE, os.environ.get("PADDLE_DISTRI_BACKEND") == "gloo"
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if ":" in device:
        raise UserError(f"RUNTIME.DEVICE is {device}, expected auto, cpu or gpu with several processes: the launcher's "
                        "--devices names the GPUs")
    if gloo and gpus and device != "cpu":
        raise UserError("Gloo is for CPUs: leave out --backend gloo, or add -o RUNTIME.DEVICE=cpu")
    if device == "cpu" or not gpus:
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"


def _connect(rank: int, size: int) -> dict[int, Connection]:
    """Connect every rank with rank 0, which listens on the address that the launcher gave it."""
    offer, links = [None], {}
    if rank == 0:
        host, token = os.environ["PADDLE_CURRENT_ENDPOINT"].rpartition(":")[0], secrets.token_bytes(16)
        listener = Listener((host, 0), backlog=size, authkey=token)
        offer = [(listener.address, token)]
    paddle.distributed.broadcast_object_list(offer, 0)  # pickled: trusts rank 0, which runs the same job
    if rank:
        links[0] = Client(offer[0][0], authkey=offer[0][1])
        links[0].send_bytes(b"%d" % rank)
        return links
    with listener:
        while len(links) < size - 1:
            with suppress(AuthenticationError, EOFError, OSError):  # a stranger without the token
                link = listener.accept()
                links[int(link.recv_bytes())] = link
    return links


def _check_same_config(config: CfgNode) -> None:
    """Raise UserError if the ranks' configs differ in more than their folders."""
    own = {key: repr(value) for key, value in flatten(config) if key not in ("OUTPUT", "DATA.ROOT")}
    for number, other in enumerate(all_gather_object(own)):
        differing = [key for key in own if other.get(key) != own[key]]
        if differing:
            raise UserError(f"processes {rank()} and {number} have different configs: {', '.join(differing)}")
