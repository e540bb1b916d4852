"""A trace in the place of a replay: for methods that need what was recorded and no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lvlm_probe.boxes.painting import paint
from lvlm_probe.errors import ExplainError
from lvlm_probe.models.precision import epsilon_of
from lvlm_probe.replaying import PassCounter
from lvlm_probe.replaying.teacher_forcing import rounding_of

if TYPE_CHECKING:
    from lvlm_probe.trace import Trace


@dataclass
class RecordedAnswer:
    """What ``explain`` and explainers ask of a replay, answered from the trace."""

    trace: Trace
    passes: PassCounter = field(default_factory=PassCounter)
    device: str = "none: from the trace"

    def __post_init__(self) -> None:
        trace = self.trace
        self.trace_id = trace.trace_id
        self.tokens, self.words, self.llr = list(trace.tokens), trace.words, trace.llr
        self.special = torch.tensor(trace.special)
        # A trace does not hold its logits: they are taken for 1, smaller than they are, so that only rounding passes.
        said = torch.tensor(trace.log_probs).float()
        self.rounding = rounding_of(said, 1.0, epsilon_of(trace.model.get("torch_dtype")))
        self.baseline = dict(trace.baseline or {})
        self.clips = tuple(trace.clips)
        self.image_sizes = [image.size for image in trace.images]
        self.n_images = len(self.image_sizes)
        if not self.n_images:
            raise ExplainError(
                f"{trace.path.name} holds no image to draw a heatmap on: record with images=[...], or attach with "
                f"the processor"
            )

    @property
    def origin(self) -> Mapping[str, Any]:
        """Where passes are run: nowhere."""
        return {"device": self.device}

    def seen(self, k: int, shape: tuple[int, int]) -> torch.Tensor:
        """Cells of a grid over image ``k`` that an image token stands for, bool."""
        layout = self.trace.layout
        if layout.patch_box is None:
            return torch.ones(shape, dtype=torch.bool)
        first, last = (layout.image_index,) * 2 if layout.patch_frames is None else layout.patch_frames.T
        boxes = layout.patch_box[(first <= k) & (k <= last)]
        return paint(torch.zeros(len(boxes), dtype=torch.float32), boxes, self.image_sizes[k], shape)[1]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise ExplainError(
            f"{name} needs the model, and only a trace is at hand: explain probe.replay(trace, model, processor)"
        )
