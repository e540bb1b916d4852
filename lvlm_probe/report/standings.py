"""All answers of a comparison together: means over answers, with intervals, and what a heatmap costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lvlm_probe.heatmap import Heatmap
    from lvlm_probe.metrics import Interval
    from lvlm_probe.report.comparison import Row

__all__ = ["Standing", "cost_of", "standings"]


@dataclass(frozen=True)
class Standing:
    """One method over all rows: means with 95 % bootstrap intervals over the rows that have a score.

    Attributes:
        deletion, insertion, gain: ``None`` where the method has no score.
        maps, trusted: How many heatmaps it made, and how many of them the verdict has no objection to.
        forward, backward, seconds: Mean cost of a heatmap, ``None`` where it is not known.
        reasons: Why heatmaps are missing.
    """

    method: str
    deletion: Interval | None
    insertion: Interval | None
    gain: Interval | None
    maps: int
    trusted: int
    forward: float | None
    backward: float | None
    seconds: float | None
    reasons: tuple[str, ...]


def standings(methods: Sequence[str], rows: Sequence[Row]) -> list[Standing]:
    """The methods over all rows, highest mean gain first, methods without a score last."""
    found = [_standing(name, column, rows) for column, name in enumerate(methods)]
    return sorted(found, key=lambda one: -math.inf if one.gain is None else one.gain.estimate, reverse=True)


def _standing(name: str, column: int, rows: Sequence[Row]) -> Standing:
    from lvlm_probe.metrics import bootstrap_ci

    heats = [heat for row in rows if (heat := row.heats[column]) is not None]
    made = [heat for heat in heats if heat.values is not None]
    scores = [
        score
        for row in rows
        if (score := row.scores[column]) is not None and math.isfinite(score.gain) and row.heats[column]
    ]
    costs = [cost for heat in made if (cost := cost_of(heat)) is not None]
    seconds = [float(heat.provenance["seconds"]) for heat in made if heat.provenance.get("seconds") is not None]

    def over(values: Sequence[float]) -> Interval | None:
        return bootstrap_ci(values) if values else None

    def mean(values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return Standing(
        method=name,
        deletion=over([score.deletion for score in scores]),
        insertion=over([score.insertion for score in scores]),
        gain=over([score.gain for score in scores]),
        maps=len(made),
        trusted=sum(score.verdict.trusted for score in scores),
        forward=mean([cost[0] for cost in costs]),
        backward=mean([cost[1] for cost in costs]),
        seconds=mean(seconds),
        reasons=tuple(dict.fromkeys(str(heat.reason) for heat in heats if heat.values is None)),
    )


def cost_of(heat: Heatmap) -> tuple[int, int] | None:
    passes = heat.provenance.get("passes")
    return None if not passes else (int(passes.get("forward", 0)), int(passes.get("backward", 0)))
