"""Files on disk: written whole or not at all, opened only where they are regular; values as JSON.

A file is written beside its place under a name of its own, which ends in ``.part`` and is made with ``O_EXCL``, so that
neither another process, nor another machine on a shared disk, nor a link that somebody planted can stand there. When it
is whole it takes the name it is meant for, in one step of the file system. A process killed on the way leaves a
``.part`` and never half a file; ``orphans`` finds those again, whoever wrote them.

Files of strangers may be pipes and devices, on which a plain ``open`` waits for ever. ``open_regular`` opens regular
files and refuses the rest, and what is read afterwards is read from the file it has checked, whatever is put in its
place meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lvlm_probe.errors import ProbeError

State = tuple[int, int, int]
"""Inode, bytes, and time of change in ns: what differs when another file was put in a file's place."""

NUMBER_DIGITS = 300
"""Digits of an integer in JSON: more than 308 would not fit into a float."""
_PART = re.compile(r"\.(?P<pid>\d{1,10})-(?:[0-9a-f]{16}|[0-9a-f]{8})\.part$")
_NAME_BYTES = 255
"""Longest name of the usual file systems."""
DAY = 86_400.0
"""Seconds after which an unfinished file is nobody's."""
_TRIES = 16
_MARKED = 2**16
"""Bytes at the beginning and at the end of a file that are searched for our mark."""
_MARKS = (
    (b"<!doctype html>", b'<meta name="generator" content="lvlm_probe '),
    (b"%PDF-", b"/Creator (lvlm_probe)"),
    (b"\x89PNG\r\n", b"tEXtSoftware\x00lvlm_probe"),
    (b"<?xml", b"<dc:title>lvlm_probe</dc:title>"),
    (b"II*\x00", b"lvlm_probe\x00"),
    (b"MM\x00*", b"lvlm_probe\x00"),
)
"""How a file of ours begins, and the mark that it carries: page, PDF, PNG, SVG, TIFF."""


class NotRegularFile(OSError):
    """A directory, pipe, device or socket where a file is wanted."""


def path_of(path: object, what: str, error: type[ProbeError]) -> Path:
    """A path as users give it, from the root: it stays what it is when the working directory changes.

    Raises ``error``, which says that ``what`` is named by one, where it is none.
    """
    if not isinstance(path, str | os.PathLike) or path == "":
        raise error(f"{what} is named by its path; got {'an empty text' if path == '' else f'a {type(path).__name__}'}")
    try:
        return Path(path).absolute()
    except FileNotFoundError:  # the working directory is gone
        return Path(path)


# --- writing ----------------------------------------------------------------------------------------------------------


def part_path(path: Path) -> Path:
    """Returns a name beside ``path`` for what becomes it: ``NAME.PROCESS-RANDOM.part``, NAME cut where it is long."""
    tail = f".{os.getpid()}-{secrets.token_hex(8)}.part"
    room = _NAME_BYTES - len(tail)
    name = os.fsdecode(os.fsencode(path.name)[:room]) if len(os.fsencode(path.name)) > room else path.name
    return path.with_name(name + tail)


