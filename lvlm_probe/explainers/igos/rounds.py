"""When to go on: rounds of iGOS++ until its map is good enough, more passes stop helping, or the budget is spent.

The first round is what the settings say. After it the map's own score is taken at a few points of the deletion and the
insertion curve (``quick_areas``), and so after every round:

* what is missing to the gain of a perfect map ends it where it is little for the passes that the next round takes: no
  more than ``enough`` leaves, for a round as long as the first, and by the square of its length for a longer one, as
  late passes add less than early ones. Areas outside [0, 1] count as 0 and 1: where parts of the image make the words
  likelier than the whole, a large insertion would hide that deletion is poor;
* so does a round on the mask that has added less than ``HELP``;
* but a map that is not clear of the floors that a verdict has, chance (``MIN_GAIN``) and a blob in the middle of the
  image (``center``), is gone on with;
* the ``budget`` ends it.

The second round takes as many passes as the first, all of them on the order of the map: on scenes kept for tuning that
is what most maps lacked. Further ones take twice what all before them took, or all that is left where that is less than
twice their own; half goes on with the mask, over twice as many masks an iteration, and half on the order, over all
levels a step, which starts between that mask and the best map so far. The best map of all rounds is the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lvlm_probe.explainers.controls import center_values
from lvlm_probe.explainers.curve_points import MIN_GAIN, QUICK_PASSES, STEPS, quick_areas

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lvlm_probe.explainers.igos.settings import IgosSettings
    from lvlm_probe.explainers.registry import Problem

PERFECT = 1 - 1 / STEPS
"""Insertion − deletion where the first point of both curves decides all: their trapezoid keeps more than that away."""

HELP = 0.02
"""Gain that a round has to add to be followed by another: quick gains are off by 0.02 in the mean."""

MARGIN = 0.05
"""By how much a map has to clear a floor: one quick gain in twenty is off by more."""


@dataclass(frozen=True)
class Round:
    """Iterations on the mask, and steps on the order after them.

    Attributes:
        iterations, ig_steps: of the mask, and masks per term of its integrated gradient.
        steps, levels: on the order, and its levels per step; ``None``: all of them.
    """

    iterations: int
    ig_steps: int
    steps: int
    levels: int | None

    def passes(self, settings: IgosSettings) -> int:
        """Images sent forward and backward."""
        masks, levels = settings.masks_at_once(self.ig_steps), settings.levels_at_once(self.levels)
        return self.iterations * masks + self.steps * levels


def rounds(settings: IgosSettings) -> list[Round]:
    """All rounds that the budget has room for, its checks included; the first one alone where there is no budget, or
    no room for a second."""
    first = Round(settings.iterations, settings.ig_steps, settings.refine, settings.refine_levels)
    found, spent = [first], first.passes(settings)
    if settings.budget is None:
        return found
    left = settings.budget - spent - 2 * QUICK_PASSES  # the first check, and that of the blob in the middle
    while True:
        left -= QUICK_PASSES
        wanted = spent if len(found) == 1 else 2 * spent
        following = _split(settings, left if left < 2 * wanted and len(found) > 1 else min(left, wanted), len(found))
        if not (taken := following.passes(settings)):
            return found
        found.append(following)
        spent, left = spent + taken, left - taken


def budget_of(settings: IgosSettings, taken: Sequence[Round]) -> int | None:
    """The budget under which just these first rounds are taken: with it the settings of a map make the same map, and no
    more work of another answer or of other weights."""
    passes = sum(one.passes(settings) for one in taken)
    return passes + QUICK_PASSES * (len(taken) + 1) if len(taken) > 1 else None


def _split(settings: IgosSettings, passes: int, number: int) -> Round:
    """The ``number``-th round from 0, of about so many passes."""
    passes, refine = max(0, passes), settings.refine > 0
    more = 1 if number == 1 else 2
    ig_steps, levels = more * settings.ig_steps, settings.refine_levels if number == 1 else None
    on_mask = passes if not refine else 0 if number == 1 else passes // 2
    iterations = on_mask // settings.masks_at_once(ig_steps)
    rest = passes - iterations * settings.masks_at_once(ig_steps)
    return Round(iterations, ig_steps, rest // settings.levels_at_once(levels) if refine else 0, levels)


class Judge:
    """Keeps the best map of the rounds so far, and says when to stop.

    Attributes:
        best: the map, ``(row, col)``.
        gains: quick gain after each round.
        stopped: why no round follows, as a sentence; ``None`` while one may.
    """

    def __init__(self, problem: Problem, settings: IgosSettings) -> None:
        self._problem, self._settings = problem, settings
        self._center: float | None = None
        self._passes: list[int] = []
        self._bounded = -math.inf
        self.best: torch.Tensor | None = None
        self.gains: list[float] = []
        self.stopped: str | None = None

    def take(self, heat: torch.Tensor, seen: torch.Tensor, coming: Sequence[Round]) -> None:
        """Judge the map of a round, the first of ``coming``; the second would follow, where there is one."""
        one, *following = coming
        deletion, insertion = quick_areas(self._problem, heat, seen)
        gain, before = insertion - deletion, max(self.gains, default=-math.inf)
        self.gains.append(gain)
        self._passes.append(one.passes(self._settings) + sum(self._passes[-1:]))
        if self.best is None or gain > before:
            self.best, self._bounded = heat, min(insertion, 1.0) - max(deletion, 0.0)
        highest = max(gain, before)
        if math.isnan(gain):
            self.stopped = "there is nothing to measure its score by"
        elif not following:
            self.stopped = f"the budget of {self._settings.budget} passes is spent"
        elif self._bounded >= self._settings.enough:
            self.stopped = f"its insertion − deletion is about {highest:.2f}, which is enough"
        elif self._little_missing(following[0]) and self._clear(highest, heat, seen):
            self.stopped = f"its insertion − deletion is about {highest:.2f}, and the next round would be long"
        elif one.iterations and gain < before + HELP and self._clear(highest, heat, seen):
            self.stopped = "more passes did not help"

    def _little_missing(self, following: Round) -> bool:
        """Whether less is missing than the passes of the round that would follow are worth."""
        length = following.passes(self._settings) / self._passes[0]
        return PERFECT - self._bounded <= (PERFECT - self._settings.enough) * length**2

    def _clear(self, gain: float, heat: torch.Tensor, seen: torch.Tensor) -> bool:
        """Whether a gain is clear of the floors."""
        return gain >= MARGIN + max(MIN_GAIN, self._of_center(heat, seen))

    def _of_center(self, heat: torch.Tensor, seen: torch.Tensor) -> float:
        if self._center is None:
            deletion, insertion = quick_areas(self._problem, center_values(tuple(heat.shape)), seen)
            self._center = insertion - deletion
        return self._center

    def told(self) -> dict[str, Any]:
        """What the heatmap's provenance says of it: gradient passes and gain after each round, and why it ended."""
        made = [{"passes": passes, "gain": gain} for passes, gain in zip(self._passes, self.gains, strict=True)]
        return {"rounds": made, "stopped": self.stopped}
