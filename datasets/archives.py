"""Archives of data sets: searched for, downloaded, and single files read out of them.

An archive is from outside: it is read bounded and checked to the last byte, and nothing is unpacked to disk.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import http.client
import os
import sys
import tarfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from errors import UserError, printable
from utils.fileio import reading, write_atomically

try:
    from lzma import LZMAError
except ImportError:  # a Python without lzma refuses such members
    LZMAError = zipfile.BadZipFile

MEMBERS = 100_000  # most entries of a zip file
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, ArithmeticError,
           LookupError, RecursionError, LZMAError, MemoryError,
           RuntimeError)  # the last: an encrypted zip, or an unknown compression
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)  # bzip2 unpacks 80 MB at the least
_STEP = 1 << 12  # packed bytes read at a time: lzma may unpack them to 28 MB at once


def read_file(path: Path, limit: int, remedy: str) -> bytes:
    """Return a file's content; UserError where it cannot be read or has more than ``limit`` bytes."""
    with reading(path), open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{printable(path, 300)} has more than {limit >> 20} MiB; {remedy}")
    return content


def is_archive(path: Path) -> bool:
    """Return whether a file begins as a tar, gzip or zip file does."""
    try:
        with open(path, "rb") as file:
            head = file.read(262)
    except OSError:  # a folder, or not readable
        return False
    return head.startswith((b"PK\x03\x04", b"\x1f\x8b")) or head[257:] == b"ustar"


def read_archive(path: Path, names: Mapping[str, str], title: str, remedy: str, limit: int, member_limit: int
                 ) -> dict[str, bytes]:
    """Return members of a tar, tar.gz or zip file by the names that ``names`` gives them.

    ``names`` has a name for each file name, in any folder; other members are skipped. UserError, which ends with
    ``remedy``, for a damaged archive, one that holds a chosen name twice, a link, a device or a path out of it, that
    unpacks to more than ``limit`` bytes or has a chosen member of more than ``member_limit``.
    """
    with reading(path):
        raw = open(path, "rb")  # noqa: SIM115 (closed below)
    try:
        with raw:
            start = raw.read(4)
            raw.seek(0)
            if start == b"PK\x03\x04":
                return _read_zip(raw, names, limit, member_limit)
            return _read_tar(gzip.GzipFile(fileobj=raw) if start[:2] == b"\x1f\x8b" else raw, names, limit,
                             member_limit)
    except _BROKEN as error:
        what = " ".join(str(error).split())
        raise UserError(f"{printable(path, 300)} is not a whole {title} archive: {what}; {remedy}") from None


def _read_tar(file: BinaryIO, names: Mapping[str, str], limit: int, member_limit: int) -> dict[str, bytes]:
    """Read in one pass from front to end."""
    contents: dict[str, bytes] = {}
    stream = _Bounded(file, limit)
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            name = _chosen(member.name, names)
            if not (member.isdir() or member.isreg()) or member.issparse():
                raise ValueError(f"{member.name[:80]!r} in it is a link or a device")
            name = name if member.isreg() else ""
            _check(name, contents, member.size, member_limit)
            if name:
                contents[name] = archive.extractfile(member).read()
    while stream.read(1 << 20):  # up to the checksum behind the last byte
        pass
    return contents


def _read_zip(file: BinaryIO, names: Mapping[str, str], limit: int, member_limit: int) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    with zipfile.ZipFile(file) as archive:
        if len(archive.infolist()) > MEMBERS:
            raise ValueError(f"it has more than {MEMBERS:,} members")
        for member in archive.infolist():
            name = "" if member.is_dir() else _chosen(member.filename, names)
            _check(name, contents, member.file_size, member_limit)
            if name and member.compress_type not in _PACKED:
                raise ValueError(f"{name} is packed by method {member.compress_type}, expected stored, deflate or lzma")
            if name:
                with archive.open(member) as packed:
                    contents[name] = _Bounded(packed, member_limit).read_all()
                if sum(map(len, contents.values())) > limit:
                    raise ValueError(f"it unpacks to more than {limit >> 20} MiB")
    return contents


def _chosen(path: str, names: Mapping[str, str]) -> str:
    """Return the name of a member, "" to skip it; ValueError where its path leads out of the archive."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts:
        raise ValueError(f"it holds the path {path[:80]!r}")
    return names.get(parts[-1], "") if parts and parts[0] not in OF_SYSTEMS else ""


def _check(name: str, contents: dict[str, bytes], size: int, member_limit: int) -> None:
    if name in contents:
        raise ValueError(f"it holds {name} twice")
    if name and size > member_limit:
        raise ValueError(f"{name} has more than {member_limit >> 20} MiB")


class _Bounded:
    """A stream that raises ValueError after so many bytes: a small file must not unpack without end."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self.stream, self.limit, self.room = stream, limit, limit

    def read(self, count: int) -> bytes:
        data = self.stream.read(count)
        self.room -= len(data)
        if self.room < 0:
            raise ValueError(f"it unpacks to more than {self.limit >> 20} MiB")
        return data

    def read_all(self) -> bytes:
        return b"".join(iter(lambda: self.read(_STEP), b""))


