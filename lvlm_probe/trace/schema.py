"""What a trace file contains: names, dtypes, shapes, and the check that a file keeps to them. ``SPEC.md`` in code.

Sizes: ``P`` prompt tokens, ``T`` generated tokens, ``N`` image tokens, ``4`` itself.
"""

from __future__ import annotations

import dataclasses
import re

from lvlm_probe.storage.encoding import NAME
from lvlm_probe.storage.reading import SealedFile

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "IMAGE_LIMIT",
    "MODEL_JSON",
    "MODEL_TEXT",
    "ROW_ARRAYS",
    "ROW_BYTES",
    "ROW_JSON",
    "ROW_LIMIT",
    "STATUSES",
    "TRACE_ID",
    "ArraySpec",
    "PointHeader",
    "RowHeader",
    "named_members",
    "row_count",
    "row_key",
    "validate",
    "validate_row",
]

FORMAT = "lvlm_probe.trace"
FORMAT_VERSION = "1.0"
ROW_LIMIT = 10_000
"""Traces of one file."""
ROW_BYTES = 1024
"""What a trace takes in its file at least; the headers alone of its members are more."""
IMAGE_LIMIT = 1000
"""Images of one trace."""
TRACE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}")
"""A trace id names files beside the trace (``explanations/<trace_id>.<method>.h5``): no slash, no leading dot."""

STATUSES = ("complete", "stopped", "error")
SOURCES = ("generation", "teacher_forced")
MODEL_TEXT = ("model_id", "revision", "class", "adapter", "attn_implementation", "torch_dtype", "fingerprint")
MODEL_JSON = ("config", "generation_config", "versions")


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """An array of a trace: dtype on disk, sizes by letter, and whether it may be absent."""

    dtype: str
    sizes: tuple[str, ...]
    optional: bool = False


ROW_ARRAYS: dict[str, ArraySpec] = {
    "inputs/input_ids": ArraySpec("i4", ("P",)),
    "layout/image_positions": ArraySpec("i4", ("N",)),
    "layout/image_index": ArraySpec("i4", ("N",)),
    "layout/patch_box": ArraySpec("f4", ("N", "4"), optional=True),
    "output/token_ids": ArraySpec("i4", ("T",)),
    "output/special": ArraySpec("u1", ("T",)),
    "output/log_probs": ArraySpec("f4", ("T",)),
    "output/baseline_log_probs": ArraySpec("f4", ("T",), optional=True),
}
ROW_JSON: dict[str, bool] = {
    "inputs/prompt": False,
    "inputs/question": True,
    "inputs/processor_call": True,
    "output/pieces": False,
    "output/baseline": True,
    "notes": True,
    "meta": True,
    "error": True,
}
"""JSON members of a trace, and whether each may be absent."""


