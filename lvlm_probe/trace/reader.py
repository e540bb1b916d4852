"""One recorded answer, read from its file when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lvlm_probe.errors import PointNotFound
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.trace import description
from lvlm_probe.trace.parts import AttentionRows, check_pixels, decode, read_attention
from lvlm_probe.trace.records import FIELDS, PointRecord
from lvlm_probe.trace.schema import row_key
from lvlm_probe.trace.stored import Images, Kept, StoredAnswer

if TYPE_CHECKING:
    import torch


@naming_arguments
def open_trace(path: str | os.PathLike[str], row: int = 0) -> Trace:
    """Opens one trace of a file; ``row`` counts the rows of the batch, negative from the end.

    Raises ``TraceError`` when the file is missing, damaged, foreign, unfinished or too new, or has no such row.
    """
    trace = Trace(path, row)
    _ = trace.header  # the file is checked now, not at the first use
    return trace


def open_rows(path: str | os.PathLike[str]) -> Iterator[Trace]:
    """Opens every trace of a file, one per row of the batch. Raises ``TraceError`` as :func:`open_trace` does."""
    first = open_trace(path)
    yield first
    for row in range(1, first.rows):
        yield open_trace(path, row=row)


class Trace(StoredAnswer):
    """A recorded answer. Reads its file lazily and keeps it open for no longer than a read takes.

    Picklable (by path), usable as a context manager; after ``close()`` it reads nothing more. Every failed read raises
    ``TraceError`` naming the file, the HDF5 key, the cause and the way out. Files come from anywhere: nothing in them
    is executed, and nothing is allocated on their word.
    """

    @property
    def explanations_dir(self) -> Path:
        """Where explanations of this trace are kept: beside it, never in it."""
        return self.path.parent / "explanations"

    @property
    def points(self) -> tuple[str, ...]:
        """Names of what was recorded inside the model."""
        return tuple(point.name for point in self.header.points)

    def point(self, name: str) -> PointRecord:
        """Reads what was recorded at one point, ``values`` a ``torch.Tensor`` of the recorded dtype.

        Raises ``PointNotFound`` when there is no such point in this trace.
        """
        header = next((point for point in self.header.points if point.name == name), None)
        if header is None:
            known = ", ".join(self.points) or "none"
            raise PointNotFound(f"{self.path}: no point {name!r} was recorded; recorded: {known}")
        key = f"{row_key(self.row)}/points/{name}"
        with self.reading() as file:
            attrs = file.json_text(key, "attrs")
            reduce, module = file.text(key, "reduce", "none"), file.text(key, "module", "")
            values = file.tensor(key)
        return PointRecord(values, header.axes, header.layers, reduce, module, attrs)

    @Kept
    def attention(self) -> AttentionRows | None:
        """Attention of each answer token to the image tokens; None when it was not recorded (``notes`` say why)."""
        with self.reading() as file:
            return read_attention(file, row_key(self.row), self.header)

    @property
    def model_kwargs(self) -> dict[str, torch.Tensor]:
        """What the model was fed besides ``input_ids``, in the recorded dtypes. Read anew each time."""
        base = f"{row_key(self.row)}/inputs/model_kwargs"
        names = self.header.model_kwargs
        with self.reading() as file:
            return {name: file.tensor(f"{base}/{name}") for name in names}

    @Kept
    def images(self) -> tuple[Image.Image, ...]:
        """The original images, RGB; each that is taken out is a copy."""
        check_pixels(self.path, f"{row_key(self.row)}/images", self.header.image_sizes, self.header.image_nbytes)
        rest = range(1, len(self.header.image_sizes))
        return Images([self._first_image, *map(self._image, rest)] if self.header.image_sizes else [])

    def _image(self, index: int) -> Image.Image:
        return decode(self.image_record(index), self.path, f"{row_key(self.row)}/images/{index:03d}")

    @property
    def image(self) -> Image.Image:
        """The first original image, RGB, a copy. Raises ``ImageError`` when the trace holds none."""
        return self._first_image

    @Kept
    def _first_image(self) -> Image.Image:
        return self._image(0)

    def verify(self) -> None:
        """Hashes the whole file, however large, and reads every member; ``TraceError`` at the first fault."""
        with self.reading(full=True):
            pass
        for name in (*FIELDS, *_DERIVED):
            getattr(self, name)
        check_pixels(self.path, f"{row_key(self.row)}/images", self.header.image_sizes, self.header.image_nbytes)
        for index in range(len(self.header.image_sizes)):  # one at a time: together they may be large
            self._image(index)
        for name in self.points:
            self.point(name)

    def describe(self) -> str:
        """Return the trace as a person wants to read it: plain text, at most 80 columns."""
        return description.describe(self)

    def _repr_html_(self) -> str:
        return description.to_html(self)


_DERIVED = ("created", "writer", "seconds", "model", "model_kwargs", "layout", "words", "llr", "attention")
