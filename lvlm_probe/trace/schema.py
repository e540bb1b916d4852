"""The check that a trace file keeps to the format: its fields, images and points, before any array is read."""

from __future__ import annotations

import dataclasses
from typing import Any

from lvlm_probe.storage.reading import SealedFile
from lvlm_probe.trace.records import FIELDS, MODEL_TEXT

FORMAT = "lvlm_probe.trace"
FORMAT_VERSION = "1.1"
ROW_LIMIT = 10_000
"""Traces of one file."""
ROW_BYTES = 1024
"""What a trace takes in its file at least; the headers alone of its members are more."""
IMAGE_LIMIT = 1000
"""Images of one trace."""


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

    attributes: dict[str, Any]
    """The fields that are attributes, by name."""
    sizes: dict[str, int]
    """Letter → size: ``P`` prompt tokens, ``T`` generated tokens, ``N`` image tokens; ``images``, without bound where
    none was kept, as of a recording without a processor."""
    image_sizes: tuple[tuple[int, int], ...]
    """``(width, height)`` of each image, as declared."""
    image_mimes: tuple[str, ...]
    image_nbytes: int
    """Bytes of the encoded images together."""
    model_kwargs: tuple[str, ...]
    points: tuple[PointHeader, ...]
    nbytes: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.sizes["P"]

    @property
    def steps(self) -> int:
        """Tokens of the answer."""
        return self.sizes["T"]

    @property
    def image_tokens(self) -> int:
        """Image tokens of the prompt."""
        return self.sizes["N"]


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
    sizes: dict[str, int] = {}
    for field in FIELDS.values():
        if not field.is_attribute and field.is_kept(file, base):
            nbytes += field.check(file, base, sizes)
    attributes = {name: field.read(file, base, sizes) for name, field in FIELDS.items() if field.is_attribute}
    kwargs = tuple(file.named(f"{base}/inputs/model_kwargs"))
    points = tuple(_point(file, base, name, sizes) for name in file.named(f"{base}/points"))
    image_sizes, mimes, image_bytes = _images(file, base)
    sizes["images"] = len(image_sizes) or 2**31
    nbytes += image_bytes + sum(point.nbytes for point in points)
    nbytes += sum(file.checked(f"{base}/inputs/model_kwargs/{name}").nbytes for name in kwargs)
    return RowHeader(attributes, sizes, image_sizes, mimes, image_bytes, kwargs, points, nbytes)


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
