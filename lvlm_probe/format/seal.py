"""The seal at the head of every file, and the one way files are written.

A file is written once, under a ``.part`` name, and renamed when it is finished: a process killed at any time leaves
whole files and at most one ``.part``. The first 512 bytes (an HDF5 user block) hold a few lines of text: what the file
is, how long it is, and the SHA-256 of the rest. A reader checks them *before* HDF5 parses anything, so a truncated or
damaged file is found whole and early: HDF5 itself reads damaged numbers without complaint (array data carry no
checksum), and its parser is not built for damaged input. The seal finds damage, not malice: whoever writes a file can
seal it, so :mod:`lvlm_probe.format.reading` trusts nothing that a sealed file claims.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

import h5py

from lvlm_probe.errors import TraceError

__all__ = [
    "BLOCK_BYTES",
    "CHECKSUM_LIMIT",
    "PART_NAME",
    "Seal",
    "check_seal",
    "parse_version",
    "sealed_writer",
    "trace_error",
    "write_seal",
]

BLOCK_BYTES = 512
CHECKSUM_LIMIT = 2**30
"""Files up to this size are hashed when they are opened (about 2 GB/s); larger ones only when asked to."""
PART_NAME = re.compile(r"\.(?P<pid>\d+)-[0-9a-f]{8}\.part$")
"""How the name of an unfinished file ends: the process that writes it, and a random part."""

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
    return TraceError(f"{where}: {what}; {way_out}")


def parse_version(text: str) -> tuple[int, int]:
    """Returns ``(major, minor)`` of ``"1.0"``; raises ``ValueError`` for anything else."""
    found = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", text)
    if found is None:
        raise ValueError(f"not a version: {text[:32]!r}")
    return int(found[1]), int(found[2])


def check_seal(path: Path, kind: str, version: str, *, full: bool = False, hashed: bool = True) -> Seal:
    """Checks a file's head, length, and (up to ``CHECKSUM_LIMIT`` bytes, or ``full``) its hash; returns the seal.

    Without ``hashed`` only head and length are checked, whatever the size.

    ``kind`` is what the caller wants to read (``"lvlm_probe.trace"``) and ``version`` the newest version it knows: a
    newer major version is refused, a newer minor one is not. Raises ``TraceError``.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise trace_error(path, "", "there is no such file", "check the path") from None
    except (OSError, ValueError) as error:
        raise trace_error(path, "", f"it cannot be read ({error})", "check the path and its permissions") from error
    if stat.S_ISDIR(status.st_mode):
        raise trace_error(path, "", "this is a directory", "open_store() reads a directory, or name a file in it")
    if not stat.S_ISREG(status.st_mode):
        raise trace_error(path, "", "this is not a regular file", "name a trace file (*.h5)")
    try:
        with path.open("rb") as file:
            seal = _read_block(path, file.read(BLOCK_BYTES + len(_HDF5_SIGNATURE)))
            _check_kind(path, seal, kind, version)
            if seal.nbytes != status.st_size:
                what = f"it should have {seal.nbytes} bytes and has {status.st_size}: it was cut short or changed"
                raise trace_error(path, "", what, "copy it again from where it was recorded, or record it again")
            if full or (hashed and seal.nbytes <= CHECKSUM_LIMIT):
                file.seek(BLOCK_BYTES)
                if hashlib.file_digest(file, "sha256").hexdigest() != seal.sha256:
                    what = "its content does not match its SHA-256: it was damaged or edited after it was written"
                    raise trace_error(path, "", what, "copy it again from where it was recorded, or record it again")
    except OSError as error:
        raise trace_error(path, "", f"it cannot be read ({error})", "check its permissions and the disk") from error
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
def sealed_writer(path: Path, kind: str, version: str, *, fsync: bool = False) -> Iterator[h5py.File]:
    """Gives an empty HDF5 file to fill; on leaving, seals it and renames it to ``path``, replacing what was there.

    After an exception nothing remains. ``fsync`` also survives a power cut (about 12 ms). Raises ``TraceError`` when
    the disk does not take it.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Bounds on the library version: readable by every HDF5 since 1.8, and with checksummed metadata. Not "latest":
        # after a kill such a file needs h5clear before it opens again.
        with h5py.File(part, "x", libver=("v108", "v108"), userblock_size=BLOCK_BYTES) as file:
            yield file
        write_seal(part, kind, version)
        if fsync:
            _fsync(part)
        os.replace(part, path)
        if fsync:
            _fsync(path.parent)
    except (OSError, RuntimeError) as error:  # HDF5 reports a full disk as either
        raise trace_error(path, "", f"it could not be written ({error})", "check the folder and the disk") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_seal(path: Path, kind: str, version: str) -> Seal:
    """Writes the first 512 bytes of a closed HDF5 file that has a user block of that size."""
    with path.open("r+b") as file:
        file.seek(BLOCK_BYTES)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        seal = Seal(kind, version, file.seek(0, os.SEEK_END), digest)
        file.seek(0)
        file.write(seal.to_block())
    return seal


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
