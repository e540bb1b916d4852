"""The seal at the head of every file, and the one way files are written.

A file is made in memory, written once under a ``.part`` name, and renamed when it is finished: a process killed at any
time leaves whole files and at most one ``.part``, and HDF5, which ends the process when a disk refuses one of its
writes, never sees the disk. The first 512 bytes (an HDF5 user block) hold a few lines of text: what the file
is, how long it is, and the SHA-256 of the rest. A reader checks them *before* HDF5 parses anything, so a truncated or
damaged file is found whole and early: HDF5 itself reads damaged numbers without complaint (array data carry no
checksum), and its parser is not built for damaged input. The seal finds damage, not malice: whoever writes a file can
seal it, so :mod:`lvlm_probe.storage.reading` trusts nothing that a sealed file claims.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import h5py

from lvlm_probe.errors import TraceError
from lvlm_probe.escaping import writable
from lvlm_probe.files import NotRegularFile, causes, open_regular, write_whole

BLOCK_BYTES = 512
CHECKSUM_LIMIT = 2**30
"""Files up to this size are hashed when they are opened (about 2 GB/s); larger ones only when asked to."""

_HEADROOM = 2**20
"""Bytes that headers, chunks and HDF5's own buffers take beside the arrays."""
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_FIRST_LINE = re.compile(r"(?P<kind>lvlm_probe\.[a-z_]{1,32}) (?P<version>\d{1,4}\.\d{1,4})")
_REMARK = f"An HDF5 file behind a user block of {BLOCK_BYTES} bytes; the hash is over what follows the block."


@dataclasses.dataclass(frozen=True)
class Seal:
    """The lines at the head of a file."""

    kind: str
    version: str
    nbytes: int
    sha256: str

    def to_block(self) -> bytes:
        """Returns the 512 bytes."""
        lines = f"{self.kind} {self.version}\nbytes {self.nbytes}\nsha256 {self.sha256}\n{_REMARK}\n"
        return lines.encode("ascii").ljust(BLOCK_BYTES - 1, b" ") + b"\n"


def trace_error(path: str | os.PathLike[str], key: str, what: str, way_out: str) -> TraceError:
    """Returns the error every failed read raises: file, HDF5 key, what is wrong, what to do."""
    where = f"{os.fspath(path)} [{key}]" if key else os.fspath(path)
    # A name that is no UTF-8 comes as lone surrogates, which cannot be printed.
    return TraceError(writable(f"{where}: {what}; {way_out}"))


def unreadable(path: str | os.PathLike[str], error: BaseException, *, key: str = "") -> TraceError:
    """Return the error of a read that the disk or the memory refused."""
    what, way_out = causes(error)
    return trace_error(path, key, f"it cannot be read: {what}", way_out)


def parse_version(text: str) -> tuple[int, int]:
    """Returns ``(major, minor)`` of ``"1.0"``; raises ``ValueError`` for anything else."""
    found = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", text)
    if found is None:
        raise ValueError(f"not a version: {text[:32]!r}")
    return int(found[1]), int(found[2])


def open_file(path: Path, *, before: bool = False) -> io.FileIO:
    """Opens a regular file, which was there ``before`` perhaps, for reading; ``TraceError`` says why it cannot be."""
    try:
        return open_regular(path)
    except NotRegularFile as error:
        if path.is_dir():
            way_out = "open_store() reads a directory, or name a file in it"
            raise trace_error(path, "", "this is a directory", way_out) from error
        raise trace_error(path, "", "this is not a regular file", "name a trace file (*.h5)") from error
    except FileNotFoundError:
        what = "it was moved or deleted since it was opened" if before else "there is no such file"
        raise trace_error(path, "", what, "check the path") from None
    except (OSError, ValueError, MemoryError) as error:
        raise unreadable(path, error) from error


