"""All answers of a comparison together: means over answers, with intervals, and what a heatmap costs."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lvlm_probe.metrics import Interval, Score, bootstrap_ci

if TYPE_CHECKING:
    from lvlm_probe.heatmap import Heatmap
    from lvlm_probe.video import ClipHeatmap


@dataclass(frozen=True)
class Row:
    """One answer, or one set of its words, under every method.

    Attributes:
        heats: One heatmap per method, in the order of ``Comparison.methods``. One that could not be made has no values
            and its reason; ``None`` where none was given.
        scores: Their scores, ``None`` where a heatmap was not judged.
    """

    heats: tuple[Heatmap | ClipHeatmap | None, ...]
    scores: tuple[Score | None, ...]


@dataclass(frozen=True)
class Standing:
    """One method over all rows: means with 95 % bootstrap intervals over the rows whose scores are a measurement.

    Scores that are NaN, or that the verdict objects to as a measurement (``Verdict.measured``), enter no mean.

    Attributes:
        deletion, insertion, gain: ``None`` where no score enters; ``n`` is how many do, ``missing`` how many do not.
        maps, trusted: How many heatmaps it made, and how many of them the verdict has no objection to.
        forward, backward, seconds: Mean cost of a heatmap, ``None`` where it is not known.
        reasons: Why heatmaps are missing.
        judged: How many heatmaps were judged, whatever came of it.
        left_out: Why scores enter no mean → of how many heatmaps that is said.
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
    judged: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)


def counted(heat: Heatmap | ClipHeatmap | None, score: Score | None) -> bool:
    """Tell whether a score enters means."""
    return bool(heat) and score is not None and math.isfinite(score.gain) and bool(score.verdict.measured)


def center_gain(rows: Sequence[Row]) -> float | None:
    """Return the gain of a blob in the middle, the same for all methods of a row, as a mean over rows."""
    found = [
        gain
        for row in rows
        for gain in [
            score.center_gain for score in row.scores if score is not None and math.isfinite(score.center_gain)
        ][:1]
    ]
    return sum(found) / len(found) if found else None


def standings(methods: Sequence[str], rows: Sequence[Row]) -> list[Standing]:
    """Return the methods over all rows, highest mean gain first, methods without one last."""
    found = [_standing(name, column, rows) for column, name in enumerate(methods)]
    return sorted(found, key=lambda one: -math.inf if one.gain is None else one.gain.estimate, reverse=True)


def _standing(name: str, column: int, rows: Sequence[Row]) -> Standing:
    heats = [heat for row in rows if (heat := row.heats[column]) is not None]
    made = [heat for heat in heats if heat.values is not None]
    judged = [
        (heat, score) for row in rows if (heat := row.heats[column]) and (score := row.scores[column]) is not None
    ]
    scores = [score for heat, score in judged if counted(heat, score)]
    left_out = Counter(
        score.reason or "; ".join(score.verdict.reasons) for heat, score in judged if not counted(heat, score)
    )
    costs = [cost for heat in made if (cost := cost_of(heat)) is not None]
    seconds = [float(heat.provenance["seconds"]) for heat in made if heat.provenance.get("seconds") is not None]

    def over(values: Sequence[float]) -> Interval | None:
        return dataclasses.replace(bootstrap_ci(values), missing=len(judged) - len(values)) if values else None

    def mean(values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return Standing(
        method=name,
        deletion=over([score.deletion for score in scores]),
        insertion=over([score.insertion for score in scores]),
        gain=over([score.gain for score in scores]),
        maps=len(made),
        trusted=sum(score.verdict.trusted for score in scores),
        judged=len(judged),
        left_out=dict(left_out.most_common()),
        forward=mean([cost[0] for cost in costs]),
        backward=mean([cost[1] for cost in costs]),
        seconds=mean(seconds),
        reasons=tuple(dict.fromkeys(str(heat.reason) for heat in heats if heat.values is None)),
    )


def cost_of(heat: Heatmap | ClipHeatmap) -> tuple[int, int] | None:
    """Return forward and backward passes of a heatmap; ``None`` where they are not known."""
    passes = heat.provenance.get("passes")
    return None if not passes else (int(passes.get("forward", 0)), int(passes.get("backward", 0)))
