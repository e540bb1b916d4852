"""Comparison of a replay with its recording."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lvlm_probe.models.exhaustion import told_out_of_memory
from lvlm_probe.replaying import replay
from lvlm_probe.replaying.isolation import outside_modes
from lvlm_probe.replaying.protocol import Elsewhere, ReplayLike
from lvlm_probe.replaying.recorded_inputs import refused_in_words

if TYPE_CHECKING:
    from lvlm_probe.trace import Trace

FLOOR = 1e-4
"""Nats that are the same in any number format: 0.01 % in probability, far below what any figure here shows."""


@dataclass(frozen=True)
class Verification:
    """Difference of a replay from a recording, by token.

    Attributes:
        largest_difference: max over steps of |log P recorded − log P replayed|, nats.
        step: the step where it occurs.
        source: ``"generation"`` or ``"teacher_forced"``, what the recorded values come from.
        steps: number of answer tokens compared.
        differences: of each step, nats, NaN where one of the two is.
        rounding: what each may come to by rounding (``Replay.rounding``, ``Server.allowed``), nats: in bfloat16 tenths
            for unlikely tokens, and next to nothing for certain ones.
        not_given: steps that a server cannot be asked about, such as the closing token on the chat road: they are not
            compared, and their difference is NaN.
    """

    largest_difference: float
    step: int
    source: str
    steps: int
    differences: tuple[float, ...] = ()
    rounding: tuple[float, ...] = ()
    not_given: tuple[int, ...] = ()

    def within(self, tolerance: float | None = None) -> bool:
        """Whether every difference is at most ``tolerance`` nats, by default its rounding, or 1e-4 where that is more;
        never true for NaN."""
        if tolerance is not None:
            return self.largest_difference <= tolerance
        return self.excess <= 1

    @property
    def worst(self) -> int:
        """The step that exceeds its rounding by most, or is NaN."""
        ratios = self._ratios()
        return max(range(len(ratios)), key=lambda step: math.inf if math.isnan(ratios[step]) else ratios[step])

    @property
    def excess(self) -> float:
        """Difference of the worst step, in units of its rounding (1e-4 where that is more); NaN stays NaN."""
        return self._ratios()[self.worst]

    def allowed(self, step: int) -> float:
        """Largest difference that a step may have, nats."""
        return max(FLOOR, self.rounding[step]) if self.rounding else FLOOR

    def _ratios(self) -> list[float]:
        differences = self.differences or (self.largest_difference,)
        return [
            0.0 if step in self.not_given else difference / self.allowed(step)
            for step, difference in enumerate(differences)
        ]


@outside_modes
@told_out_of_memory
def verify(
    trace: Trace, model: torch.nn.Module | Elsewhere, processor: object | None = None, *, strict: bool = True
) -> Verification:
    """Replay a trace unmasked and compare with what was recorded.

    Args:
        trace, model, processor: as for ``lvlm_probe.replay``. A server's log-probabilities alone are compared: it tells
            the model by its name, and shows neither weights nor inputs.
        strict: refuse another model. ``False`` compares with it all the same: weights that are quantised with those
            that were recorded, for example.

    Raises:
        ModelMismatch: it is another model, or the processor makes other inputs.
        ReplayError: the trace holds inputs that the model cannot be run on, or the server gives no log-probabilities.
    """
    elsewhere = model if isinstance(model, Elsewhere) else None
    if elsewhere is not None:
        elsewhere.require_log_probs("verify")
    player: ReplayLike
    player = replay(trace, model, processor, strict=strict)  # type: ignore[arg-type]  # of either kind
    with refused_in_words(trace):
        replayed, rounding = player.original_log_probs, player.rounding
    not_given = torch.zeros(len(replayed), dtype=torch.bool)
    if elsewhere is not None:  # a server's number that is none is refused when it is read: here it was not asked for
        not_given, rounding = replayed.isnan(), torch.maximum(rounding, elsewhere.allowed(replayed))
    recorded = torch.tensor(trace.log_probs, dtype=torch.float32)
    difference = (recorded - replayed).abs()
    compared = difference.masked_fill(not_given, -1.0)  # less than any
    details = (
        trace.log_probs_source,
        int((~not_given).sum()),
        tuple(difference.tolist()),
        tuple(rounding.tolist()),
        tuple(not_given.nonzero()[:, 0].tolist()),
    )
    if compared.isnan().any():
        return Verification(math.nan, int(compared.isnan().nonzero()[0]), *details)
    return Verification(float(compared.max()), int(compared.argmax()), *details)
