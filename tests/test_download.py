"""Downloads: mirrors that lie, break off, say nothing, lead elsewhere or are slow; one whole file, or none."""

import hashlib
import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cifar_files import change_release, write_archive

from datasets import archives, cifar, mnist
from datasets.archives import download
from errors import UserError

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
CLOSED = "http://127.0.0.1:9/x"  # nothing listens on the discard port
BODIES = {"damaged": CONTENT[:-1] + b"!", "page": b"<html>please log in</html>", "endless": CONTENT * 3}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        kind = self.path.strip("/").partition("?")[0]
        if kind == "absent":
            self.send_error(404)
            return
        self.send_response(302 if kind == "redirect" else 200)
        body = BODIES.get(kind, CONTENT)
        if kind == "redirect":
            self.send_header("Location", f"http://{self.headers['Host']}/whole")
        elif kind != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(OSError):  # the client has given up
            if kind in ("broken", "silent"):
                self.wfile.write(body[:1000])
                self.wfile.flush()
                time.sleep(1 if kind == "silent" else 0)
                self.connection.shutdown(socket.SHUT_RDWR)
            elif kind == "drip":
                for byte in CONTENT[:200]:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.02)
            elif kind != "redirect":
                self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.daemon_threads = True
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(archives, "TIMEOUT_SECONDS", 0.4)
    monkeypatch.setattr(archives, "SLOW_SECONDS", 0.6)


@pytest.mark.parametrize(("bad", "answer"), [
    ("absent", "Not Found"), ("damaged", "with sha256"), ("page", "gave 26 of 1,024,000 bytes"),
    ("endless", "gave more than 1,024,000 bytes"), ("broken", "1,000 of 1,024,000 bytes"), ("silent", "timed out"),
    ("drip", "too slow: .* bytes in 1 s"),
])
def test_the_next_mirror_follows_a_bad_one(bad: str, answer: str, server: str, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "file.bin"
    with pytest.raises(UserError, match=answer) as caught:
        download(path, [f"{server}/{bad}", CLOSED], SHA256, len(CONTENT))
    assert f"put it at {path}" in str(caught.value) and "\n" not in str(caught.value)
    assert list(path.parent.iterdir()) == []
    download(path, [f"{server}/{bad}", f"{server}/redirect"], SHA256, len(CONTENT))
    assert path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]
    assert "1.02M/1.02M" in capsys.readouterr().err


def test_an_interrupted_download_leaves_nothing(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(archives.tqdm, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download(tmp_path / "file.bin", [f"{server}/whole"], SHA256, len(CONTENT))
    assert list(tmp_path.iterdir()) == []


def test_parts_of_killed_downloads_go_after_a_day(server: str, tmp_path: Path) -> None:
    old, new = tmp_path / ".a.gz.1.tmp", tmp_path / ".a.gz.2.tmp"
    for path, age in ((old, 90_000), (new, 60)):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    download(tmp_path / "a.gz", [f"{server}/whole"], SHA256, len(CONTENT))
    assert not old.exists() and new.exists()


def test_a_downloaded_archive_is_read(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path / "served.tar.gz")
    content = (tmp_path / "served.tar.gz").read_bytes()
    monkeypatch.setitem(BODIES, "cifar", content)
    change_release(monkeypatch, mirrors=(f"{server}/damaged?", f"{server}/cifar?"), size=len(content),
                   sha256=hashlib.sha256(content).hexdigest(), batch_images={"train": 20, "test": 20})
    root = tmp_path / "root"
    for _ in range(2):  # the second time from the file
        assert len(cifar.read("train", str(root))) == 100
        change_release(monkeypatch, mirrors=())
    assert [entry.name for entry in root.iterdir()] == ["cifar-10-python.tar.gz"]


def test_without_a_network_one_sentence_names_the_place_of_the_file(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    change_release(monkeypatch, mirrors=("http://127.0.0.1:9/a/", "http://127.0.0.1:9/b/"))
    monkeypatch.setattr(mnist, "MIRRORS", ("http://127.0.0.1:9/",))
    root = tmp_path / "sets"
    for read, file in ((cifar.read, "cifar-10-python.tar.gz"), (mnist.read, "mnist/train-images-idx3-ubyte.gz")):
        with pytest.raises(UserError, match="could not be downloaded") as caught:
            read("train", str(root))
        assert str(root / file) in str(caught.value) and "\n" not in str(caught.value)
        assert [path for path in root.rglob("*") if path.is_file()] == []
        with pytest.raises(UserError, match=rf"{file.split('/')[-1]}.*DATA\.DOWNLOAD"):
            read("train", str(root), may_download=False)
        with pytest.raises(UserError, match="no such file"):
            read("train", str(tmp_path / "missing.zip"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot be written"):
        cifar.read("train", str(tmp_path / "file" / "below"))