# Where data sets are searched for -------------------------------------------------------------------------------------

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")
CACHES = ("~/.keras/datasets", "~/.cache/paddle/dataset")
OF_SYSTEMS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
SHOWN = 8  # entries of a folder in a message


def data_root(root: str = "") -> Path:
    """Return ``DATA.ROOT`` as a path: ``data`` by default, ``~`` expanded."""
    return Path(os.path.expanduser(root or "data"))


def search_paths(root: str = "", caches: Sequence[str] = ()) -> Iterator[Path]:
    """Yield the folders to search for ``root``: itself, then the folders ``data*`` in it, as on AI Studio.

    Without a root, or with the default ``data``, ``~/data`` and ``caches`` follow. UserError where ``root`` is the name
    of an archive that does not exist.
    """
    path = data_root(root)
    if path.name.endswith((*ARCHIVES, ".gz")) and not path.exists():
        raise UserError(f"DATA.ROOT is {printable(path, 300)}: no such file")
    default = [path, *(Path(os.path.expanduser(folder)) for folder in ("~/data", *caches))]
    for folder in default if root in ("", "data") else [path]:
        yield folder
        yield from (Path(found) for found in sorted(glob.glob(f"{glob.escape(str(folder))}/data*/")))


def missing(what: str, root: str, path: Path) -> UserError:
    """Return the error for data that are not found and may not be downloaded to ``path``."""
    folder = data_root(root)
    return UserError(f"no {what} found under {printable(folder, 300)}{contents(folder)}: put it at "
                     f"{printable(path.absolute(), 300)}, or allow the download with -o DATA.DOWNLOAD=true")


def contents(folder: Path) -> str:
    """Return what a folder holds, for the end of a message about what it does not."""
    if folder.is_file():
        return " (which is a file)"
    if not folder.is_dir():
        return " (which does not exist)"
    with reading(folder), os.scandir(folder) as entries:
        names = sorted(entry.name + "/" * is_folder(entry) for entry in entries if not entry.name.startswith("."))
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f" (it holds {', '.join(printable(name, 60) for name in names[:SHOWN]) or 'nothing'}{rest})"


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a visible folder or a link to one, and not a system's own."""
    try:
        return entry.is_dir() and not entry.name.startswith(".") and entry.name not in OF_SYSTEMS
    except OSError:  # a link to itself
        return False


def folders_below(folder: Path, depth: int, limit: int = 500) -> Iterator[Path]:
    """Yield the visible folders up to ``depth`` levels below a folder, the upper ones first, at most ``limit``."""
    level = [folder]
    for _ in range(depth):
        found: list[Path] = []
        for parent in level:
            try:
                with os.scandir(parent) as entries:
                    found += sorted(Path(entry) for entry in entries if is_folder(entry))
            except OSError:  # not readable: the data set is elsewhere
                continue
        level = found[:limit]
        limit -= len(level)
        yield from level


# Download -------------------------------------------------------------------------------------------------------------

TIMEOUT_SECONDS = 15.0  # without an answer or a further byte
SLOW_SECONDS, SLOW_BYTES = 60.0, 64 << 10  # a server that gives less in such a time is given up
CHUNK_BYTES = 1 << 18
LEFT_SECONDS = 86_400.0  # since its last byte: then a part is one that a killed process left
REPORT_SECONDS = 5.0  # between two reports where the output is not a terminal


def download(path: Path, urls: Sequence[str], sha256: str, size: int) -> None:
    """Put the file of ``size`` bytes and checksum ``sha256`` at ``path`` from the first of ``urls`` that has it.

    ``path`` is never a partial file. UserError has each mirror's answer, and where the file can be put by hand.
    """
    def write(partial: Path) -> None:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                left.unlink(missing_ok=True)
        answers = []
        for url in urls:
            print(f"downloading {url} to {path}", file=sys.stderr, flush=True)
            with open(partial, "wb") as file:
                answer = _fetch(url, file, sha256, size)
            if answer is None:
                return
            answers.append(f"{url}: {answer}")
        raise UserError(
            f"{path.name} could not be downloaded ({'; '.join(answers)}); get it on another machine and put it at "
            f"{path.absolute()}, or name where it is with -o DATA.ROOT=..."
        )

    write_atomically(path, write)


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
