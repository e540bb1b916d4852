"""What one ``generate()`` call leaves behind: the table of fields, and the records that the recorder fills.

:class:`TraceFields` is the table. A row is an attribute and its field in the file; writer, reader (``Trace`` has every
attribute of the table), checks, ``Trace.verify`` and the members in ``SPEC.md`` are made from it. To add a field: add a
row, ``since`` the next minor version, let the recorder fill it, and run ``python tests/trace/spec_table.py --write``.

Letters for the shapes, here and in ``SPEC.md``: ``P`` prompt tokens (padding stripped), ``T`` generated tokens,
``N`` image tokens in the prompt, ``L`` layers, ``H`` heads.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, get_type_hints

import numpy as np

from lvlm_probe.cards import equal, in_one_line
from lvlm_probe.storage.encoding import JSON
from lvlm_probe.trace.clips import Clip, ClipList
from lvlm_probe.trace.fields import Array, Field, Integer, Json, Text

if TYPE_CHECKING:
    import torch
    from PIL import Image

MODEL_TEXT = ("model_id", "revision", "class", "adapter", "attn_implementation", "torch_dtype", "fingerprint")
MODEL_JSON = ("config", "generation_config", "versions")
"""What is kept of ``Capture.model`` as text and as JSON of its own; the rest of it goes into one object, ``more``."""

_TRACE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}")
"""A trace id may name files, of explanations for instance: no slash, no leading dot."""


@dataclasses.dataclass(frozen=True, repr=False)
class Layout:
    """Where the image tokens are in the prompt, and which part of the image each stands for."""

    __repr__, __eq__ = in_one_line, equal

    image_positions: np.ndarray
    """``(image_token,)`` int64: positions in ``input_ids``."""
    image_index: np.ndarray
    """``(image_token,)`` int64: the image each token belongs to."""
    patch_box: np.ndarray | None
    """``(image_token, 4)`` float32: ``x0, y0, x1, y1`` in original-image pixels."""
    image_token_id: int | None
    patch_frames: np.ndarray | None = None
    """``(image_token, 2)`` int64: first and last image that each token stands for, where that may be several frames of
    a clip; its box is in each of them. ``None``: the one of ``image_index``."""


@dataclasses.dataclass(kw_only=True, repr=False)
class TraceFields:
    """The fields of a trace: one row of a batch, padding stripped. Log-probabilities are natural logarithms."""

    __repr__, __eq__ = in_one_line, equal

    trace_id: Annotated[
        str,
        Text(
            "@trace_id",
            pattern=_TRACE_ID,
            about="`[A-Za-z0-9][A-Za-z0-9_.-]*`, at most 128 characters, unique; may name files",
        ),
    ]
    batch_row: Annotated[int, Integer("@batch_row", 0, 2**31 - 1, about="row of the batch, from 0")]
    status: Annotated[
        Literal["complete", "stopped", "error"],
        Text(
            "@status",
            ("complete", "stopped", "error"),
            about="`complete`; `stopped`: generation was cut off; `error`: recording failed on the way",
        ),
    ] = "complete"
    input_ids: Annotated[
        np.ndarray,
        Array("inputs/input_ids", "i4", "P", about="the prompt as the model saw it; placeholders MAY be negative"),
    ]
    prompt: Annotated[str, Json("inputs/prompt", "text", about="the prompt as a person reads it")] = ""
    question: Annotated[
        str | None, Json("inputs/question", "text", optional=True, about="the user's question alone")
    ] = None
    processor_call: Annotated[
        dict[str, JSON] | None,
        Json(
            "inputs/processor_call",
            "object",
            optional=True,
            about="class, arguments, structure and versions of the image processor's call",
        ),
    ] = None
    clips: Annotated[
        tuple[Clip, ...],
        ClipList(
            "inputs/clips",
            optional=True,
            since="1.1",
            about="the images that are frames of videos: `clips`, objects with `first`, `frames` and, where known, "
            "`indices` in the video, its `fps`, `total` frames and `duration` in seconds",
        ),
    ] = ()
    image_positions: Annotated[
        np.ndarray, Array("layout/image_positions", "i4", "N", below="P", about="indices into `inputs/input_ids`")
    ] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    image_token_id: Annotated[
        int | None, Integer("layout@image_token_id", optional=True, about="the id at these positions, where it is one")
    ] = None
    image_index: Annotated[
        np.ndarray,
        Array("layout/image_index", "i4", "N", below="images", about="which image each image token belongs to"),
    ] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    patch_box: Annotated[
        np.ndarray | None,
        Array("layout/patch_box", "f4", "N, 4", optional=True, about="`x0 y0 x1 y1` of each image token"),
    ] = None
    patch_frames: Annotated[
        np.ndarray | None,
        Array(
            "layout/patch_frames",
            "i4",
            "N, 2",
            below="images",
            optional=True,
            since="1.1",
            about="first and last image that each image token stands for, where tokens stand for several frames",
        ),
    ] = None
    token_ids: Annotated[
        np.ndarray, Array("output/token_ids", "i4", "T", about="the generated tokens, special ones included")
    ]
    tokens: Annotated[
        list[str], Json("output/pieces", "list of texts", "T", about="their display texts; joined, they are the answer")
    ]
    special: Annotated[
        np.ndarray, Array("output/special", "u1", "T", about="1 for a special token: end of turn, padding, ...")
    ]
    log_probs: Annotated[np.ndarray, Array("output/log_probs", "f4", "T", about="`log P(a_t)`")]
    log_probs_source: Annotated[
        Literal["generation", "teacher_forced"],
        Text(
            "output/log_probs@source",
            ("generation", "teacher_forced"),
            about="`generation`, or `teacher_forced` when the answer went through the model again",
        ),
    ] = "generation"
    top_log_probs: Annotated[
        np.ndarray | None,
        Array("output/top_log_probs", "f4", "T", optional=True, about="log P of the token that is likeliest there"),
    ] = None
    top_tokens: Annotated[
        list[str] | None,
        Json("output/top_pieces", "list of texts", "T", optional=True, about="its display text, at each step"),
    ] = None
    baseline_log_probs: Annotated[
        np.ndarray | None,
        Array("output/baseline_log_probs", "f4", "T", optional=True, about="`log P(a_t)` with the baseline images"),
    ] = None
    baseline: Annotated[
        dict[str, JSON] | None,
        Json(
            "output/baseline",
            "object",
            optional=True,
            about="the baseline: kind, parameters, mean probability of the words that came from the image",
        ),
    ] = None
    notes: Annotated[
        list[str], Json("notes", "list of texts", optional=True, about="what was not recorded and why, in sentences")
    ] = dataclasses.field(default_factory=list)
    meta: Annotated[dict[str, JSON], Json("meta", "object", optional=True, about="the user's own")] = dataclasses.field(
        default_factory=dict
    )
    error: Annotated[
        str | None, Json("error", "text", optional=True, about="what failed, when `status` is `error`")
    ] = None

    @property
    def layout(self) -> Layout:
        """Where the image tokens are."""
        return Layout(self.image_positions, self.image_index, self.patch_box, self.image_token_id, self.patch_frames)


FIELDS: dict[str, Field] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(TraceFields, include_extras=True).items()
}
"""The table: attribute → its field in a file."""


def default_of(name: str) -> Any:
    """Return the value of an optional field that was not recorded: None, an empty list, or an empty object."""
    (declared,) = (item for item in dataclasses.fields(TraceFields) if item.name == name)
    return None if declared.default_factory is dataclasses.MISSING else declared.default_factory()


def is_recorded(name: str, value: Any) -> bool:
    """Whether a value of a field goes into the file: an optional one is left out when it is the default."""
    default = default_of(name)
    return not FIELDS[name].optional or (value is not None if default is None else value != default)


@dataclasses.dataclass(frozen=True, repr=False)
class ImageRecord:
    """One image of the prompt, as an encoded file (the user's own, or PNG when it had to be encoded again)."""

    __repr__, __eq__ = in_one_line, equal

    data: bytes
    mime: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True, repr=False)
