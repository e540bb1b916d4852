"""Reads a sealed file, trusting nothing it says.

A file may come from anyone, and a valid seal proves nothing about who wrote it. So a file is opened once, as a regular
file, and HDF5 reads through that one descriptor, whatever is put in its place meanwhile. Every member is reached link
by link (hard links only: a soft or external link would make us read something else). What is stored elsewhere (virtual
datasets, external storage) is told from the creation properties, before anything is asked that makes HDF5 open it. The
declared type, shape and storage are checked against each other and against the size of the file *before* anything is
allocated: an array of a terabyte in a file of a kilobyte is refused by arithmetic.

Small files must not become large either: a member that is linked twice, or that is reached under two names, is refused,
and the bytes of all members that were asked for may not exceed the file. Filters (a deflated chunk may grow a
thousandfold), and compound, reference and variable-length types are refused; the format uses none of them.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from lvlm_probe.errors import TraceError
from lvlm_probe.escaping import first_line
from lvlm_probe.files import State, causes, state_of
from lvlm_probe.storage.encoding import ENCODING_VERSION, JSON, JSON_LIMIT, NAME, parse_json, restore_tensor
from lvlm_probe.storage.seal import Seal, check_open, open_file, parse_version, trace_error, unreadable

RANK_LIMIT = 8
"""Axes of an array."""
TEXT_LIMIT = 2**16
"""Bytes of an attribute."""
MEMBER_LIMIT = 4096
"""Members of a group."""
_CHUNK_OVERHEAD = 24
"""Bytes that a chunk takes in the index of its dataset, at least."""
_MOST_CHUNKS = 2**16
"""Of a dataset. Each is looked for by itself: a million of them, of one number each, take seconds."""
_NUMBERS = frozenset("u1 u2 u4 u8 i1 i2 i4 i8 f2 f4 f8".split())  # noqa: SIM905
_RECORD_AGAIN = "the file is damaged or was not written by lvlm_probe: record it again"
_NOT_OURS = "lvlm_probe never writes this: do not trust the file"


class SealedFile:
    """An open file with checked access to its members; every failure is a ``TraceError`` that names the key."""

    def __init__(self, path: Path, file: h5py.File, nbytes: int) -> None:
        self.path = path
        self.seal: Seal | None = None
        self.state: State | None = None
        self._file = file
        self._nbytes = nbytes
        self._found: dict[str, h5py.HLObject] = {}
        self._keys: dict[int, str] = {}  # address of an object -> the one key it may be reached by
        self._counted: set[str] = set()
        self._declared = 0  # bytes of the datasets in _counted

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self._nbytes

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
        except MemoryError as error:
            raise self.error(key, *causes(error)) from error
        # HDF5 reports damage through a dozen exception types (OSError, KeyError, RuntimeError, ValueError, ...), and
        # numpy and json add theirs: what is not ours is damage.
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's, not HDF5's
                raise unreadable(self.path, error, key=key) from error
            said = first_line(error, 200)
            if "memory" in said and "alloc" in said:
                raise self.error(key, *causes(MemoryError())) from error
            raise self.error(key, f"it cannot be read ({said})") from error

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
            found = group[name]
            about = h5py.h5o.get_info(found.id)
            if about.rc > 1 or self._keys.setdefault(about.addr, key) != key:
                raise self.error(key, "it is linked more than once", _NOT_OURS)
            self._found[key] = found
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

    def names(self, key: str, *, limit: int = MEMBER_LIMIT) -> list[str]:
        """Returns the names in a group, sorted; an absent group has none."""
        if not self.has(key):
            return []
        with self.reading(key):
            raw: list[bytes] = []

            def collect(name: bytes) -> bool | None:
                raw.append(name)
                return True if len(raw) > limit else None  # True: no further

            self.group(key).id.links.iterate(collect)
            if len(raw) > limit:
                raise self.error(key, f"it has more than {limit} members", _NOT_OURS)
            return sorted(name.decode("utf-8") for name in raw)

    def named(self, key: str) -> list[str]:
        """Returns the names in a group that are given by its writer's user; each may be part of a path."""
        names = self.names(key)
        for name in names:
            if re.fullmatch(NAME, name) is None:
                raise self.error(key, f"{name[:64]!r} is not a name (letters, digits, '_', '-', '.')")
        return names

    def dataset(self, key: str) -> h5py.Dataset:
        """Returns a dataset whose declared type, shape and storage are plausible: reading it is safe."""
        with self.reading(key):
            found = self._find(key)
            if not isinstance(found, h5py.Dataset):
                raise self.error(key, f"an array is expected, this is a {type(found).__name__.lower()}")
            # First of all: the shape of a virtual dataset is asked of the files it names.
            settings = found.id.get_create_plist()
            layout = settings.get_layout()
            if layout == h5py.h5d.VIRTUAL or settings.get_external_count() > 0:
                raise self.error(key, "its data lie in another file", _NOT_OURS)
            if layout not in (h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED):
                raise self.error(key, f"its storage layout {layout} is unknown", _NOT_OURS)
            if settings.get_nfilters():
                raise self.error(key, "it is compressed or filtered, which format 1 does not allow", _NOT_OURS)
            if found.shape is None or len(found.shape) > RANK_LIMIT:
                raise self.error(key, "it has no shape or too many axes", _NOT_OURS)
            if not _is_plain_type(found.id.get_type()):
                raise self.error(key, f"its type {_type_name(found)} is not a number or a fixed string", _NOT_OURS)
            if found.dtype.kind not in "iufS":  # h5py raises here on a damaged type, and nowhere later
                raise self.error(key, f"its type {found.dtype} is not a number or a fixed string", _NOT_OURS)
            self._check_bytes(key, found, chunked=layout == h5py.h5d.CHUNKED)
            encoding = self.text(key, "encoding_version", ENCODING_VERSION)
            if parse_version(encoding)[0] > parse_version(ENCODING_VERSION)[0]:
                what = f"its encoding version is {encoding}, and this version of lvlm_probe reads {ENCODING_VERSION}"
                raise self.error(key, what, "upgrade lvlm_probe")
            return found

    def _check_bytes(self, key: str, dataset: h5py.Dataset, *, chunked: bool) -> None:
        itemsize = dataset.id.get_type().get_size()
        declared = math.prod(dataset.shape) * itemsize
        if declared > self._nbytes:
            what = f"it declares shape {dataset.shape}, {declared} bytes, in a file of {self._nbytes} bytes"
            raise self.error(key, what)
        if chunked:
            chunk = math.prod(dataset.chunks) * itemsize
            if chunk > self._nbytes:
                raise self.error(key, f"it declares chunks of {chunk} bytes in a file of {self._nbytes} bytes")
            count = math.prod(-(-size // side) for size, side in zip(dataset.shape, dataset.chunks, strict=True))
            if count > _MOST_CHUNKS:
                raise self.error(key, f"it declares {count} chunks, more than {_MOST_CHUNKS}", _NOT_OURS)
            if count * _CHUNK_OVERHEAD > self._nbytes:
                raise self.error(key, f"it declares {count} chunks in a file of {self._nbytes} bytes")
        stored = dataset.id.get_storage_size()
        if not declared <= stored <= self._nbytes:
            raise self.error(key, f"it declares {declared} bytes and {stored} are stored")
        if key not in self._counted:
            self._counted.add(key)
            self._declared += declared
        if self._declared > self._nbytes:
            what = f"with it, the members declare {self._declared} bytes together in a file of {self._nbytes} bytes"
            raise self.error(key, what, _NOT_OURS)

    def array(self, key: str, *, dtype: str | None = None, shape: Sequence[int | None] | None = None) -> np.ndarray:
        """Reads an array of numbers after checking its ``dtype`` (``"f4"``) and ``shape`` (None: any)."""
        dataset = self.checked(key, dtype=dtype, shape=shape)
        with self.reading(key):
            return np.asarray(dataset[()], dtype=dataset.dtype.newbyteorder("="))

    def checked(self, key: str, *, dtype: str | None = None, shape: Sequence[int | None] | None = None) -> h5py.Dataset:
        """Returns the dataset that ``array`` would read, checked and unread."""
        dataset = self.dataset(key)
        with self.reading(key):
            found = dataset.dtype.str[1:]
            if found not in _NUMBERS or (dtype is not None and found != dtype):
                raise self.error(key, f"its dtype is {dataset.dtype}, {dtype or 'a number'} is expected")
            if shape is not None and not _fits(dataset.shape, shape):
                wanted = tuple("any" if size is None else size for size in shape)
                raise self.error(key, f"its shape is {dataset.shape}, {wanted} is expected")
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
            return parse_json(bytes(dataset[()]))

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
            value = parse_json(text.encode("utf-8"))
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
            if math.prod(identifier.shape) * kind.get_size() > TEXT_LIMIT:
                raise self.error(where, f"it has more than {TEXT_LIMIT} bytes", _NOT_OURS)
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
    path: str | os.PathLike[str],
    kind: str,
    version: str,
    *,
    known: tuple[Seal, State] | None = None,
    full: bool = False,
    hashed: bool = True,
) -> Iterator[SealedFile]:
    """Opens a file of one kind for reading, after checking its seal.

    Args:
        path: of the file.
        kind: what the seal has to say (``"lvlm_probe.trace"``).
        version: the newest version that the caller understands.
        known: ``seal`` and ``state`` of an earlier opening: the seal is not checked again, and a file that has changed
            since is refused.
        full: hash the file however large it is.
        hashed: False to check only head and length.

    Raises:
        TraceError: anything but a finished, undamaged file of that kind in a version that can be read.
    """
    path = Path(path)
    with open_file(path, before=known is not None) as raw:
        state = state_of(os.fstat(raw.fileno()))
        if known is not None and known[1] != state:
            what = "it changed since this trace was opened"
            raise trace_error(path, "", what, "trace files are never changed: open it again if you trust it")
        seal = known[0] if known is not None else check_open(path, raw, kind, version, full=full, hashed=hashed)
        with _open(path, raw) as file:
            sealed = SealedFile(path, file, seal.nbytes)
            sealed.seal, sealed.state = seal, state
            if sealed.text("/", "format") != kind:
                raise sealed.error("/@format", f"it is {sealed.text('/', 'format')[:64]!r}, {kind!r} is expected")
            found = sealed.text("/", "format_version")
            with sealed.reading("/@format_version"):
                parse_version(found)
            if found != seal.version:
                what = f"it is {found!r}, and the head of the file says {seal.version!r}"
                raise sealed.error("/@format_version", what)
            if sealed.integer("/", "complete") != 1:
                raise sealed.error("/@complete", "it was not finished: the process that wrote it died")
            yield sealed
            if state_of(os.fstat(raw.fileno())) != state:
                raise trace_error(path, "", "it was changed while it was read", "read it again when it is at rest")


@contextlib.contextmanager
def _open(path: Path, raw: io.FileIO) -> Iterator[h5py.File]:
    try:
        file = h5py.File(raw, "r")
    except Exception as error:  # HDF5 reports damage through many types
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise unreadable(path, error) from error
        raise trace_error(path, "", f"HDF5 cannot open it ({error})", _RECORD_AGAIN) from error
    with file:
        yield file
