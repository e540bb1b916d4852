"""One recorded answer, read from its file when asked for."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lvlm_probe.errors import ImageError, PointNotFound
from lvlm_probe.files import State
from lvlm_probe.storage.reading import SealedFile, open_sealed
from lvlm_probe.storage.seal import Seal, trace_error
from lvlm_probe.trace.parts import AttentionRows, Layout, check_pixels, decode, read_attention, read_image
from lvlm_probe.trace.records import JSON, ImageRecord, PointRecord
from lvlm_probe.trace.schema import (
    FORMAT,
    FORMAT_VERSION,
    MODEL_JSON,
    MODEL_TEXT,
    RowHeader,
    row_key,
    validate,
    validate_row,
)
from lvlm_probe.words import Word, group_words

if TYPE_CHECKING:
    import torch

__all__ = ["Trace", "open_trace"]


def open_trace(path: str | os.PathLike[str], row: int = 0) -> Trace:
    """Opens one trace of a file; ``row`` counts the rows of the batch, negative from the end.

    Raises ``TraceError`` when the file is missing, damaged, foreign, unfinished or too new, or has no such row.
    """
    trace = Trace(path, row)
    _ = trace.header  # the file is checked now, not at the first use
    return trace


class Trace:
    """A recorded answer. Reads its file lazily and keeps it open for no longer than a read takes.

    Picklable (by path), usable as a context manager; after ``close()`` it reads nothing more. Every failed read raises
    ``TraceError`` naming the file, the HDF5 key, the cause and the way out. Files come from anywhere: nothing in them
    is executed, and nothing is allocated on their word.
    """

    def __init__(self, path: str | os.PathLike[str], row: int = 0) -> None:
        self.path = Path(path)
        self._asked_row = row
        self._known: tuple[Seal, State] | None = None
        self._closed = False

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forgets what was read; the trace cannot be read after this."""
        self._closed = True
        for name in list(self.__dict__):
            if isinstance(getattr(type(self), name, None), functools.cached_property):
                del self.__dict__[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return Trace, (self.path, self._asked_row)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trace):
            return NotImplemented
        return (self.path, self._asked_row) == (other.path, other._asked_row)

    def __hash__(self) -> int:
        return hash((self.path, self._asked_row))

    def __repr__(self) -> str:
        return f"Trace({str(self.path)!r}, row={self._asked_row})"

    @contextlib.contextmanager
    def _open(self, *, full: bool = False) -> Iterator[SealedFile]:
        if self._closed:
            raise trace_error(self.path, "", "this trace is closed", "open it again with open_trace()")
        known = None if full else self._known
        with open_sealed(self.path, FORMAT, FORMAT_VERSION, known=known, full=full) as file:
            assert file.seal is not None
            assert file.state is not None
            self._known = file.seal, file.state
            yield file

    @functools.cached_property
    def _checked(self) -> tuple[int, RowHeader, int]:
        with self._open() as file:
            rows = validate(file)
            row = self._asked_row + rows if self._asked_row < 0 else self._asked_row
            if not 0 <= row < rows:
                what = f"it has {rows} row{'s' * (rows != 1)}, there is no row {self._asked_row}"
                raise trace_error(self.path, "traces", what, f"ask for row 0 to {rows - 1}")
            return row, validate_row(file, row), rows

    @property
    def header(self) -> RowHeader:
        """Sizes and names, known without reading any array."""
        return self._checked[1]

    @property
    def row(self) -> int:
        """Index of this trace in its file, which is its row in the batch unless rows were left out."""
        return self._checked[0]

    @property
    def rows(self) -> int:
        """How many traces the file holds."""
        return self._checked[2]

    @property
    def trace_id(self) -> str:
        return self.header.trace_id

    @property
    def batch_row(self) -> int:
        return self.header.batch_row

    @property
    def status(self) -> str:
        """``complete``; ``stopped`` when generation was cut off; ``error`` when recording failed on the way."""
        return self.header.status

    @property
    def log_probs_source(self) -> str:
        """``generation``, or ``teacher_forced`` when the answer went through the model a second time (beam search)."""
        return self.header.log_probs_source

    @property
    def nbytes(self) -> int:
        """Bytes of this trace's data in the file."""
        return self.header.nbytes

    @property
    def explanations_dir(self) -> Path:
        """Where explanations of this trace are kept: beside it, never in it."""
        return self.path.parent / "explanations"

    def _array(self, key: str, dtype: type) -> np.ndarray:
        base = row_key(self.row)
        with self._open() as file:
            array: np.ndarray = file.array(f"{base}/{key}").astype(dtype)
        array.flags.writeable = False  # cached, and shared by everyone who asks
        return array

    def _json(self, key: str, kind: type | tuple[type, ...], default: JSON = None) -> JSON:
        key = f"{row_key(self.row)}/{key}"
        with self._open() as file:
            if not file.has(key):
                return default
            value = file.json(key)
            if not isinstance(value, kind):
                raise file.error(key, f"its JSON is a {type(value).__name__}, which does not belong here")
            return value

    def _texts(self, key: str) -> list[str]:
        values = self._json(key, list, [])
        if not all(isinstance(value, str) for value in values):
            raise trace_error(self.path, f"{row_key(self.row)}/{key}", "a list of texts is expected", "record it again")
        return list(values)

    @functools.cached_property
    def created(self) -> str:
        """When recording began: ISO-8601, UTC."""
        with self._open() as file:
            return file.text("/", "created", "")

    @functools.cached_property
    def writer(self) -> str:
        """Program and version that wrote the file."""
        with self._open() as file:
            return file.text("/", "writer", "")

    @functools.cached_property
    def seconds(self) -> dict[str, JSON]:
        """Seconds that the recorded call took, by part."""
        with self._open() as file:
            value = file.json("seconds") if file.has("seconds") else {}
        return value if isinstance(value, dict) else {}

    @functools.cached_property
    def error(self) -> str | None:
        """What went wrong while recording, when ``status`` is ``error``."""
        return self._json("error", str)

    @functools.cached_property
    def prompt(self) -> str:
        return self._json("inputs/prompt", str, "")

    @functools.cached_property
    def question(self) -> str | None:
        return self._json("inputs/question", str)

    @functools.cached_property
    def input_ids(self) -> np.ndarray:
        """Prompt token ids without padding, ``(P,)`` int64."""
        return self._array("inputs/input_ids", np.int64)

    @functools.cached_property
    def token_ids(self) -> np.ndarray:
        """Ids of the generated tokens, ``(step,)`` int64."""
        return self._array("output/token_ids", np.int64)

    @functools.cached_property
    def tokens(self) -> list[str]:
        """Display text of each generated token; joined, the answer."""
        pieces = self._texts("output/pieces")
        if len(pieces) != self.header.steps:
            what = f"{len(pieces)} pieces for {self.header.steps} tokens"
            raise trace_error(self.path, f"{row_key(self.row)}/output/pieces", what, "record it again")
        return pieces

    @functools.cached_property
    def special(self) -> np.ndarray:
        """``(step,)`` bool: end-of-turn, padding and their like."""
        return self._array("output/special", np.bool_)

    @functools.cached_property
    def answer(self) -> str:
        """The answer as text, without special tokens."""
        return "".join(piece for piece, flag in zip(self.tokens, self.special, strict=True) if not flag)

    @functools.cached_property
    def words(self) -> list[Word]:
        """The words of the answer as spans of tokens."""
        return group_words(self.tokens, self.special.tolist())

    @functools.cached_property
    def log_probs(self) -> np.ndarray:
        """``log P(a_t)`` with the picture, ``(step,)`` float32, natural logarithm."""
        return self._array("output/log_probs", np.float32)

    @functools.cached_property
    def baseline_log_probs(self) -> np.ndarray | None:
        """``log P(a_t)`` with the baseline picture, ``(step,)`` float32; None when it was deferred."""
        with self._open() as file:
            if not file.has(f"{row_key(self.row)}/output/baseline_log_probs"):
                return None
        return self._array("output/baseline_log_probs", np.float32)

    @property
    def llr(self) -> np.ndarray | None:
        """Log-likelihood ratio ``log P(a_t) - log P~(a_t)``, ``(step,)`` float32; None when deferred. Paper, Eq. 6."""
        if self.baseline_log_probs is None:
            return None
        with np.errstate(invalid="ignore"):  # -inf under both pictures is no number, and says so as NaN
            return self.log_probs - self.baseline_log_probs

    @functools.cached_property
    def layout(self) -> Layout:
        """Where the image tokens are; positions and image numbers are checked against the prompt and the images."""
        base = row_key(self.row)
        positions = self._array("layout/image_positions", np.int64)
        index = self._array("layout/image_index", np.int64)
        with self._open() as file:
            has_boxes = file.has(f"{base}/layout/patch_box")
            token_id = file.integer(f"{base}/layout", "image_token_id")
            if positions.size and not (positions.min() >= 0 and positions.max() < self.header.prompt_tokens):
                raise file.error(f"{base}/layout/image_positions", "it points outside the prompt")
            # A recording without a processor knows the image tokens but not the pictures.
            images = len(self.header.image_sizes) or 2**31
            if index.size and not (index.min() >= 0 and index.max() < images):
                what = f"it names images {index.min()} to {index.max()} of {len(self.header.image_sizes)}"
                raise file.error(f"{base}/layout/image_index", what)
        boxes = self._array("layout/patch_box", np.float32) if has_boxes else None
        return Layout(positions, index, boxes, token_id)

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
        with self._open() as file:
            attrs = file.json_text(key, "attrs")
            reduce, module = file.text(key, "reduce", "none"), file.text(key, "module", "")
            values = file.tensor(key)
        return PointRecord(values, header.axes, header.layers, reduce, module, attrs)

    @functools.cached_property
    def attention(self) -> AttentionRows | None:
        """Attention of each answer token to the image tokens; None when it was not recorded (``notes`` say why)."""
        with self._open() as file:
            return read_attention(file, row_key(self.row), self.header)

    @functools.cached_property
    def model(self) -> dict[str, JSON]:
        """The model that answered: ids, class, dtype, fingerprint, config, versions."""
        model: dict[str, JSON] = {}
        with self._open() as file:
            for name in ("more", *MODEL_JSON):
                if file.has(f"model/{name}"):
                    value = file.json(f"model/{name}")
                    model.update(value if name == "more" and isinstance(value, dict) else {name: value})
            model.update({name: file.text("model", name, "") or None for name in MODEL_TEXT})
        return model

    @functools.cached_property
    def processor_call(self) -> dict[str, JSON] | None:
        """How the image processor was called."""
        return self._json("inputs/processor_call", dict)

    @functools.cached_property
    def baseline(self) -> dict[str, JSON] | None:
        """The baseline picture behind ``baseline_log_probs``."""
        return self._json("output/baseline", dict)

    @functools.cached_property
    def notes(self) -> list[str]:
        """Sentences: what was not recorded, and why."""
        return self._texts("notes")

    @functools.cached_property
    def meta(self) -> dict[str, JSON]:
        """What the user attached to the recording."""
        return self._json("meta", dict, {})

    @property
    def model_kwargs(self) -> dict[str, torch.Tensor]:
        """What the model was fed besides ``input_ids``, in the recorded dtypes. Read anew each time."""
        base = f"{row_key(self.row)}/inputs/model_kwargs"
        names = self.header.model_kwargs
        with self._open() as file:
            return {name: file.tensor(f"{base}/{name}") for name in names}

    def image_record(self, index: int = 0) -> ImageRecord:
        """Reads one original image as an encoded file, checked against its SHA-256; ``ImageError`` if there is none."""
        sizes = self.header.image_sizes
        if not 0 <= index < len(sizes):
            held = f"{len(sizes)} image{'s' * (len(sizes) != 1)}" if sizes else "no image"
            way_out = "pass images= or a processor to the recording so that they are kept"
            raise ImageError(f"{self.path}: the trace holds {held}, there is no image {index}; {way_out}")
        with self._open() as file:
            return read_image(file, f"{row_key(self.row)}/images/{index:03d}")

    @functools.cached_property
    def images(self) -> tuple[Image.Image, ...]:
        """The original images, RGB."""
        check_pixels(self.path, f"{row_key(self.row)}/images", self.header.image_sizes, self.header.image_nbytes)
        return tuple(self._image(index) for index in range(len(self.header.image_sizes)))

    def _image(self, index: int) -> Image.Image:
        return decode(self.image_record(index), self.path, f"{row_key(self.row)}/images/{index:03d}")

    @property
    def image(self) -> Image.Image:
        """The first original image, RGB. Raises ``ImageError`` when the trace holds none."""
        known = self.__dict__.get("images")
        return known[0] if known else self._first_image

    @functools.cached_property
    def _first_image(self) -> Image.Image:
        return self._image(0)

    def verify(self) -> None:
        """Hashes the whole file, however large, and reads every member; ``TraceError`` at the first fault."""
        with self._open(full=True):
            pass
        for name in _READ_BY_VERIFY:
            getattr(self, name)
        check_pixels(self.path, f"{row_key(self.row)}/images", self.header.image_sizes, self.header.image_nbytes)
        for index in range(len(self.header.image_sizes)):  # one at a time: together they may be large
            self._image(index)
        for name in self.points:
            self.point(name)

    def describe(self) -> str:
        """Returns the trace as a person wants to read it: plain text, at most 100 columns."""
        from lvlm_probe.trace import description

        return description.describe(self)

    def _repr_html_(self) -> str:
        from lvlm_probe.trace import description

        return description.to_html(self)


_READ_BY_VERIFY = (
    *("created", "writer", "seconds", "model", "error", "prompt", "question", "input_ids", "model_kwargs", "notes"),
    *("processor_call", "layout", "token_ids", "words", "log_probs", "llr", "baseline", "attention", "meta"),
)
