"""How values become HDF5 members: arrays, tensors of any torch dtype, text and JSON.

Text and JSON are fixed-length UTF-8 strings, whose size is part of the declared type, never variable-length ones, whose
size lies elsewhere in the file and is only known once it has been read. JSON goes into datasets (attributes are limited
to 64 kB), short text and numbers into attributes.
"""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import h5py
import numpy as np

from lvlm_probe.files import NUMBER_DIGITS, json_ready

if TYPE_CHECKING:
    import torch

JSON: TypeAlias = Any
"""A value that ``json`` can write: dict with string keys, list, str, int, float, bool or None."""

ENCODING_VERSION = "1.0"
JSON_LIMIT = 4 * 2**20
"""Bytes of one JSON value: parsing takes up to about 25 times as much memory."""
JSON_DEPTH = 64
"""Lists and objects inside each other: what walks over a value calls itself once for each."""
CHUNK_BYTES = 2**20
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}"
"""Names of members that come from outside: no slash, no leading dot."""

# Torch dtypes that numpy does not have, and the integers their bits are stored as.
_BIT_VIEWS = {
    "bfloat16": "uint16",
    "float8_e4m3fn": "uint8",
    "float8_e5m2": "uint8",
    "float8_e4m3fnuz": "uint8",
    "float8_e5m2fnuz": "uint8",
}
_NATIVE = frozenset(
    "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 float32 float64".split()  # noqa: SIM905
)


def as_array(value: np.ndarray | torch.Tensor) -> tuple[np.ndarray, str]:
    """Returns the array to store and the name of the dtype it stands for; bool becomes uint8, bfloat16 uint16.

    Raises ``TypeError`` for anything but real numbers and booleans.
    """
    name = ""
    # Only a program that has torch already can pass a tensor; reading and writing arrays needs no torch.
    if (torch := sys.modules.get("torch")) is not None and isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        name = str(tensor.dtype).removeprefix("torch.")
        if name in _BIT_VIEWS:
            tensor = tensor.view(getattr(torch, _BIT_VIEWS[name]))
        value = tensor.numpy()
    array = np.asarray(value)
    name = name or array.dtype.name
    if name not in _NATIVE and name not in _BIT_VIEWS:
        raise TypeError(f"a value of dtype {name} cannot be stored; use numbers or booleans")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(array.shape), name


def restore_tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """Undoes ``as_array``; raises ``ValueError`` when the array cannot stand for ``dtype``."""
    import torch

    if dtype not in _NATIVE and dtype not in _BIT_VIEWS:
        raise ValueError(f"unknown dtype {dtype[:32]!r}")
    stored = "uint8" if dtype == "bool" else _BIT_VIEWS.get(dtype, dtype)
    if array.dtype.name != stored:
        raise ValueError(f"{dtype} is stored as {stored}, not as {array.dtype.name}")
    tensor = torch.from_numpy(array)
    target = getattr(torch, dtype)
    return tensor.view(target) if dtype in _BIT_VIEWS else tensor.to(target)


def put_array(
    group: h5py.Group,
    name: str,
    value: np.ndarray | torch.Tensor,
    *,
    encoding: str = "array",
    by_step: bool = False,
) -> h5py.Dataset:
    """Writes an array or tensor with its ``@encoding``, ``@encoding_version`` and ``@dtype``.

    ``by_step`` stores one chunk per index of the first axis (further split above 1 MB), so that a reader can take a few
    steps of a large array; otherwise it is contiguous. Never compressed.
    """
    array, dtype = as_array(value)
    chunks = _step_chunks(array.shape, array.itemsize) if by_step and array.size else None
    dataset = group.create_dataset(name, data=array, chunks=chunks)
    put_text(dataset, "encoding", encoding)
    put_text(dataset, "encoding_version", ENCODING_VERSION)
    put_text(dataset, "dtype", dtype)
    return dataset


def _step_chunks(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...] | None:
    if len(shape) < 2:
        return None
    chunks = [1, *shape[1:]]
    for axis in range(1, len(chunks)):
        size = math.prod(chunks) * itemsize
        if size <= CHUNK_BYTES:
            break
        chunks[axis] = max(1, chunks[axis] * CHUNK_BYTES // size)
    return tuple(chunks)


def put_text(owner: h5py.HLObject, name: str, text: str) -> None:
    """Writes a short text as an attribute."""
    owner.attrs.create(name, _fixed_string(text.encode("utf-8", "replace")))


def json_text(name: str, value: JSON, *, limit: int = JSON_LIMIT) -> str:
    """Returns a value as JSON (RFC 8259); ``ValueError`` above ``limit`` bytes or ``JSON_DEPTH`` levels."""
    plain = json_ready(value, nonfinite=str)
    if (depth := _depth(plain)) > JSON_DEPTH:
        raise ValueError(f"{name!r} has {depth} levels of lists and objects; at most {JSON_DEPTH} can be stored")
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:  # half a surrogate pair, as a tokenizer may show half a character
        text = json.dumps(plain, allow_nan=False, separators=(",", ":"))
        size = len(text)
    if size > limit:
        raise ValueError(f"{name!r} takes {size} bytes as JSON; at most {limit} can be stored")
    return text


def parse_json(data: bytes) -> JSON:
    """Parses untrusted JSON, as RFC 8259 has it and no further.

    Raises ``ValueError`` for NaN and infinity (also as ``1e999``), integers of more than ``NUMBER_DIGITS`` digits, a
    name that an object has twice, more than ``JSON_DEPTH`` levels, and text that is no UTF-8 or no JSON.
    """
    text = data.decode("utf-8")
    try:
        value = json.loads(
            text,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_short,
            object_pairs_hook=_unique,
        )
        deep = text.count("[") + text.count("{") > JSON_DEPTH and _depth(value) > JSON_DEPTH
    except RecursionError as error:
        raise ValueError("RecursionError: it has too many levels of lists and objects") from error
    if deep:
        raise ValueError(f"it has more than {JSON_DEPTH} levels of lists and objects")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:32]} is larger than a float can be")
    return value


def _short(text: str) -> int:
    if len(text) > NUMBER_DIGITS:
        raise ValueError(f"an integer has {len(text)} digits, more than {NUMBER_DIGITS}")
    return int(text)


def _unique(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same name twice")
    return found


def _depth(value: JSON) -> int:
    """Levels of lists and objects, 0 for a plain value; level by level, so that no depth is too deep for it."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, list | dict)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def put_json(group: h5py.Group, name: str, value: JSON) -> h5py.Dataset:
    """Writes a value as a dataset of JSON; raises ``ValueError`` above ``JSON_LIMIT`` bytes."""
    dataset = group.create_dataset(name, data=_fixed_string(json_text(name, value).encode("utf-8")))
    put_text(dataset, "encoding", "json")
    put_text(dataset, "encoding_version", ENCODING_VERSION)
    return dataset


def _fixed_string(data: bytes) -> np.ndarray:
    # A string type of length zero does not exist; one padding byte reads back as the empty string.
    return np.array(data, dtype=h5py.string_dtype("utf-8", max(1, len(data))))
