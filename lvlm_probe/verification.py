"""Does a replay say what the recording said?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lvlm_probe.player import replay

if TYPE_CHECKING:
    from lvlm_probe.trace import Trace

__all__ = ["Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """How well a replay reproduces a recording.

    Attributes:
        largest_difference: max over steps of |log P recorded − log P replayed|, nats.
        step: the step where it occurs.
        source: ``"generation"`` or ``"teacher_forced"``, what the recorded values come from.
        steps: number of answer tokens compared.
    """

    largest_difference: float
    step: int
    source: str
    steps: int

    def within(self, tolerance: float) -> bool:
        """Whether the largest difference is at most ``tolerance`` nats; never true for NaN."""
        return self.largest_difference <= tolerance


def verify(trace: Trace, model: torch.nn.Module, processor: object | None = None) -> Verification:
    """Replay a trace unmasked and compare with what was recorded.

    Raises:
        ModelMismatch: it is another model, or the processor makes other inputs.
    """
    player = replay(trace, model, processor)
    replayed = player.original_log_probs
    recorded = torch.tensor(trace.log_probs, dtype=torch.float32)
    difference = (recorded - replayed).abs()
    if difference.isnan().any():
        return Verification(math.nan, int(difference.isnan().nonzero()[0]), trace.log_probs_source, len(recorded))
    return Verification(float(difference.max()), int(difference.argmax()), trace.log_probs_source, len(recorded))
