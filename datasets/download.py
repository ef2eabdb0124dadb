"""Download an official archive: mirrors in order, checked, and in place only when whole."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import http.client
import os
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from errors import UserError, printable

TIMEOUT_SECONDS = 15.0  # without an answer or a further byte
SLOW_SECONDS, SLOW_BYTES = 60.0, 64 << 10  # a server that gives less in such a time is given up
CHUNK_BYTES = 1 << 18
LEFT_SECONDS = 86_400.0  # since its last byte: then a part is one that a killed process left
REPORT_SECONDS = 5.0  # between two reports where the output is not a terminal


def download(path: Path, urls: Sequence[str], sha256: str, size: int) -> None:
    """Put the file of ``size`` bytes and checksum ``sha256`` at ``path`` from the first of ``urls`` that has it.

    It is written beside ``path`` under a temporary name, compared, synced and renamed, so ``path`` is never a partial
    file. UserError has each mirror's answer, and where the file can be put by hand.
    """
    answers = []
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                left.unlink(missing_ok=True)
        for url in urls:
            print(f"downloading {url} to {path}", file=sys.stderr, flush=True)
            with open(partial, "wb") as file:
                answer = _fetch(url, file, sha256, size)
                if answer is None:
                    file.flush()
                    os.fsync(file.fileno())
            if answer is None:
                os.replace(partial, path)
                return
            answers.append(f"{url}: {answer}")
    except OSError as error:  # of the file system: those of the network are answers
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    raise UserError(
        f"{path.name} could not be downloaded ({'; '.join(answers)}); get it on another machine and put it at "
        f"{path.absolute()}, or name where it is with -o DATA.ROOT=..."
    )


def _fetch(url: str, file, sha256: str, size: int) -> str | None:
    """Copy what ``url`` gives into ``file``; return what is wrong with it, or None."""
    digest, received = hashlib.sha256(), 0
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return printable(getattr(error, "reason", None) or error, 200)
    began, before = time.monotonic(), 0
    interval = 0.1 if sys.stderr.isatty() else REPORT_SECONDS
    with response, tqdm(total=size, unit="B", unit_scale=True, mininterval=interval) as progress:
        while received <= size:
            try:
                chunk = response.read1(CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                return f"broke off after {received:,} of {size:,} bytes ({printable(error, 200)})"
            if not chunk:
                break
            file.write(chunk)
            digest.update(chunk)
            received += len(chunk)
            progress.update(len(chunk))
            if time.monotonic() - began > SLOW_SECONDS:
                if received - before < SLOW_BYTES:
                    return f"was too slow: {received - before:,} bytes in {SLOW_SECONDS:.0f} s"
                began, before = time.monotonic(), received
    if received != size:
        return f"gave {'more than' if received > size else f'{received:,} of'} {size:,} bytes"
    if digest.hexdigest() != sha256:
        return f"gave a file with sha256 {digest.hexdigest()[:16]}… instead of {sha256[:16]}…"
    return None
