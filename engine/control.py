"""The line between the processes of one run: small values, meetings, and the news that one of them has ended.

Process 0 listens, every other one holds one TCP connection to it, lines of JSON go both ways. The tensors go through
Paddle's collectives; this line exists because those neither wait for long (Gloo gives up after 30 seconds) nor always
notice that a process has died (NCCL waits for it).
"""

from __future__ import annotations

import hmac
import json
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

HELLO_SECONDS = 60.0  # for all processes to connect, after they have met once
GRACE_SECONDS = 2.0  # for a process to end by itself, with its own message, before another's ends it
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # seconds, seconds, times: a machine that died


class Line:
    """This process's end. ``tell`` is called with one sentence where another process ends this one."""

    def __init__(self, rank: int, peers: dict[int, socket.socket], tell: Callable[[str], None]) -> None:
        self.rank, self._peers, self._tell = rank, peers, tell
        self._inboxes: dict[int, queue.SimpleQueue[Any]] = {peer: queue.SimpleQueue() for peer in peers}
        self._ending = threading.Event()
        for peer, connection in peers.items():
            _keep_alive(connection)
            threading.Thread(target=self._read, args=(peer, connection), daemon=True).start()

    def exchange(self, value: Any) -> list[Any]:
        """Wait for all processes and return the value (anything JSON takes) of each, by rank."""
        if self.rank:
            self._send(0, {"value": value})
            return self._inboxes[0].get()
        values = [value, *(self._inboxes[peer].get() for peer in sorted(self._peers))]
        for peer in self._peers:
            self._send(peer, {"value": values})
        return values

    def end(self, code: int = 0, failure: str = "") -> None:
        """Part from the others: in peace, or with the exit code and the sentence of why all must end."""
        self._ending.set()
        for peer, connection in self._peers.items():
            self._send(peer, {"end": code, "failure": failure})
            connection.close()

    def _send(self, peer: int, message: Any) -> None:
        try:
            self._peers[peer].sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            if not self._ending.is_set():
                threading.Event().wait()  # the reader has seen it too, and ends this process

    def _read(self, peer: int, connection: socket.socket) -> None:
        code, failure = 2, None
        try:
            with connection.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    if "end" in message:
                        code, failure = message["end"], message["failure"]
                        break
                    self._inboxes[peer].put(message["value"])
        except (OSError, ValueError):
            pass
        if code == 0 or self._ending.wait(0 if failure is None else GRACE_SECONDS):
            return
        if failure is None:
            self._tell(f"process {peer} of this run has ended without a word (killed, or out of memory?): all stop; "
                       "the newest checkpoint is whole, continue with --resume")
        elif failure:
            self._tell(f"process {peer}: {failure}")
        os._exit(code)


def listen(host: str) -> tuple[socket.socket, str]:
    """Return a listening socket of process 0 and the address, with its password, that the others need."""
    listener = socket.create_server((host, 0), backlog=128)
    return listener, f"{host}:{listener.getsockname()[1]}:{secrets.token_hex(16)}"


def accept(listener: socket.socket, address: str, size: int) -> dict[int, socket.socket]:
    """Return the connections of the other processes by rank; whoever lacks the password is sent away."""
    peers: dict[int, socket.socket] = {}
    token, deadline = address.rpartition(":")[2], time.monotonic() + HELLO_SECONDS
    with listener:
        while len(peers) < size - 1:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            connection, _ = listener.accept()
            connection.settimeout(HELLO_SECONDS)
            said, rank = _receive(connection, 40).rsplit(" ", 1)
            if not hmac.compare_digest(said.encode(), token.encode()) or not rank.strip().isdecimal():
                connection.close()
                continue
            connection.settimeout(None)
            peers[int(rank)] = connection
    return peers


def connect(address: str, rank: int) -> dict[int, socket.socket]:
    """Return the connection to process 0."""
    host, port, token = address.rsplit(":", 2)
    connection = socket.create_connection((host, int(port)), HELLO_SECONDS)
    connection.sendall(f"{token} {rank:<7}".encode())
    connection.settimeout(None)
    return {0: connection}


def _receive(connection: socket.socket, count: int) -> str:
    """Return ``count`` bytes as text, fewer where the other side stops, always with a blank in it."""
    received = b""
    try:
        while len(received) < count and (part := connection.recv(count - len(received))):
            received += part
    except OSError:
        pass
    text = received.decode("ascii", "replace").rstrip()
    return text if " " in text else "- -"


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