class PointRecord:
    """What was seen at one point of the model, for example ``decoder.attention``.

    ``axes`` names each dimension of ``values`` in the vocabulary ``batch step layer head query key image_token patch
    channel row col``; ``layers`` are the indices of the layers along the axis ``layer`` (empty without one);
    ``reduce`` says what was done over an axis (``"none"``, ``"head_mean"``, ...); ``module`` is the path pattern.
    """

    __repr__, __eq__ = in_one_line, equal

    values: np.ndarray | torch.Tensor
    axes: tuple[str, ...]
    layers: tuple[int, ...] = ()
    reduce: str = "none"
    module: str = ""
    attrs: Mapping[str, JSON] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(kw_only=True, repr=False)
class RowCapture(TraceFields):
    """One row of the batch of one ``generate()`` call. Everything that a replay needs is in it."""

    model_kwargs: Mapping[str, np.ndarray | torch.Tensor] = dataclasses.field(default_factory=dict)
    """Everything that a replay feeds besides ``input_ids``: ``pixel_values``, ``image_grid_thw``, ..."""
    images: list[ImageRecord] = dataclasses.field(default_factory=list)
    points: Mapping[str, PointRecord] = dataclasses.field(default_factory=dict)


class TraceLike(Protocol):
    """What a replay asks of an answer: a ``Trace``, or one that has just been generated. Arrays as in the table."""

    @property
    def path(self) -> Path: ...
    @property
    def trace_id(self) -> str: ...
    @property
    def input_ids(self) -> np.ndarray: ...
    @property
    def token_ids(self) -> np.ndarray: ...
    @property
    def tokens(self) -> Sequence[str]: ...
    @property
    def special(self) -> np.ndarray: ...
    @property
    def model_kwargs(self) -> Mapping[str, Any]: ...
    @property
    def images(self) -> Sequence[Image.Image]: ...
    @property
    def processor_call(self) -> Mapping[str, JSON] | None: ...
    @property
    def baseline(self) -> Mapping[str, JSON] | None: ...
    @property
    def model(self) -> Mapping[str, JSON]: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def clips(self) -> tuple[Clip, ...]: ...


@dataclasses.dataclass
class Capture:
    """One ``generate()`` call: its batch rows, and what they share."""

    rows: list[RowCapture]
    model: dict[str, JSON]
    """``MODEL_TEXT`` (text) and ``MODEL_JSON`` (JSON)."""
    created: str
    """ISO-8601, UTC."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
