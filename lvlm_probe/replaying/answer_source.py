"""Source of a recorded answer: its images, and how a mask reaches the pixel inputs it was generated from."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lvlm_probe.errors import ImageError, ModelMismatch
from lvlm_probe.images import ImagePath, PixelPath
from lvlm_probe.images.baselines import CLIP_KINDS, KINDS, make_baselines
from lvlm_probe.images.clips import step_of
from lvlm_probe.images.parity import versions
from lvlm_probe.images.processor import with_settings
from lvlm_probe.images.processor_step import image_processor_of
from lvlm_probe.models.inputs import input_device

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.trace import Trace
    from lvlm_probe.trace.records import RowCapture

_log = logging.getLogger("lvlm_probe")


class LiveTrace:
    """An answer that has just been generated, seen the way ``Replay`` sees a trace file.

    Args:
        row: the capture of one batch row.
        images: its images, RGB.
    """

    def __init__(self, row: RowCapture, images: Sequence[Image.Image]) -> None:
        self.trace_id, self.layout = row.trace_id, row.layout
        self.path = Path(f"{row.trace_id} (not written yet)")
        self.tokens, self.token_ids, self.special = row.tokens, row.token_ids, row.special
        self.input_ids, self.processor_call, self.baseline = row.input_ids, row.processor_call, row.baseline
        self.model_kwargs = dict(row.model_kwargs)
        self.images, self.clips = list(images), row.clips
        self.model: dict[str, Any] = {}


def recorded_path(
    trace: Trace | LiveTrace,
    pixels: dict[str, torch.Tensor],
    processor: object | None,
    model: torch.nn.Module,
    *,
    check: bool,
) -> tuple[ImagePath | PixelPath, dict[str, Any]]:
    """The way of masks to the pixel inputs of ``trace``, over the baseline it was recorded with, and that baseline."""
    if not pixels and trace.model.get("class") == "served":
        raise ImageError(
            f"{trace.path.name} was answered by a server ({trace.model.get('model_id')}) and holds no pixel inputs: "
            "replay it there, probe.replay(trace, probe.connect(url)), or import the answer for a model of your own"
        )
    if not pixels:
        raise ImageError(
            f"{trace.path.name} holds no image: it was recorded from a text-only prompt, and there is nothing to mask"
        )
    recorded = dict(trace.baseline or {})
    kind = str(recorded.get("kind", "blur"))
    params = {name: recorded[name] for name in ("strength", "seed") if recorded.get(name) is not None}
    if recorded.get("limit"):
        params["strength"] = math.inf  # JSON has no infinity
    if kind not in KINDS and not (kind in CLIP_KINDS and trace.clips):
        _log.warning(
            "the baseline of %s was an image of the user's, which traces do not keep; using blur", trace.trace_id
        )
        recorded, kind, params = {}, "blur", {}
    placed: dict[str, Any] = {"device": input_device(model), "dtype": getattr(model, "dtype", torch.float32)}
    image_processor = image_processor_of(processor)
    call = trace.processor_call
    if trace.clips:
        image_processor = processor
        if processor is None or call is None:
            raise ImageError(f"{trace.path.name} holds a video: replaying it takes the processor that made its inputs")
    if image_processor is None or call is None or not trace.images:
        inputs = PixelPath(pixels, baseline=kind, **params, **placed)
        return inputs, {**recorded, **inputs.description}
    made = make_baselines(trace.images, kind, clips=trace.clips, **params)
    try:
        if trace.clips:
            present, changed = step_of(processor, call, trace.clips)
            call = {}
        else:
            present, changed = with_settings(image_processor, call.get("config") or None)
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(changed.items()))
        notes = [f"the settings it was recorded with are used, not its present ones: {settings}"] if changed else []
        path = ImagePath.from_processor(
            present,
            trace.images,
            call_kwargs=dict(call.get("kwargs") or {}),
            structure="nested" if call.get("structure") == "nested" else "flat",
            baseline=[item.image for item in made],
            reference=pixels if check else None,
            because=_since(trace, present),
            notes=notes,
            **placed,
        )
    except ImageError as error:
        raise ModelMismatch(
            f"this processor ({type(image_processor).__name__}) does not make the inputs that {trace.path.name} was "
            f"recorded with ({call.get('class')}): {error}"
        ) from error
    return path, {**recorded, "kind": made[0].kind, **made[0].params}


def _since(trace: Trace | LiveTrace, image_processor: Any) -> str:
    """What of all that decides a pixel's value is another than at the recording, in brackets; empty where nothing is
    known to be."""
    call, recorded = trace.processor_call or {}, trace.model.get("versions") or {}
    name = getattr(image_processor, "processor_name", None) or type(image_processor).__name__
    then = [str(call["class"])] if call.get("class") not in (None, name) else []
    if isinstance(recorded, dict):
        then += [f"{lib} {recorded[lib]}" for lib, now in versions().items() if recorded.get(lib) not in (None, now)]
    return f" (recorded with {', '.join(then)})" if then else ""
