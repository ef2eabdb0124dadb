"""Servers that say nothing, too little or lead elsewhere; those that lie or break off are in test_datasets.py."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from datasets import download as module
from datasets.download import download
from errors import UserError

CONTENT = bytes(range(256)) * 800
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the path says."""

    def do_GET(self) -> None:
        kind = self.path.strip("/")
        if kind == "silent":
            time.sleep(3)
            return
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", f"http://{self.headers['Host']}/whole")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        try:
            if kind == "drip":
                for byte in CONTENT[:200]:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
            else:
                self.wfile.write(CONTENT)
        except OSError:  # the client has given up
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Return the address of that server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.daemon_threads = True
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.parametrize(("kind", "told"), [("silent", "timed out"), ("drip", "too slow: .* bytes in 1 s")])
def test_each_failure_is_told_in_bounded_time(kind: str, told: str, server: str, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(module, "SLOW_SECONDS", 1.0)
    begin = time.monotonic()
    with pytest.raises(UserError, match=told) as caught:
        download(tmp_path / "a.gz", [f"{server}/{kind}"], SHA256, len(CONTENT))
    assert time.monotonic() - begin < 10
    message = str(caught.value)
    assert "\n" not in message and f"put it at {tmp_path / 'a.gz'}" in message
    assert list(tmp_path.iterdir()) == []


def test_a_redirection_is_followed(server: str, tmp_path: Path) -> None:
    download(tmp_path / "a.gz", [f"{server}/redirect"], SHA256, len(CONTENT))
    assert (tmp_path / "a.gz").read_bytes() == CONTENT


def test_parts_of_killed_downloads_go_after_a_day(server: str, tmp_path: Path) -> None:
    old, new = tmp_path / ".a.gz.1.part", tmp_path / ".a.gz.2.part"
    for path, age in ((old, 90_000), (new, 60)):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    download(tmp_path / "a.gz", [f"{server}/whole"], SHA256, len(CONTENT))
    assert not old.exists() and new.exists()