@dataclasses.dataclass(frozen=True)
class PointHeader:
    """What is known of a recorded point without reading its values."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    layers: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class RowHeader:
    """What is known of a trace once its structure has been checked."""

    trace_id: str
    batch_row: int
    status: str
    log_probs_source: str
    prompt_tokens: int
    steps: int
    image_tokens: int
    image_sizes: tuple[tuple[int, int], ...]
    """``(width, height)`` of each image, as declared."""
    image_mimes: tuple[str, ...]
    image_nbytes: int
    """Bytes of the encoded images together."""
    model_kwargs: tuple[str, ...]
    points: tuple[PointHeader, ...]
    nbytes: int


def row_key(row: int) -> str:
    """Returns the group of a row: ``traces/000000``."""
    return f"traces/{row:06d}"


def validate(file: SealedFile) -> int:
    """Checks the top of a trace file and returns how many traces it holds. Raises ``TraceError``."""
    for name in MODEL_TEXT:
        file.text("model", name, "")
    return row_count(file)


def row_count(file: SealedFile) -> int:
    """Returns how many traces the file holds, as far as its size allows. Raises ``TraceError``."""
    file.group("traces")
    rows = file.integer("traces", "rows", low=1, high=ROW_LIMIT)
    if rows is None:
        raise file.error("traces@rows", "it is missing")
    if rows * ROW_BYTES > file.nbytes:
        raise file.error("traces@rows", f"it is {rows}, more than a file of {file.nbytes} bytes can hold")
    return rows


def validate_row(file: SealedFile, row: int) -> RowHeader:
    """Checks the structure of one trace without reading its arrays. Raises ``TraceError`` naming the member."""
    base = row_key(row)
    file.group(base)
    nbytes = 0
    sizes: dict[str, int] = {"4": 4}
    for name, spec in ROW_ARRAYS.items():
        key = f"{base}/{name}"
        if spec.optional and not file.has(key):
            continue
        dataset = file.checked(key, dtype=spec.dtype, shape=[sizes.get(size) for size in spec.sizes])
        for size, letter in zip(dataset.shape, spec.sizes, strict=True):
            sizes[letter] = size
        nbytes += dataset.nbytes
    for name, optional in ROW_JSON.items():
        if not optional or file.has(f"{base}/{name}"):
            nbytes += file.dataset(f"{base}/{name}").nbytes
    trace_id = file.text(base, "trace_id")
    if TRACE_ID.fullmatch(trace_id) is None:
        raise file.error(f"{base}@trace_id", f"{trace_id[:64]!r} is not a trace id (letters, digits, '_', '-', '.')")
    kwargs = named_members(file, f"{base}/inputs/model_kwargs")
    points = tuple(_point(file, base, name, sizes) for name in named_members(file, f"{base}/points"))
    image_sizes, mimes, image_bytes = _images(file, base)
    nbytes += image_bytes + sum(point.nbytes for point in points)
    nbytes += sum(file.checked(f"{base}/inputs/model_kwargs/{name}").nbytes for name in kwargs)
    return RowHeader(
        trace_id=trace_id,
        batch_row=file.integer(base, "batch_row", low=0, high=2**31 - 1) or 0,
        status=_one_of(file, base, "status", STATUSES),
        log_probs_source=_one_of(file, f"{base}/output/log_probs", "source", SOURCES),
        prompt_tokens=sizes["P"],
        steps=sizes["T"],
        image_tokens=sizes["N"],
        image_sizes=image_sizes,
        image_mimes=mimes,
        image_nbytes=image_bytes,
        model_kwargs=kwargs,
        points=points,
        nbytes=nbytes,
    )


def _one_of(file: SealedFile, key: str, name: str, allowed: tuple[str, ...]) -> str:
    value = file.text(key, name)
    if value not in allowed:
        raise file.error(f"{key}@{name}", f"it is {value[:32]!r}, one of {', '.join(allowed)} is expected")
    return value


def named_members(file: SealedFile, key: str) -> tuple[str, ...]:
    """Returns the names in a group, sorted; each may be part of a path. Raises ``TraceError``."""
    names = file.names(key)
    for name in names:
        if re.fullmatch(NAME, name) is None:
            raise file.error(key, f"{name[:64]!r} is not a name (letters, digits, '_', '-', '.')")
    return tuple(names)


def _images(file: SealedFile, base: str) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...], int]:
    image_sizes, mimes, nbytes = [], [], 0
    names = file.names(f"{base}/images", limit=IMAGE_LIMIT)
    if names != [f"{index:03d}" for index in range(len(names))]:
        raise file.error(f"{base}/images", f"images are numbered 000, 001, ...; these are {names[:4]}")
    for name in names:
        key = f"{base}/images/{name}"
        nbytes += file.checked(key, dtype="u1", shape=[None]).nbytes
        width, height = (file.integer(key, side, low=1, high=2**20) for side in ("width", "height"))
        if width is None or height is None:
            raise file.error(key, "its width and height are missing")
        image_sizes.append((width, height))
        mimes.append(file.text(key, "mime"))
    return tuple(image_sizes), tuple(mimes), nbytes


def _point(file: SealedFile, base: str, name: str, sizes: dict[str, int]) -> PointHeader:
    key = f"{base}/points/{name}"
    dataset = file.checked(key)
    axes = tuple(filter(None, file.text(key, "axes").split(",")))
    layers = file.integers(key, "layers")
    if len(axes) != len(dataset.shape):
        raise file.error(f"{key}@axes", f"{len(axes)} axes {axes} are named for shape {dataset.shape}")
    expected = {"step": sizes["T"], "image_token": sizes["N"], "layer": len(layers)}
    for axis, size in zip(axes, dataset.shape, strict=True):
        if size != expected.get(axis, size):
            raise file.error(key, f"its axis {axis!r} has size {size} where {expected[axis]} is expected")
    return PointHeader(name, tuple(dataset.shape), axes, layers, file.text(key, "dtype"), dataset.nbytes)
