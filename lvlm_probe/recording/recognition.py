"""Tensors recognised by a hash per row: cast, moved, joined with others, repeated, reordered or filled up.

A row is an image, a tile ``(channel, row, col)`` or a patch ``(element,)``. Rows are hashed in the dtype that a
processor returns and in half precision, for inputs are cast to the model's; 8 bytes of each are kept. Of tensors that
were cast up again the narrower dtype is looked for.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

_ROW = 8  # bytes of a row's hash
_HALVES = (torch.bfloat16, torch.float16)

Prints = dict[torch.dtype, tuple[tuple[int, ...], bytes]]
"""Of one tensor, by dtype: the shape of a row and the hashes of all rows one after another."""

Rows = dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]
"""Of several tensors, by name: dtype, the shape of a row, and the hashes of all rows."""


class _Printed(Protocol):
    @property
    def prints(self) -> Mapping[str, Prints]: ...


_Part = TypeVar("_Part", bound=_Printed)


def _lead(value: torch.Tensor) -> int:
    """How many axes count rows: up to an image or tile ``(channel, row, col)``, or a patch ``(element,)``."""
    if value.is_floating_point():
        return value.ndim - 3 if value.ndim >= 4 else max(1, value.ndim - 1)
    return max(1, value.ndim - 2) if value.ndim >= 3 else 1


def _hashes(value: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    if value.ndim == 0:
        value = value[None]
    lead = _lead(value)
    tail = tuple(value.shape[lead:])
    count = int(np.prod(value.shape[:lead]))
    plain = value.detach().cpu().contiguous()
    if count == 0 or plain.numel() == 0:
        return tail, b""
    data = plain.view(torch.uint8).numpy().reshape(-1).data
    width = len(data) // count
    rows = (data[start : start + width] for start in range(0, len(data), width))
    return tail, b"".join(hashlib.blake2b(row, digest_size=_ROW).digest() for row in rows)


def _canonical(value: torch.Tensor) -> torch.Tensor:
    return value if value.is_floating_point() else value.to(torch.int64)


def prints_of(value: torch.Tensor, dtypes: Sequence[torch.dtype] | None = None) -> Prints:
    """The hashes of a tensor's rows, in ``dtypes``; by default in all that a model may be fed it in."""
    value = _canonical(value)
    if dtypes is None:
        dtypes = (value.dtype, torch.float32, *_HALVES) if value.is_floating_point() else (value.dtype,)
    return {dtype: _hashes(value.to(dtype)) for dtype in dict.fromkeys(dtypes)}


def digest(name: str, dtype: torch.dtype, rows: tuple[tuple[int, ...], bytes]) -> bytes:
    """One hash of a whole tensor under a name, from its rows'."""
    return hashlib.blake2b(f"{name} {dtype} {rows[0]}".encode() + rows[1], digest_size=_ROW).digest()


def shares_of(value: torch.Tensor, units: int, outputs: Mapping[str, torch.Tensor]) -> list[slice] | None:
    """The hashes of a tensor that belong to each of ``units`` images or prompts; ``None`` where that cannot be told."""
    if value.ndim == 0:
        return None
    first = len(value)
    each = int(np.prod(value.shape[1 : _lead(value)]))
    counts: list[int] | None = None
    if first == units:
        counts = [1] * units
    else:
        for grid in outputs.values():  # patches, height and width of each image (Qwen)
            if grid.ndim == 2 and len(grid) == units and not grid.is_floating_point():
                found = [int(row.prod()) for row in grid.long()]
                if sum(found) == first:
                    counts = found
    if counts is None:
        return None
    ends = np.cumsum([0, *counts]) * each * _ROW
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]


def readings(given: Mapping[str, torch.Tensor], filled: bool) -> Iterator[Rows]:
    """The hashes of what was given, in its own dtype and in each one it was cast up from."""
    narrower = (None, torch.float32, torch.bfloat16, torch.float16)
    for dtype in narrower:
        rows: Rows = {}
        for name, value in given.items():
            value = _canonical(value)
            if dtype is not None and value.is_floating_point():
                if value.dtype.itemsize <= dtype.itemsize:
                    break
                small = value.to(dtype)
                if not torch.equal(small.to(value.dtype), value):
                    break
                value = small
            tail, hashes = _hashes(value)
            rows[name] = value.dtype, tail, _without_filling(hashes, tail, value.dtype) if filled else hashes
        else:
            yield rows


def _without_filling(hashes: bytes, tail: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """Hashes of rows that are not zero throughout: those that only fill a batch up to its longest row are."""
    zero = _hashes(torch.zeros(1, *tail, dtype=dtype))[1]
    return b"".join(row for k in range(0, len(hashes), _ROW) if (row := hashes[k : k + _ROW]) != zero)


def cover(given: Rows, parts: Sequence[_Part], filled: bool) -> list[_Part] | None:
    """Parts whose rows, one after another, are those given; the largest and latest where several would do."""
    usable: list[tuple[_Part, dict[str, bytes]]] = []
    for part in parts:
        rows: dict[str, bytes] = {}
        for name, (dtype, tail, _) in given.items():
            known = part.prints.get(name, {}).get(dtype)
            if known is None:
                continue
            if known[0] != tail:
                break
            rows[name] = _without_filling(known[1], tail, dtype) if filled else known[1]
        else:
            if any(rows[name] for name in rows if given[name][0].is_floating_point):
                usable.append((part, rows))
    usable.sort(key=lambda item: -sum(map(len, item[1].values())))  # stable: the latest first among equals
    names = list(given)
    ends = tuple(len(given[name][2]) for name in names)
    tried: set[tuple[int, ...]] = set()
    waiting: list[tuple[tuple[int, ...], tuple[Any, ...]]] = [((0,) * len(names), ())]
    while waiting:
        at, chosen = waiting.pop()
        if at == ends:
            found: list[_Part] = []
            while chosen:
                part, chosen = chosen
                found.append(part)
            return found[::-1]
        if at in tried:
            continue
        tried.add(at)
        onward = []
        for part, rows in usable:
            fits = all(given[n][2].startswith(rows[n], at[k]) for k, n in enumerate(names) if n in rows)
            after = tuple(at[k] + len(rows.get(n, b"")) for k, n in enumerate(names))
            if fits and after != at:
                onward.append((after, (part, chosen)))
        waiting += reversed(onward)
    return None