def check_open(
    path: Path, file: io.FileIO, kind: str, version: str, *, full: bool = False, hashed: bool = True
) -> Seal:
    """Checks an open file's head, length, and (up to ``CHECKSUM_LIMIT`` bytes, or ``full``) its hash; returns the seal.

    Without ``hashed`` only head and length are checked, whatever the size.

    ``kind`` is what the caller wants to read (``"lvlm_probe.trace"``) and ``version`` the newest version it knows: a
    newer major version is refused, a newer minor one is not. Raises ``TraceError``.
    """
    again = "copy it again from where it was recorded, or record it again"
    try:
        nbytes = os.fstat(file.fileno()).st_size
        seal = _read_block(path, file.read(BLOCK_BYTES + len(_HDF5_SIGNATURE)) or b"")
        _check_kind(path, seal, kind, version)
        if seal.nbytes != nbytes:
            what = f"it should have {seal.nbytes} bytes and has {nbytes}: it was cut short or changed"
            raise trace_error(path, "", what, again)
        if full or (hashed and seal.nbytes <= CHECKSUM_LIMIT):
            file.seek(BLOCK_BYTES)
            if hashlib.file_digest(file, "sha256").hexdigest() != seal.sha256:
                what = "its content does not match its SHA-256: it was damaged or edited after it was written"
                raise trace_error(path, "", what, again)
    except (OSError, MemoryError) as error:
        raise unreadable(path, error) from error
    return seal


def _read_block(path: Path, head: bytes) -> Seal:
    found = None
    lines = head[:BLOCK_BYTES].split(b"\n")[:3]
    with contextlib.suppress(UnicodeDecodeError, ValueError):
        first, length, digest = (line.decode("ascii") for line in lines)
        if (matched := _FIRST_LINE.fullmatch(first)) is not None:
            nbytes = re.fullmatch(r"bytes (\d{1,18})", length)
            sha256 = re.fullmatch(r"sha256 ([0-9a-f]{64})", digest)
            if nbytes is not None and sha256 is not None:
                found = Seal(matched["kind"], matched["version"], int(nbytes[1]), sha256[1])
    if found is None or head[BLOCK_BYTES:] != _HDF5_SIGNATURE:
        kind = _recognise(head)
        way_out = "name a file that lvlm_probe recorded"
        if head.startswith(b"lvlm_probe."):
            way_out = "its head is damaged: copy it again from where it was recorded, or record it again"
        raise trace_error(path, "", f"this is not an lvlm_probe file ({kind})", way_out)
    return found


def _recognise(head: bytes) -> str:
    known = {
        _HDF5_SIGNATURE: "a plain HDF5 file",
        b"\x89PNG\r\n\x1a\n": "a PNG image",
        b"\xff\xd8\xff": "a JPEG image",
        b"PK\x03\x04": "a ZIP archive",
        b"\x80\x02": "a pickle",
        b"{": "JSON or text",
    }
    if not head:
        return "it is empty"
    named = (name for magic, name in known.items() if head.startswith(magic))
    return next(named, f"it starts with {head[:16]!r}")


def _check_kind(path: Path, seal: Seal, kind: str, version: str) -> None:
    if seal.kind != kind:
        raise trace_error(path, "", f"this is a {seal.kind} file, not a {kind} file", f"name a {kind} file")
    if parse_version(seal.version)[0] > parse_version(version)[0]:
        what = f"it is written in format {seal.version}, and this version of lvlm_probe reads up to {version}"
        raise trace_error(path, "", what, "upgrade lvlm_probe")


@contextlib.contextmanager
def sealed_writer(path: Path, kind: str, version: str, *, nbytes: int, fsync: bool = False) -> Iterator[h5py.File]:
    """Gives an empty HDF5 file to fill; on leaving, seals it and gives it the name ``path``, replacing what was there.

    The file is made in memory and written by Python: HDF5 2.0 does not survive a disk that refuses a write while a file
    is closed, and takes the process with it. Memory for it is about what is stored. After an exception nothing remains.

    Args:
        path: its folder is made when missing.
        kind, version: what the seal says.
        nbytes: about what will be stored, bytes: memory that is not there is missed before HDF5 needs it.
        fsync: also survive a power cut (about 12 ms).

    Raises:
        TraceError: the disk does not take it, or memory is short.
    """
    try:
        _room_for(_HEADROOM + nbytes + nbytes // 4)
        image = io.BytesIO()
        # Bounds on the library version: readable by every HDF5 since 1.8, and with checksummed metadata.
        with h5py.File(image, "w", libver=("v108", "v108"), userblock_size=BLOCK_BYTES) as file:
            yield file
        content = image.getbuffer()
        digest = hashlib.sha256(content[BLOCK_BYTES:]).hexdigest()
        content[:BLOCK_BYTES] = Seal(kind, version, len(content), digest).to_block()
        write_whole(path, content, fsync=fsync)
    except (OSError, MemoryError, RuntimeError) as error:  # HDF5 reports what it cannot encode as RuntimeError too
        what, way_out = causes(error)
        raise trace_error(path, "", f"it could not be written: {what}", way_out) from error


def _room_for(nbytes: int) -> None:
    bytearray(nbytes)  # MemoryError