def write_whole(
    path: str | os.PathLike[str], data: str | bytes | memoryview, *, fsync: bool = False, mode: int = 0o666
) -> None:
    """Writes a file whole or not at all, in the place of the one that has its name.

    When it fails nothing remains, and what was there is as it was. A link at ``path`` is replaced, not followed.

    Args:
        path: no pipe, device or folder; missing folders above it are made.
        data: the content; text as UTF-8, line ends as they are, halves of surrogate pairs as their escapes.
        fsync: waits until the disk has the file and its name, so that a power cut does not take them.
        mode: permissions, less the umask.

    Raises:
        OSError: the disk does not take it.
    """
    target = Path(path)
    view = memoryview(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _refuse_irregular(os.stat(target), target)
    target.parent.mkdir(parents=True, exist_ok=True)
    part, descriptor = _create(target, mode)
    try:
        with io.FileIO(descriptor, "w") as file:
            while view:  # a disk that fills up takes a part first, and refuses the rest
                view = view[file.write(view) :]
            if fsync:
                os.fsync(descriptor)
        os.replace(part, target)
        if fsync:
            _fsync_folder(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def is_ours(path: Path) -> bool:
    """Tell whether a file was written by this package: by the mark that its pages and figures carry.

    A page names its generator, a figure its creator in the metadata of its format. A file that merely speaks of the
    package is not ours, nor is one that cannot be read.
    """
    try:
        with open_regular(path) as file:
            head = file.read(_MARKED)
            file.seek(max(0, file.seek(0, os.SEEK_END) - _MARKED))
            tail = file.read(_MARKED)
    except OSError:
        return False
    return any(head.startswith(start) and (mark in head or mark in tail) for start, mark in _MARKS)


def in_the_way(path: Path, *, overwrite: bool | None) -> str | None:
    """Say why what is at ``path`` is not replaced; ``None`` where it may be, or nothing is there.

    ``overwrite`` replaces any file, ``None`` only one that this package wrote.
    """
    if not path.exists() or overwrite or (overwrite is None and is_ours(path)):
        return None
    whose = "" if overwrite is False else " and was not written by lvlm_probe"
    return f"{path} exists{whose}; name another file, or pass overwrite=True"


def _create(target: Path, mode: int) -> tuple[Path, int]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    for left in reversed(range(_TRIES)):
        part = part_path(target)
        try:
            return part, os.open(part, flags | getattr(os, "O_CLOEXEC", 0), mode)
        except FileExistsError:
            if not left:
                raise
    raise AssertionError("unreachable")


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- as JSON ----------------------------------------------------------------------------------------------------------


def json_ready(value: Any, *, nonfinite: Callable[[float], Any] = lambda _: None) -> Any:
    """Return a value as JSON has it: None, bool, text, a number, a list, or a dict with text for keys.

    Arrays and tensors become lists, sets sorted lists, and what JSON has nothing for its text.

    Args:
        value: as models and users keep it in their settings.
        nonfinite: what NaN and the infinities become; null unless said otherwise.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 10 ** (NUMBER_DIGITS - 1) else hex(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else nonfinite(float(value))
    if isinstance(value, Mapping):
        return {str(key): json_ready(item, nonfinite=nonfinite) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return json_ready(value.tolist(), nonfinite=nonfinite)
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        made = [json_ready(item, nonfinite=nonfinite) for item in value]
        return sorted(made, key=str) if isinstance(value, set | frozenset) else made
    return str(value)


def record_of(value: Any, *without: str) -> dict[str, Any]:
    """Return the fields of a dataclass by name, but for some, as JSON has them: NaN and the infinities as null, another
    dataclass as its ``to_dict`` or else its own fields."""

    def told(item: Any) -> Any:
        if dataclasses.is_dataclass(item):
            return item.to_dict() if hasattr(item, "to_dict") else record_of(item)
        return list(map(told, item)) if isinstance(item, tuple | list) else item

    names = (item.name for item in dataclasses.fields(value) if item.name not in without)
    return {name: json_ready(told(getattr(value, name))) for name in names}


# --- what was left behind ---------------------------------------------------------------------------------------------


def orphans(folders: Iterable[Path], *, min_age: float = DAY) -> list[Path]:
    """Lists the unfinished files and folders that killed processes left in ``folders``, sorted.

    One counts when no process with the number in its name runs on this machine *and* nobody has written to it for
    ``min_age`` seconds: on a shared disk its writer may be alive on another machine.
    """
    found: set[Path] = set()
    for folder in folders:
        with contextlib.suppress(OSError):
            found.update(part for part in folder.iterdir() if _is_orphan(part, min_age))
    return sorted(found)


def remove_orphans(folders: Iterable[Path], *, min_age: float = DAY) -> list[Path]:
    """Deletes ``orphans(folders)`` and returns what it deleted."""
    removed = []
    for part in orphans(folders, min_age=min_age):
        with contextlib.suppress(OSError):
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part)
            else:
                part.unlink()
            removed.append(part)
    return removed


def _is_orphan(part: Path, min_age: float) -> bool:
    named = _PART.search(part.name)
    if named is None:
        return False
    try:
        age = time.time() - part.lstat().st_mtime
    except OSError:
        return False
    return age >= min_age and not _is_running(int(named["pid"]))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it runs, and belongs to someone else
        return True
    return True


# --- reading ----------------------------------------------------------------------------------------------------------


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Opens a regular file for reading, without ever waiting for what is none.

    Raises ``NotRegularFile`` for directories, pipes, devices and sockets, and ``OSError``.
    """
    # Before opening: to open a device may already do something. Without waiting: it may have become a pipe since.
    _refuse_irregular(os.stat(path), path)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags | getattr(os, "O_NOCTTY", 0))
    try:
        _refuse_irregular(os.fstat(descriptor), path)
        return io.FileIO(descriptor, "r")
    except BaseException:
        os.close(descriptor)
        raise


def found_within(path: str | os.PathLike[str], folders: Sequence[Path]) -> tuple[Path | None, bool]:
    """Finds a regular file that somebody's row names, in ``folders`` and, links resolved, nowhere else.

    Returns:
        the file, ``None`` where there is none in the folders; and whether there is one outside of them.
    """
    outside = False
    for place in (*(folder / path for folder in folders), Path(path)):
        with contextlib.suppress(OSError, ValueError):  # a name that is too long, or has a NUL in it
            real = place.resolve(strict=True)
            if not real.is_file():  # neither a directory, a pipe, nor a device
                continue
            if any(real.is_relative_to(folder.resolve()) for folder in folders):
                return real, outside
            outside = True
    return None, outside


def read_small(path: str | os.PathLike[str], *, limit: int) -> bytes:
    """Reads a regular file of at most ``limit`` bytes. Raises ``OSError``, with ``EFBIG`` for a larger one."""
    with io.BufferedReader(open_regular(path)) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has {size} bytes, more than {limit}", os.fspath(path))
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", os.fspath(path))
    return data


def state_of(status: os.stat_result) -> State:
    """Returns what changes when another file is put in a file's place."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _refuse_irregular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    if stat.S_ISDIR(status.st_mode):
        raise NotRegularFile(errno.EISDIR, "it is a directory", os.fspath(path))
    raise NotRegularFile(errno.EINVAL, "it is not a regular file", os.fspath(path))


# --- in words ---------------------------------------------------------------------------------------------------------

_WORDS: dict[int, tuple[str, str]] = {
    errno.ENOENT: ("there is no such file", "check the path"),
    errno.ENOTDIR: ("a part of its path is not a directory", "check the path"),
    errno.ENAMETOOLONG: ("its name is too long for this disk", "choose a shorter name"),
    errno.ELOOP: ("its links lead in a circle", "check the path"),
    errno.EACCES: ("permission is denied", "ask its owner for the right to it, or change its mode"),
    errno.EPERM: ("permission is denied", "ask its owner for the right to it, or change its mode"),
    errno.EROFS: ("the disk is read-only", "choose another folder"),
    errno.EMFILE: (
        "this process has too many files open",
        "close some or raise the limit (ulimit -n), and try again: the file itself is untouched",
    ),
    errno.ENFILE: ("the system has too many files open", "try again later: the file itself is untouched"),
    errno.ENOMEM: ("there is not enough memory", "free some and try again: the file itself is untouched"),
    errno.EIO: (
        "the disk reports an input/output error",
        "try again, and check the disk: the file may be whole, so keep it",
    ),
    errno.ENOSPC: ("the disk is full", "free some space, or choose a folder on another disk"),
    errno.EDQUOT: ("your quota on this disk is used up", "free some space, or choose a folder on another disk"),
    errno.EFBIG: ("it is larger than this system or the limit of this process allows", "raise the limit (ulimit -f)"),
    errno.ESTALE: ("the network disk has lost it", "try again, or mount the disk again"),
    errno.ETIMEDOUT: ("the network disk does not answer", "try again later"),
}


def causes(error: BaseException) -> tuple[str, str]:
    """Returns what happened and the way out, in words, for an ``OSError`` or ``MemoryError``."""
    if isinstance(error, MemoryError):
        return _WORDS[errno.ENOMEM]
    number = getattr(error, "errno", None)
    said = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0][:200]
    if isinstance(error, NotRegularFile):
        return said, "name a file"
    if number in _WORDS:
        what, way_out = _WORDS[number]
        return f"{what} ({said})", way_out
    return said, "check the path and the disk"
