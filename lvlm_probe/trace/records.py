"""What one ``generate()`` call leaves behind, in memory: the records that the recorder fills and the writer stores.

Letters for the shapes, here and in ``SPEC.md``: ``P`` prompt tokens (padding stripped), ``T`` generated tokens,
``N`` image tokens in the prompt, ``L`` layers, ``H`` heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from lvlm_probe.storage.encoding import JSON

if TYPE_CHECKING:
    import torch

__all__ = ["Capture", "ImageRecord", "PointRecord", "RowCapture"]


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One image of the prompt, as an encoded file (the user's own, or PNG when it had to be encoded again)."""

    data: bytes
    mime: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class PointRecord:
    """What was seen at one point of the model, for example ``decoder.attention``.

    ``axes`` names each dimension of ``values`` in the vocabulary ``batch step layer head query key image_token patch
    channel row col``; ``layers`` are the indices of the layers along the axis ``layer`` (empty without one);
    ``reduce`` says what was done over an axis (``"none"``, ``"head_mean"``, ...); ``module`` is the path pattern.
    """

    values: np.ndarray | torch.Tensor
    axes: tuple[str, ...]
    layers: tuple[int, ...] = ()
    reduce: str = "none"
    module: str = ""
    attrs: Mapping[str, JSON] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class RowCapture:
    """One row of the batch of one ``generate()`` call, padding stripped. Everything a replay needs is in it."""

    trace_id: str
    batch_row: int
    input_ids: np.ndarray
    """Prompt token ids, ``(P,)`` int64."""
    token_ids: np.ndarray
    """Generated token ids, ``(T,)`` int64."""
    pieces: list[str]
    """Display text of each generated token; joined, the answer."""
    special: np.ndarray
    """``(T,)`` bool: the token is a special one (end of turn, padding, ...)."""
    log_probs: np.ndarray
    """``log P(a_t)``, ``(T,)`` float32, natural logarithm."""
    log_probs_source: Literal["generation", "teacher_forced"] = "generation"
    status: Literal["complete", "stopped", "error"] = "complete"
    error: str | None = None
    prompt: str = ""
    question: str | None = None
    model_kwargs: Mapping[str, np.ndarray | torch.Tensor] = dataclasses.field(default_factory=dict)
    """Everything a replay feeds besides ``input_ids``: ``pixel_values``, ``image_grid_thw``, ..."""
    images: list[ImageRecord] = dataclasses.field(default_factory=list)
    processor_call: dict[str, JSON] | None = None
    image_token_id: int | None = None
    image_positions: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    """Positions of the image tokens in ``input_ids``, ``(N,)`` int64."""
    image_index: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    """Which image each image token belongs to, ``(N,)`` int64."""
    patch_box: np.ndarray | None = None
    """Box ``(x0, y0, x1, y1)`` of each image token in original-image pixels, ``(N, 4)`` float32."""
    baseline_log_probs: np.ndarray | None = None
    """``log P(a_t)`` with the baseline images, ``(T,)`` float32; None when deferred."""
    baseline: dict[str, JSON] | None = None
    points: Mapping[str, PointRecord] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    """Sentences for a person: what was not recorded, and why."""
    meta: dict[str, JSON] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Capture:
    """One ``generate()`` call: its batch rows, and what they share."""

    rows: list[RowCapture]
    model: dict[str, JSON]
    """``model_id revision class adapter attn_implementation torch_dtype fingerprint`` (text) and
    ``config generation_config versions`` (JSON)."""
    created: str
    """ISO-8601, UTC."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
