"""Kinds of fields of a trace: how a value becomes a member of a file, how that is checked, and how it is read back.

A field is declared once, as a row of the table in :mod:`~lvlm_probe.trace.records`. Its kind knows how to ``put`` a
value into the group of a trace, to ``check`` the structure of the member without reading it, and to ``read`` it.

Letters stand for sizes: ``P`` prompt tokens, ``T`` generated tokens, ``N`` image tokens, ``images`` images. The first
array that has a letter sets its size, in the order of the table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np

from lvlm_probe.storage.encoding import put_array, put_json, put_text
from lvlm_probe.storage.reading import SealedFile

_IN_MEMORY = {"i4": "int64", "f4": "float32", "u1": "bool"}
_BEYOND = {"P": "it points outside the prompt:", "images": "it names images"}
_JSON = {"text": str, "object": dict, "list of texts": list}


@dataclass(frozen=True)
class Field:
    """What a trace keeps under one key.

    Attributes:
        key: path in the group of the trace, ``output/log_probs``; of an attribute its owner, ``@`` and its name.
        about: what it is: its line in ``SPEC.md``, and the documentation of the attribute of ``Trace``.
        optional: absent means not recorded, and reads as the default of the row.
        since: the version of the format that brought it.
    """

    key: str
    about: str = field(kw_only=True)
    optional: bool = field(default=False, kw_only=True)
    since: str = field(default="1.0", kw_only=True)

    @property
    def is_attribute(self) -> bool:
        """Whether it is an HDF5 attribute, which is read with the header of a trace."""
        return "@" in self.key

    @property
    def described(self) -> tuple[str, str]:
        """Type and shape on disk, as ``SPEC.md`` has them."""
        return type(self).__name__.lower(), ""

    @property
    def sentence(self) -> str:
        """What it is, for the documentation of the attribute of ``Trace``."""
        return f"{self.about[0].upper()}{self.about[1:]}."

    def put(self, trace: h5py.Group, value: Any) -> None:
        """Write a value. Raises ``TypeError`` or ``ValueError`` for one that cannot be kept."""
        raise NotImplementedError

    def is_kept(self, file: SealedFile, base: str) -> bool:
        """Whether the trace at ``base`` has to have it, or has it: a member that is optional may be absent."""
        return not self.optional or file.has(f"{base}/{self.key}")

    def check(self, file: SealedFile, base: str, sizes: dict[str, int]) -> int:
        """Check the structure of the member and return its bytes. Raises ``TraceError``."""
        return int(file.dataset(f"{base}/{self.key}").nbytes)

    def read(self, file: SealedFile, base: str, sizes: dict[str, int]) -> Any:
        """Read the value of the trace at ``base``, which has it. Raises ``TraceError``."""
        raise NotImplementedError

    def _owner(self, base: str) -> tuple[str, str]:
        owner, _, name = self.key.rpartition("@")
        return f"{base}/{owner}".rstrip("/"), name


@dataclass(frozen=True)
class Text(Field):
    """A short text, an attribute: one of a few, or one that fits a pattern."""

    one_of: tuple[str, ...] = ()
    pattern: re.Pattern[str] | None = None

    def put(self, trace: h5py.Group, value: Any) -> None:
        owner, name = self._owner(trace.name)
        put_text(trace[owner], name, value)

    def read(self, file: SealedFile, base: str, sizes: dict[str, int]) -> str:
        owner, name = self._owner(base)
        value = file.text(owner, name)
        if self.one_of and value not in self.one_of:
            what = f"it is {value[:32]!r}, one of {', '.join(self.one_of)} is expected"
            raise file.error(f"{owner}@{name}", what)
        if self.pattern is not None and self.pattern.fullmatch(value) is None:
            what = f"{value[:64]!r} is not a {name.replace('_', ' ')} (letters, digits, '_', '-', '.')"
            raise file.error(f"{owner}@{name}", what)
        return value


@dataclass(frozen=True)
class Integer(Field):
    """An integer within bounds, an attribute."""

    low: int = -(2**63)
    high: int = 2**63 - 1

    def put(self, trace: h5py.Group, value: Any) -> None:
        owner, name = self._owner(trace.name)
        trace[owner].attrs.create(name, np.int64(value))

    def read(self, file: SealedFile, base: str, sizes: dict[str, int]) -> int | None:
        owner, name = self._owner(base)
        value = file.integer(owner, name, low=self.low, high=self.high)
        if value is None and not self.optional:
            raise file.error(f"{owner}@{name}", "it is missing")
        return value


@dataclass(frozen=True)
class Array(Field):
    """An array of numbers: dtype on disk, and sizes by letter or number (``"N, 4"``).

    ``below`` is for indices: the letter of the size that they stay below.
    """

    dtype: str
    shape: str
    below: str = ""

    @property
    def described(self) -> tuple[str, str]:
        return self.dtype, f"({self.shape})"

    @property
    def sentence(self) -> str:
        return f"{super().sentence[:-1]}, ``({self.shape})`` {_IN_MEMORY[self.dtype]}."

    def put(self, trace: h5py.Group, value: Any) -> None:
        array = np.asarray(value)
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf; integers are compared
            cast = array.astype(self.dtype)
        # A number that does not survive is an error, not a different number.
        if self.dtype[0] in "iu" and not np.array_equal(cast, array):
            raise ValueError(f"{self.key} has values that do not fit into {self.dtype}")
        put_array(trace, self.key, cast)

    def check(self, file: SealedFile, base: str, sizes: dict[str, int]) -> int:
        letters = self.shape.split(", ")
        known = [int(letter) if letter.isdecimal() else sizes.get(letter) for letter in letters]
        dataset = file.checked(f"{base}/{self.key}", dtype=self.dtype, shape=known)
        sizes.update(zip(letters, dataset.shape, strict=True))
        return int(dataset.nbytes)

    def read(self, file: SealedFile, base: str, sizes: dict[str, int]) -> np.ndarray:
        key = f"{base}/{self.key}"
        array: np.ndarray = file.array(key).astype(_IN_MEMORY[self.dtype])
        if self.below and array.size:
            low, high, size = array.min(), array.max(), sizes[self.below]
            if low < 0 or high >= size:
                raise file.error(key, f"{_BEYOND[self.below]} {low} to {high} of {size}")
        array.flags.writeable = False  # cached, and shared by everyone who asks
        return array


@dataclass(frozen=True)
class Json(Field):
    """JSON of one kind: ``text``, ``object`` or ``list of texts``; ``count`` is the letter of a list's length."""

    kind: str
    count: str = ""

    @property
    def described(self) -> tuple[str, str]:
        return f"JSON {self.kind}", f"({self.count})" if self.count else ""

    def put(self, trace: h5py.Group, value: Any) -> None:
        put_json(trace, self.key, value)

    def read(self, file: SealedFile, base: str, sizes: dict[str, int]) -> Any:
        key = f"{base}/{self.key}"
        value = file.json(key)
        if not isinstance(value, _JSON[self.kind]):
            raise file.error(key, f"its JSON is a {type(value).__name__}, a {self.kind} is expected")
        if isinstance(value, list):
            if not all(isinstance(item, str) for item in value):
                raise file.error(key, f"a {self.kind} is expected")
            if self.count and len(value) != sizes[self.count]:
                name = self.key.rpartition("/")[2]
                raise file.error(key, f"{len(value)} {name} for {sizes[self.count]} tokens")
        return value
