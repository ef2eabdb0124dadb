"""Taking single files out of archives from outside: bounded, checked to the last byte, nothing unpacked to disk."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from errors import UserError

try:
    from lzma import LZMAError
except ImportError:  # a Python without it reads no such members, and says so
    LZMAError = zipfile.BadZipFile

MEMBERS = 100_000  # entries of a zip file that are looked through
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, ArithmeticError,
           LookupError, RecursionError, LZMAError, MemoryError,
           RuntimeError)  # the last: an encrypted zip, or a way of packing not known
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)  # bzip2 unfolds 80 MB from the least it reads
_STEP = 1 << 12  # bytes at a time from a zip's member: lzma unfolds all that as many packed ones hold, 28 MB

Wanted = Callable[[list[str]], str]


def read_file(path: Path, limit: int, remedy: str) -> bytes:
    """Return a file's content; UserError where it cannot be read or has more than ``limit`` bytes."""
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(content) > limit:
        raise UserError(f"{path} has more than {limit >> 20} MiB; {remedy}")
    return content


def read_archive(path: Path, wanted: Wanted, title: str, remedy: str, limit: int, member_limit: int
                 ) -> dict[str, bytes]:
    """Return members of a tar, tar.gz or zip file by the names that ``wanted`` gives them.

    ``wanted`` gets a member's path in parts and returns a name, or nothing for what is passed over. UserError for
    what is no whole archive, holds a wanted name twice, a link, a device or a path that leads out of it, unpacks to
    more than ``limit`` bytes or has a wanted member of more than ``member_limit``; it ends with ``remedy``.
    """
    try:
        with open(path, "rb") as raw:
            start = raw.read(4)
            raw.seek(0)
            if start == b"PK\x03\x04":
                return _read_zip(raw, wanted, limit, member_limit)
            return _read_tar(gzip.GzipFile(fileobj=raw) if start[:2] == b"\x1f\x8b" else raw, wanted, limit,
                             member_limit)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except _BROKEN as error:
        what = " ".join(str(error).split())
        raise UserError(f"{path} is not a whole {title} archive: {what}; {remedy}") from None


def _read_tar(file: BinaryIO, wanted: Wanted, limit: int, member_limit: int) -> dict[str, bytes]:
    """Read in one pass from front to end."""
    contents: dict[str, bytes] = {}
    stream = _Bounded(file, limit)
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            parts = _parts(member.name)
            if not (member.isdir() or member.isreg()) or member.issparse():
                raise ValueError(f"{member.name[:80]!r} in it is a link or a device")
            name = wanted(parts) if member.isreg() else ""
            _check(name, contents, member.size, member_limit)
            if name:
                contents[name] = archive.extractfile(member).read()
    while stream.read(1 << 20):  # up to the checksum behind the last byte
        pass
    return contents


def _read_zip(file: BinaryIO, wanted: Wanted, limit: int, member_limit: int) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    with zipfile.ZipFile(file) as archive:
        if len(archive.infolist()) > MEMBERS:
            raise ValueError(f"it has more than {MEMBERS:,} members")
        for member in archive.infolist():
            name = "" if member.is_dir() else wanted(_parts(member.filename))
            _check(name, contents, member.file_size, member_limit)
            if name and member.compress_type not in _PACKED:
                raise ValueError(f"{name} is packed as no zip file of ours (method {member.compress_type})")
            if name:
                with archive.open(member) as packed:
                    contents[name] = _Bounded(packed, member_limit).read_all()
                if sum(map(len, contents.values())) > limit:
                    raise ValueError(f"it unpacks to more than {limit >> 20} MiB")
    return contents


def _parts(name: str) -> list[str]:
    """Return a member's path in parts; ValueError where it leads out of the archive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise ValueError(f"it holds the path {name[:80]!r}")
    return parts


def _check(name: str, contents: dict[str, bytes], size: int, member_limit: int) -> None:
    if name in contents:
        raise ValueError(f"it holds {name} twice")
    if name and size > member_limit:
        raise ValueError(f"{name} has more than {member_limit >> 20} MiB")


class _Bounded:
    """A stream that gives so many bytes and no more: a small file must not unfold without end."""

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
