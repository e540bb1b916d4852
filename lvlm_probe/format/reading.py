"""Reads a sealed file, trusting nothing it says.

A file may come from anyone, and a valid seal proves nothing about who wrote it. So every member is reached link by link
(hard links only: a soft or external link would make us read something else), and its declared type, shape and storage
are checked against each other and against the size of the file *before* anything is allocated: an array of a terabyte
in a file of a kilobyte is refused by arithmetic. Virtual datasets, external storage, filters (a deflated chunk may grow
a thousandfold), and compound, reference and variable-length types are refused; the format uses none of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from lvlm_probe.errors import TraceError
from lvlm_probe.format.encoding import ENCODING_VERSION, JSON_LIMIT, restore_tensor
from lvlm_probe.format.records import JSON
from lvlm_probe.format.seal import Seal, check_seal, parse_version, trace_error

__all__ = ["SealedFile", "open_sealed"]

_RANK_LIMIT = 8
_TEXT_LIMIT = 2**16
_MEMBER_LIMIT = 100_000
_NUMBERS = frozenset("u1 u2 u4 u8 i1 i2 i4 i8 f2 f4 f8".split())  # noqa: SIM905
_RECORD_AGAIN = "the file is damaged or was not written by lvlm_probe: record it again"
_NOT_OURS = "lvlm_probe never writes this: do not trust the file"


class SealedFile:
    """An open file with checked access to its members; every failure is a ``TraceError`` that names the key."""

    def __init__(self, path: Path, file: h5py.File, nbytes: int) -> None:
        self.path = path
        self._file = file
        self._nbytes = nbytes
        self._found: dict[str, h5py.HLObject] = {}

    def error(self, key: str, what: str, way_out: str = _RECORD_AGAIN) -> TraceError:
        """Returns the error that names this file and ``key``."""
        return trace_error(self.path, key, what, way_out)

    @contextlib.contextmanager
    def reading(self, key: str) -> Iterator[None]:
        """Turns whatever HDF5 raises on a damaged member into a ``TraceError``."""
        try:
            yield
        except TraceError:
            raise
        # HDF5 reports damage through a dozen exception types (OSError, KeyError, RuntimeError, ValueError, ...), and
        # numpy and json add theirs: what is not ours is damage.
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0][:200]
            raise self.error(key, f"it cannot be read ({type(error).__name__}: {first_line})") from error

    def _find(self, key: str) -> h5py.HLObject:
        """Walks to a member link by link; what was found once is not walked to again while the file is open."""
        key = key.strip("/")
        if not key:
            return self._file
        if key not in self._found:
            parent, _, name = key.rpartition("/")
            group = self._find(parent)
            if not isinstance(group, h5py.Group):
                raise self.error(key, "it is missing (its parent is not a group)")
            link = group.get(name, getlink=True)
            if link is None:
                raise self.error(key, "it is missing")
            if not isinstance(link, h5py.HardLink):
                raise self.error(key, f"it is a {type(link).__name__}, which could point anywhere", _NOT_OURS)
            self._found[key] = group[name]
        return self._found[key]

    def has(self, key: str) -> bool:
        """True when a member of that name exists, whatever it is."""
        parent, _, name = key.rpartition("/")
        with self.reading(key):
            group = self.group(parent)
            return group.get(name, getlink=True) is not None

    def group(self, key: str) -> h5py.Group:
        """Returns a group reached over hard links."""
        with self.reading(key):
            found = self._find(key)
            if not isinstance(found, h5py.Group):
                raise self.error(key, f"a group is expected, this is a {type(found).__name__.lower()}")
            return found

    def names(self, key: str, *, limit: int = _MEMBER_LIMIT) -> list[str]:
        """Returns the names in a group, sorted; an absent group has none."""
        if not self.has(key):
            return []
        with self.reading(key):
            group = self.group(key)
            if len(group) > limit:
                raise self.error(key, f"it claims {len(group)} members, more than {limit}", _NOT_OURS)
            return sorted(group)

    def dataset(self, key: str) -> h5py.Dataset:
        """Returns a dataset whose declared type, shape and storage are plausible: reading it is safe."""
        with self.reading(key):
            found = self._find(key)
            if not isinstance(found, h5py.Dataset):
                raise self.error(key, f"an array is expected, this is a {type(found).__name__.lower()}")
            if found.shape is None or len(found.shape) > _RANK_LIMIT:
                raise self.error(key, "it has no shape or too many axes", _NOT_OURS)
            if not _is_plain_type(found.id.get_type()):
                raise self.error(key, f"its type {_type_name(found)} is not a number or a fixed string", _NOT_OURS)
            if found.dtype.kind not in "iufS":  # h5py raises here on a damaged type, and nowhere later
                raise self.error(key, f"its type {found.dtype} is not a number or a fixed string", _NOT_OURS)
            self._check_storage(key, found)
            encoding = self.text(key, "encoding_version", ENCODING_VERSION)
            if parse_version(encoding)[0] > parse_version(ENCODING_VERSION)[0]:
                what = f"its encoding version is {encoding}, and this version of lvlm_probe reads {ENCODING_VERSION}"
                raise self.error(key, what, "upgrade lvlm_probe")
            return found

    def _check_storage(self, key: str, dataset: h5py.Dataset) -> None:
        settings = dataset.id.get_create_plist()
        layout = settings.get_layout()
        if layout == h5py.h5d.VIRTUAL or settings.get_external_count() > 0:
            raise self.error(key, "its data lie in another file", _NOT_OURS)
        if layout not in (h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED):
            raise self.error(key, f"its storage layout {layout} is unknown", _NOT_OURS)
        if settings.get_nfilters():
            raise self.error(key, "it is compressed or filtered, which format 1 does not allow", _NOT_OURS)
        declared = math.prod(dataset.shape) * dataset.id.get_type().get_size()
        if declared > self._nbytes:
            what = f"it declares shape {dataset.shape}, {declared} bytes, in a file of {self._nbytes} bytes"
            raise self.error(key, what)
        if layout == h5py.h5d.CHUNKED:
            chunk = math.prod(dataset.chunks) * dataset.id.get_type().get_size()
            if chunk > self._nbytes:
                raise self.error(key, f"it declares chunks of {chunk} bytes in a file of {self._nbytes} bytes")
        stored = dataset.id.get_storage_size()
        if not declared <= stored <= self._nbytes:
            raise self.error(key, f"it declares {declared} bytes and {stored} are stored")

    def array(
        self, key: str, *, dtype: str | None = None, shape: Sequence[int | None] | None = None, limit: int | None = None
    ) -> np.ndarray:
        """Reads an array of numbers after checking its ``dtype`` (``"f4"``), ``shape`` (None: any) and bytes."""
        dataset = self.checked(key, dtype=dtype, shape=shape, limit=limit)
        with self.reading(key):
            return np.asarray(dataset[()], dtype=dataset.dtype.newbyteorder("="))

    def checked(
        self, key: str, *, dtype: str | None = None, shape: Sequence[int | None] | None = None, limit: int | None = None
    ) -> h5py.Dataset:
        """Returns the dataset that ``array`` would read, checked and unread."""
        dataset = self.dataset(key)
        with self.reading(key):
            found = dataset.dtype.str[1:]
            if found not in _NUMBERS or (dtype is not None and found != dtype):
                raise self.error(key, f"its dtype is {dataset.dtype}, {dtype or 'a number'} is expected")
            if shape is not None and not _fits(dataset.shape, shape):
                wanted = tuple("any" if size is None else size for size in shape)
                raise self.error(key, f"its shape is {dataset.shape}, {wanted} is expected")
            if limit is not None and dataset.nbytes > limit:
                raise self.error(key, f"it has {dataset.nbytes} bytes, more than {limit}", _NOT_OURS)
            return dataset

    def tensor(self, key: str):  # type: ignore[no-untyped-def]  # torch is imported only here
        """Reads a ``torch.Tensor`` in the dtype it was recorded with."""
        dtype = self.text(key, "dtype")
        array = self.array(key)
        with self.reading(key):
            return restore_tensor(array, dtype)

    def json(self, key: str) -> JSON:
        """Reads a JSON value."""
        dataset = self.dataset(key)
        with self.reading(key):
            if dataset.dtype.kind != "S" or dataset.shape != ():
                raise self.error(key, f"JSON text is expected, this is {dataset.dtype} {dataset.shape}")
            if dataset.dtype.itemsize > JSON_LIMIT:
                raise self.error(key, f"its JSON has {dataset.dtype.itemsize} bytes, more than {JSON_LIMIT}", _NOT_OURS)
            return json.loads(bytes(dataset[()]).decode("utf-8"))

    def text(self, key: str, name: str, default: str | None = None) -> str:
        """Reads a text attribute; ``default`` stands for an absent one, without it the absence is an error."""
        value = self._attribute(key, name)
        if value is None:
            if default is None:
                raise self.error(f"{key}@{name}", "it is missing")
            return default
        with self.reading(f"{key}@{name}"):
            if value.dtype.kind != "S" or value.shape != ():
                raise self.error(f"{key}@{name}", f"text is expected, this is {value.dtype} {value.shape}")
            return bytes(value[()]).decode("utf-8")

    def json_text(self, key: str, name: str) -> dict[str, JSON]:
        """Reads settings kept as JSON in an attribute; an absent one is empty."""
        text = self.text(key, name, "{}")
        with self.reading(f"{key}@{name}"):
            value = json.loads(text)
            if not isinstance(value, dict):
                raise self.error(f"{key}@{name}", f"settings by name are expected, this is a {type(value).__name__}")
            return value

    def integer(self, key: str, name: str, *, low: int = -(2**63), high: int = 2**63 - 1) -> int | None:
        """Reads an integer attribute within bounds; None when it is absent."""
        value = self._attribute(key, name)
        if value is None:
            return None
        if value.dtype.kind not in "iu" or value.shape != ():
            raise self.error(f"{key}@{name}", f"an integer is expected, this is {value.dtype} {value.shape}")
        if not low <= int(value) <= high:
            raise self.error(f"{key}@{name}", f"it is {int(value)}, outside {low} to {high}")
        return int(value)

    def integers(self, key: str, name: str) -> tuple[int, ...]:
        """Reads a list of integers from an attribute."""
        value = self._attribute(key, name)
        if value is None or value.dtype.kind not in "iu" or value.ndim != 1:
            raise self.error(f"{key}@{name}", "a list of integers is expected")
        return tuple(int(item) for item in value)

    def _attribute(self, key: str, name: str) -> np.ndarray | None:
        where = f"{key}@{name}"
        with self.reading(where):
            # Below h5py's own mapping of attributes, which opens each of them three times on the way.
            owner, raw = self._find(key).id, name.encode("utf-8")
            if not h5py.h5a.exists(owner, raw):
                return None
            identifier = h5py.h5a.open(owner, raw)
            kind = identifier.get_type()
            if not _is_plain_type(kind):
                raise self.error(where, "its type is not a number or a fixed string", _NOT_OURS)
            if identifier.get_space().get_simple_extent_type() == h5py.h5s.NULL:
                raise self.error(where, "it has no value", _NOT_OURS)
            if math.prod(identifier.shape) * kind.get_size() > _TEXT_LIMIT:
                raise self.error(where, f"it has more than {_TEXT_LIMIT} bytes", _NOT_OURS)
            value = np.empty(identifier.shape, dtype=identifier.dtype)
            identifier.read(value)
            return value


def _is_plain_type(kind: h5py.h5t.TypeID) -> bool:
    if isinstance(kind, h5py.h5t.TypeStringID):
        return not kind.is_variable_str()
    return isinstance(kind, h5py.h5t.TypeIntegerID | h5py.h5t.TypeFloatID)


def _type_name(dataset: h5py.Dataset) -> str:
    with contextlib.suppress(Exception):
        return str(dataset.dtype)
    return "(unreadable)"


def _fits(shape: tuple[int, ...], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(w is None or s == w for s, w in zip(shape, wanted, strict=True))


@contextlib.contextmanager
def open_sealed(
    path: str | os.PathLike[str], kind: str, version: str, *, seal: Seal | None = None, full: bool = False
) -> Iterator[SealedFile]:
    """Opens a file of one kind for reading, after checking its seal (skipped when an earlier ``seal`` is given).

    Raises ``TraceError`` for anything but a finished, undamaged file of that kind in a version that can be read.
    """
    path = Path(path)
    seal = seal or check_seal(path, kind, version, full=full)
    with _open(path) as file:
        sealed = SealedFile(path, file, seal.nbytes)
        if sealed.text("/", "format") != kind:
            raise sealed.error("/@format", f"it is {sealed.text('/', 'format')[:64]!r}, {kind!r} is expected")
        found = sealed.text("/", "format_version")
        with sealed.reading("/@format_version"):
            parse_version(found)
        if found != seal.version:
            raise sealed.error("/@format_version", f"it is {found!r}, and the head of the file says {seal.version!r}")
        if sealed.integer("/", "complete") != 1:
            raise sealed.error("/@complete", "it was not finished: the process that wrote it died")
        yield sealed


@contextlib.contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    failure: OSError | None = None
    # Finished files have no writer, so locks protect nothing and fail on some network disks. HDF5 wants the same
    # choice from everyone who has the file open in this process, hence the other two.
    for locking in ("best-effort", False, True):
        try:
            file = h5py.File(path, "r", locking=locking)
        except OSError as error:
            failure = failure or error
            if "locking flag" not in str(error) and "disabled locks" not in str(error):
                break
        else:
            with file:
                yield file
            return
    raise trace_error(path, "", f"HDF5 cannot open it ({failure})", _RECORD_AGAIN) from failure
