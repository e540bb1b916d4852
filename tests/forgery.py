"""Damages trace files as a determined forger would: behind a valid seal, and behind renewed HDF5 checksums.

Most random damage to HDF5's metadata is stopped by the checksums they carry (Bob Jenkins' lookup3, HDF5 File Format
Specification, version 3). To see what the parser itself and our checks behind it make of hostile metadata, the
checksums must be renewed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

from lvlm_probe.storage.seal import BLOCK_BYTES

_MASK = 0xFFFFFFFF
# A block of metadata: where it starts, where what may be changed starts, and where its checksum is.
Block = tuple[int, int, int]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Changes a few bytes anywhere behind the seal, or cuts the file short."""
    blob = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        size = rng.choice([1, 1, 2, 4, 8, 32])
        _change(blob, rng.randrange(BLOCK_BYTES, len(blob) - size), size, rng)
    return bytes(blob[: rng.randrange(BLOCK_BYTES + 8, len(blob))] if rng.random() < 0.1 else blob)


def mutate_metadata(data: bytes, blocks: Sequence[Block], rng: random.Random) -> bytes:
    """Changes a few bytes of one or two blocks of metadata and renews their checksums."""
    blob = bytearray(data)
    for start, first, end in rng.choices(blocks, k=rng.choice([1, 1, 1, 2])):
        for _ in range(rng.choice([1, 1, 2, 4])):
            position = rng.randrange(first, end)
            _change(blob, position, min(rng.choice([1, 1, 2, 4, 8]), end - position), rng)
        blob[end : end + 4] = lookup3(bytes(blob[start:end])).to_bytes(4, "little")
    return bytes(blob)


def _change(blob: bytearray, start: int, size: int, rng: random.Random) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        blob[start] ^= 1 << rng.randrange(8)
    elif kind == 1:
        blob[start : start + size] = rng.randbytes(size)
    elif kind == 2:
        blob[start : start + size] = b"\xff" * size
    elif kind == 3:
        blob[start : start + size] = bytes(size)
    else:
        other = rng.randrange(BLOCK_BYTES, len(blob) - size)
        blob[start : start + size] = blob[other : other + size]


def metadata_blocks(data: bytes) -> list[Block]:
    """Finds the object headers (``OHDR``) and their continuations (``OCHK``) of a file, each with a valid checksum."""
    blocks: list[Block] = []
    for signature in (b"OHDR", b"OCHK"):
        start = data.find(signature, BLOCK_BYTES)
        while start >= 0:
            # The length is written in several places; trying is shorter than parsing them.
            for end in range(start + 8, min(start + 1200, len(data) - 4)):
                if lookup3(data[start:end]) == int.from_bytes(data[end : end + 4], "little"):
                    blocks.append((start, start + (7 if signature == b"OHDR" else 4), end))
                    break
            start = data.find(signature, start + 4)
    return blocks


def lookup3(key: bytes) -> int:
    """Bob Jenkins' ``hashlittle(key, length, 0)``, the checksum of HDF5 metadata."""
    length = len(key)
    a = b = c = (0xDEADBEEF + length) & _MASK
    position = 0
    while length - position > 12:
        a, b, c = (_word(key, position, a), _word(key, position + 4, b), _word(key, position + 8, c))
        for left, right, shift in _MIX:
            values = {"a": a, "b": b, "c": c}
            values[left] = ((values[left] - values[right]) & _MASK) ^ _rotate(values[right], shift)
            third = next(name for name in "abc" if name not in (left, right))
            values[right] = (values[right] + values[third]) & _MASK
            a, b, c = values["a"], values["b"], values["c"]
        position += 12
    if position == length:
        return c
    tail = key[position:].ljust(12, b"\0")
    a, b, c = _word(tail, 0, a), _word(tail, 4, b), _word(tail, 8, c)
    c = ((c ^ b) - _rotate(b, 14)) & _MASK
    a = ((a ^ c) - _rotate(c, 11)) & _MASK
    b = ((b ^ a) - _rotate(a, 25)) & _MASK
    c = ((c ^ b) - _rotate(b, 16)) & _MASK
    a = ((a ^ c) - _rotate(c, 4)) & _MASK
    b = ((b ^ a) - _rotate(a, 14)) & _MASK
    return ((c ^ b) - _rotate(b, 24)) & _MASK


_MIX = (("a", "c", 4), ("b", "a", 6), ("c", "b", 8), ("a", "c", 16), ("b", "a", 19), ("c", "b", 4))


def _word(key: bytes, position: int, value: int) -> int:
    return (value + int.from_bytes(key[position : position + 4], "little")) & _MASK


def _rotate(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (32 - bits))) & _MASK


def write_seal(path: Path, kind: str, version: str) -> None:
    """Seals a file with a user block for what is in it now, which may be more than fits into memory."""
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(BLOCK_BYTES)
        # A sparse file of terabytes takes hours to hash; its seal does not fit, which is a way to be refused too.
        digest = hashlib.file_digest(file, "sha256").hexdigest() if size < 1 << 30 else "0" * 64
        head = f"{kind} {version}\nbytes {size}\nsha256 {digest}\n".encode("ascii")
        file.seek(0)
        file.write(head.ljust(BLOCK_BYTES - 1, b" ") + b"\n")


def resealed(data: bytes, first: bytes | None = None) -> bytes:
    """The same content with a seal that fits its length and hash; kind and version as they were, unless given."""
    first = data[:BLOCK_BYTES].split(b"\n")[0] if first is None else first
    digest = hashlib.sha256(data[BLOCK_BYTES:]).hexdigest()
    head = first + f"\nbytes {len(data)}\nsha256 {digest}\n".encode("ascii")
    return head.ljust(BLOCK_BYTES - 1, b" ") + b"\n" + data[BLOCK_BYTES:]
