"""What an intervention on image tokens did to the answer, and the one number made of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast

import numpy as np

from lvlm_probe.cards import equal
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.scores import CurveScore
from lvlm_probe.files import json_ready, record_of

MINIMUM_ROOM = 0.05
"""Of the area between 0 and 1: how much earlier than the controls' loss the answer could be lost at all. An agreement
is a share of that; below it, the scatter of five draws is more."""

MINIMUM_DROP = 0.05
"""Mean probability that taking away all image tokens must cost before a share of it means anything."""


class Recorded:
    """A result that goes into a JSON record and comes back from it."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` is the inverse."""
        return record_of(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Rebuild what ``to_dict`` wrote. Raises ``ExplainError`` for anything else."""
        try:
            given = {item.name: _tuples(record[item.name]) for item in dataclasses.fields(cast(Any, cls))}
            made = cls(**given)
            str(made)  # numbers that are none, or too few of them
            return made
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ExplainError(f"not a stored {cls.__name__}: {error!r}") from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class Effect:
    """Some image tokens taken away in some layers.

    Attributes:
        top: Their share of the image's image tokens.
        tokens: Their number.
        layers: Indices of the layers.
        score: f, the sum of the explained tokens' log-probabilities, nats.
        probability: Mean probability of the explained tokens.
        control, control_probability: The same two with as many control tokens taken away, ``(draw,)`` each.
    """

    top: float
    tokens: int
    layers: tuple[int, ...]
    score: float
    probability: float
    control: tuple[float, ...]
    control_probability: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class CausalEffect:
    """Does the answer depend on the image tokens under a heatmap's top area, more than on others?

    Attributes:
        kind: ``"knockout"`` or ``"patch"``.
        original, original_probability: f (nats) and mean probability of the explained tokens, nothing taken away.
        everything, everything_probability: The same with all image tokens of the image taken away.
        effects: One per share of the image tokens, ascending, in all chosen layers.
        windows: One per range of layers, for the smallest share.
        params, provenance: How it was measured, and on what.
    """

    __eq__ = equal

    kind: Literal["knockout", "patch"]
    original: float
    original_probability: float
    everything: float
    everything_probability: float
    effects: tuple[Effect, ...]
    windows: tuple[Effect, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        first, agreement = self.effects[0], self.agreement
        shown = "undefined" if math.isnan(agreement) else f"{agreement:.3f}"
        return (
            f"<CausalEffect {self.kind} of {first.tokens} image tokens ({first.top:.0%}): f {-self.drop:+.3f} nats, "
            f"control {-self.control_drop:+.3f}; agreement {shown}>"
        )

    @property
    def drop(self) -> float:
        """What f loses with the smallest share of tokens, nats."""
        return self.original - self.effects[0].score

    @property
    def control_drop(self) -> float:
        """What f loses with as many control tokens, nats, mean over draws."""
        return self.original - float(np.mean(self.effects[0].control))

    @property
    def probability_drop(self) -> float:
        """What the mean probability loses with the smallest share of tokens."""
        return self.original_probability - self.effects[0].probability

    @property
    def control_probability_drop(self) -> float:
        """What the mean probability loses with as many control tokens, mean over draws."""
        return self.original_probability - float(np.mean(self.effects[0].control_probability))

    @property
    def reason(self) -> str | None:
        """Why there is no agreement score, as a sentence; ``None`` when there is one."""
        lost = self.original_probability - self.everything_probability
        if lost >= MINIMUM_DROP and not math.isnan(self._agreement("prob")):
            return None
        if lost >= MINIMUM_DROP:
            return (
                "the answer is lost as soon as it can be with any image tokens, so that no order of them is better "
                "than another, or only the share 1 was taken away"
            )
        return (
            f"taking away all image tokens costs the explained words only {lost:.3f} of mean probability: at these "
            f"queries and layers the answer does not depend on them"
        )

    @property
    def agreement(self) -> float:
        """The agreement score of mean probabilities, see ``agreement_score``; NaN where ``reason`` says why."""
        return self.agreement_of("prob")

    def agreement_of(self, score: CurveScore) -> float:
        """The agreement score of mean probabilities (``"prob"``) or of f in nats (``"log"``)."""
        if score not in ("prob", "log"):
            raise ExplainError(f"score is 'prob' or 'log'; got {score!r}")
        lost = self.original_probability - self.everything_probability
        return self._agreement(score) if lost >= MINIMUM_DROP else math.nan

    def _agreement(self, score: CurveScore) -> float:
        log = score == "log"
        return agreement_score(
            [effect.top for effect in self.effects],
            [effect.score if log else effect.probability for effect in self.effects],
            [float(np.mean(effect.control if log else effect.control_probability)) for effect in self.effects],
            original=self.original if log else self.original_probability,
            everything=self.everything if log else self.everything_probability,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, NaN as ``None``; derived numbers included."""
        derived = {name: getattr(self, name) for name in ("drop", "control_drop", "agreement", "reason")}
        return {**record_of(self), **json_ready(derived)}


def agreement_score(
    tops: Sequence[float], heat: Sequence[float], control: Sequence[float], *, original: float, everything: float
) -> float:
    """How much earlier the answer is lost when tokens go in the heatmap's order than when controls go.

    With s(p) the score when a share p of the image tokens is taken away, both curves are brought to ::

        d(p) = clip((s(0) − s(p)) / (s(0) − s(1)), 0, 1),     d(0) = 0, d(1) = 1

    and their areas A by the trapezoidal rule over 0, the given shares and 1 are compared ::

        agreement = (A_heat − A_control) / (A_best − A_control)

    A_best being the area when everything is lost at the first share. 0: no better than the control; 1: the first share
    carries everything; below 0: worse than the control.

    Args:
        tops: shares, ascending, in (0, 1].
        heat, control: scores at these shares.
        original, everything: scores at shares 0 and 1.

    Returns:
        the agreement; NaN where there is nothing to compare: no share below 1, equal ends, or less than
        ``MINIMUM_ROOM`` between the control's area and the best.
    """
    inner = [index for index, top in enumerate(tops) if top < 1]
    if not inner or original == everything or not math.isfinite(original - everything):
        return math.nan

    def area(scores: Sequence[float]) -> float:
        shares = np.array([0.0, *(tops[index] for index in inner), 1.0])
        lost = [(original - scores[index]) / (original - everything) for index in inner]
        curve = np.array([0.0, *np.clip(lost, 0, 1), 1.0])
        return float((np.diff(shares) * (curve[1:] + curve[:-1]) / 2).sum())

    best, chance = area([everything] * len(tops)), area(control)
    # Where any few tokens cost as much as all of them, no order of tokens is better than another.
    return (area(heat) - chance) / (best - chance) if best - chance >= MINIMUM_ROOM else math.nan
