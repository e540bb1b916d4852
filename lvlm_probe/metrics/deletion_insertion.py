"""Deletion and insertion (Petsiuk et al., 2018): do the regions a heatmap calls important carry the answer?

Cells of the heatmap are ranked by value, highest first. *Deletion* replaces them in that order by the baseline image
and scores the answer on the way; *insertion* starts from the baseline image and brings them back. Both curves are
normalised by their end points (Jiang et al., 2024b; the paper, 4.3): 1 is the whole image and 0 the baseline::

    s(x) = (score(x) − score(baseline)) / (score(original) − score(baseline))          not clamped

Where the image as a whole decides next to nothing (``too_narrow``) that divides by noise, and the scores are NaN.
A score of its own (a contrast, one of the user's) may be lower on the image than on the baseline; then 0 is the image
and 1 the baseline, so that what raises the score is still what a good heatmap shows (``ordered``).

The score is the area under the curve: low is good for deletion, high for insertion, ½ for both is chance.

**The x-axis** is the share of the cells that the model *sees*. Cells out of its sight (margins of a centre crop) cannot
change the score; counted in, they would make both areas look better the more a processor crops. They are ranked last.

**Area.** ``"trapezoid"``: trapezoidal rule over all points, both ends included. ``"release"``: for comparison with
numbers published with the paper, its rule with its two flaws: right end points only, so that a perfectly linear curve
gives 0.494 for deletion and 0.510 for insertion on 32 × 32 cells, and deletion counts the last chunk of cells as if it
scored 1. Its x-axis is the share of *all* cells.

**Sampling.** ``"full"`` scores every point, which is the protocol. ``"adaptive"`` starts with a few and halves the
intervals in which the area may still change, until at most ``tolerance`` of either (normalised) area is open. Where
a curve is monotone between the points that were scored, what is left out lies between its neighbours' values, and the
full curve's area is within ``error_bound``: half of width times difference, summed over the intervals (the width less
its outer cell, a trapezoid either way). No sample excludes a rise and fall between two points: for curves that turn the
figure is an estimate, and ``turns`` says how far the scored points did. Points left out are interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from lvlm_probe._moved import renamed
from lvlm_probe.cards import equal, in_one_line
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.curve_points import (
    STEPS,
    MaskScores,
    area,
    curve_ends,
    curve_masks,
    normalise,
    rank,
    sample_counts,
)
from lvlm_probe.explainers.registry import Shape
from lvlm_probe.explainers.scores import Followed, check_rules, even_masks, followed, too_narrow, whole_rule

if TYPE_CHECKING:
    from collections.abc import Sequence


AreaRule = Literal["trapezoid", "release"]
Sampling = Literal["full", "adaptive"]

TIES_THAT_MATTER = 0.05
TIE_ORDERS = 3
SYNERGY_STEPS = 10
"""Points of the curve of F_syn besides the origin. They are among the 50 of deletion, so only the images without the
question are new: 11 passes."""
_MASK_NUMBERS_AT_ONCE = 2**24
_FIRST_INTERVALS = 8
"""Intervals an adaptive curve starts with: even, so that a turn of some width is met."""


@dataclass(frozen=True, repr=False)
class Curves:
    """Scores along both curves before normalisation.

    Attributes:
        fractions: Share of ranked cells removed (brought back) at each point, ``(point,)``, 0 to 1.
        deletion, insertion: Scores, ``(point,)``, mean over tie orders.
        counts: Number of cells at each point.
        tie_share: Share of seen cells that have the value of another seen cell.
        tie_orders: How many random orders of tied cells were averaged.
        tie_spread: Standard deviation of insertion − deletion over those orders; 0 without ties, NaN where there are
            ties and one order, or no areas.
        original_probability, baseline_probability: Mean probability of the decided tokens at the two ends.
        images: How many different images were scored.
        error_bound: How far the areas under the normalised deletion and insertion curve may be from the full curves';
            0 where every point was scored. A bound for curves that are monotone between scored points.
        turns: How far the normalised curves go the wrong way, up in deletion and down in insertion, summed over the
            scored points; 0 for monotone ones.
        undefined: Why they cannot be normalised (``too_narrow``). Bound and turns are 0 then, there being no areas, and
            adaptive sampling leaves all points but the ends NaN.
    """

    __repr__, __eq__ = in_one_line, equal

    fractions: np.ndarray
    deletion: np.ndarray
    insertion: np.ndarray
    counts: np.ndarray
    tie_share: float
    tie_orders: int
    original_probability: float
    baseline_probability: float
    images: int = 0
    error_bound: tuple[float, float] = (0.0, 0.0)
    turns: tuple[float, float] = (0.0, 0.0)
    undefined: str | None = None
    tie_spread: float = 0.0

    pictures = renamed("pictures", "images")


@dataclass(frozen=True, kw_only=True)
class CurveRule:
    """How curves are sampled and their areas taken.

    Attributes:
        auc: ``"trapezoid"``, or ``"release"`` for comparison with numbers published with the paper.
        tie_orders: random orders of tied cells to average; by default 3 where more than 5 % of cells are tied, else 1.
        seed: of the order of tied cells, and of the random heatmaps that ``evaluate(chance=n)`` scores.
        sampling: ``"full"`` scores every point of the curves; ``"adaptive"`` as few as keep each area within
            ``tolerance`` of the full curve's, for curves that do not turn.
        tolerance: largest error bound of an area under adaptive sampling.

    Raises:
        ExplainError: a field is out of range.
    """

    auc: AreaRule = "trapezoid"
    tie_orders: int | None = None
    seed: int = 0
    sampling: Sampling = "full"
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        positive = isinstance(self.tolerance, Real) and self.tolerance > 0
        check_rules(
            "evaluate",
            tolerance=(self.tolerance, positive, "a positive share of the area"),
            tie_orders=whole_rule(self.tie_orders, or_none=True),
            seed=whole_rule(self.seed, 0),
        )
        one_of("auc", self.auc, "trapezoid", "release")
        one_of("sampling", self.sampling, "full", "adaptive")

    @property
    def release(self) -> bool:
        """Whether points and areas are those of the released recipe, over all cells."""
        return self.auc == "release"


def one_of(name: str, value: object, *known: str) -> None:
    """Raise ``ExplainError`` for a value that is not known."""
    if value not in known:
        raise ExplainError(f"{name} is {' or '.join(map(repr, known))}; got {value!r}")


@dataclass(frozen=True, kw_only=True)
class CurveSettings(CurveRule):
    """How curves are drawn, and what of.

    Attributes:
        score: ``"prob"``, mean probability of the tokens, or ``"log"``, their mean log-likelihood in nats; ``"own"``,
            a score of the user's own as it is.
        steps: points besides the origin; the released recipe has its own.
        ordered: 0 is the lower and 1 the higher of the two ends, whichever is the baseline.
    """

    score: Followed = "prob"
    steps: int = STEPS
    ordered: bool = False

    def ends(self, original: float, baseline: float) -> dict[str, float]:
        """``curve_ends`` by these settings."""
        return curve_ends(original, baseline, ordered=self.ordered)


def tie_share(values: np.ndarray, seen: np.ndarray) -> float:
    """Share of seen cells whose value another seen cell has as well."""
    inside = values[seen]
    if inside.size == 0:
        return 0.0
    _, counts = np.unique(inside, return_counts=True)
    return float(counts[counts > 1].sum() / inside.size)


def release_counts(cells: int) -> np.ndarray:
    """The released recipe's counts: chunks of ``cells // 50`` and a remainder; 0, which it leaves out, is included."""
    chunk = max(1, cells // 50)
    return np.append(np.arange(0, cells, chunk), cells)


def curves(
    values: np.ndarray,
    seen: np.ndarray,
    scores: MaskScores,
    settings: CurveSettings | None = None,
    *,
    decided: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Curves:
    """Score the answer along the deletion and the insertion curve of ``values``.

    Args:
        values: heatmap, ``(row, col)``, or ``(t, row, col)`` of a clip.
        seen: which of its cells reach the model, bool.
        scores: scores the masks; those that it knows already cost nothing.
        settings: how the curves are drawn.
        decided: those of the tokens whose probability at the two ends is reported; by default all.
        progress: called with (done, total) images; with adaptive sampling the total is what may still be needed.

    Raises:
        ExplainError: the model sees none of the cells.
    """
    settings = settings or CurveSettings()
    ranked = int(seen.sum())
    if ranked == 0:
        raise ExplainError("deletion and insertion need cells that the model sees; it sees none of this image")
    points = release_counts(values.size) if settings.release else sample_counts(ranked, settings.steps)
    fractions = points / (values.size if settings.release else ranked)
    shared, before = tie_share(values, seen), len(scores)
    orders = settings.tie_orders
    if orders is None:
        orders = TIE_ORDERS if shared > TIES_THAT_MATTER else 1
    log_probs = scores(even_masks([1.0, 0.0], values.shape))
    ends = _score(log_probs, settings.score, scores)
    original, baseline = (float(end) for end in ends)
    generator = np.random.default_rng(settings.seed)
    # Deletion and insertion, one pair per order: from the whole image to the baseline, and back.
    drawn = [
        _Curve(rank(values, seen, generator), points, insert=insert, ends=ends[::-1] if insert else ends)
        for _ in range(orders)
        for insert in (False, True)
    ]
    adaptive, span = settings.sampling == "adaptive", abs(original - baseline)
    undefined = too_narrow(original, baseline, score=settings.score)
    # What adaptive sampling left out is not drawn through where there is no curve to stay close to.
    drawn_through = not (adaptive and undefined)
    if drawn_through:
        shape, tolerance = values.shape, settings.tolerance * span if adaptive else None
        _fill(drawn, fractions, scores, settings.score, shape, tolerance, progress)
    if undefined is None:
        met = np.concatenate([curve.values[curve.scored] for curve in drawn])
        undefined = too_narrow(original, baseline, score=settings.score, met=met)
    judged = log_probs[:, [scores.indices.index(step) for step in (decided or scores.indices)]]
    probability = followed(judged, "prob", scores.own)
    pairs = [[curve for curve in drawn if curve.insert is insert] for insert in (False, True)]
    deletion, insertion = (
        np.mean([curve.filled(fractions) if drawn_through else curve.values for curve in pair], axis=0)
        for pair in pairs
    )
    sign = 1.0 if original >= baseline else -1.0
    bounds = [float(np.mean([curve.open(fractions).sum() for curve in pair])) for pair in pairs]
    spread = 0.0
    if shared > 0:
        known = orders > 1 and drawn_through and undefined is None
        spread = _spread(pairs, points, fractions, settings, ends) if known else math.nan
    turns = [float(np.mean([curve.turns(sign if curve.insert else -sign) for curve in pair])) for pair in pairs]
    return Curves(
        fractions=fractions,
        deletion=deletion,
        insertion=insertion,
        counts=points,
        tie_share=shared,
        tie_orders=orders,
        original_probability=float(probability[0]),
        baseline_probability=float(probability[1]),
        images=len(scores) - before,
        error_bound=(0.0, 0.0) if undefined else (bounds[0] / span, bounds[1] / span),
        turns=(0.0, 0.0) if undefined else (turns[0] / span, turns[1] / span),
        undefined=undefined,
        tie_spread=spread,
    )


def _spread(
    pairs: list[list[_Curve]], points: np.ndarray, fractions: np.ndarray, settings: CurveSettings, ends: np.ndarray
) -> float:
    """Standard deviation of insertion − deletion over the orders that the curves are drawn in."""
    gains = [
        _area(high.filled(fractions), points, fractions, settings, ends, insert=True)
        - _area(low.filled(fractions), points, fractions, settings, ends, insert=False)
        for low, high in zip(*pairs, strict=True)
    ]
    return float(np.std(gains, ddof=1))


def synergy(
    values: np.ndarray, seen: np.ndarray, whole: MaskScores, unread: MaskScores, settings: CurveSettings
) -> tuple[np.ndarray, np.ndarray]:
    """What image and question give together, as the image is taken away in the order of ``values``.

    With v the score with the question read and u the same with the question unread, I_p the image without the first
    share p of its cells::

        F_syn(p) = v(I) − v(I_p) − u(I) + u(I_p)          Ky et al., arXiv:2605.22168, for the image's side

    Args:
        values, seen, settings: as for ``curves``; ties are in the order that it draws first.
        whole, unread: score masks with and without the question.

    Returns:
        shares p and F_syn(p), ``(point,)`` each; 0 at p = 0, and at p = 1 the same for every heatmap.
    """
    points = sample_counts(int(seen.sum()), SYNERGY_STEPS)
    masks = curve_masks(rank(values, seen, np.random.default_rng(settings.seed)), points, values.shape, insert=False)
    with_question, without = (_score(one(masks), settings.score, one) for one in (whole, unread))
    return points / points[-1], (with_question[0] - with_question) - (without[0] - without)


def _area(
    values: np.ndarray,
    points: np.ndarray,
    fractions: np.ndarray,
    settings: CurveSettings,
    ends: np.ndarray,
    *,
    insert: bool,
) -> float:
    """The area under one curve, normalised."""
    curve = normalise(values, **settings.ends(float(ends[0]), float(ends[1])), score=settings.score)
    return release_area(points, curve, insert=insert) if settings.release else area(fractions, curve)


def _fill(
    drawn: list[_Curve],
    fractions: np.ndarray,
    scores: MaskScores,
    score: Followed,
    shape: Shape,
    tolerance: float | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Score the points of the curves: all of them, or until at most ``tolerance`` of either area is open."""
    total, done = 2 + len(drawn) * (len(fractions) - 2), 2
    at_once = max(1, _MASK_NUMBERS_AT_ONCE // drawn[0].order.size)
    while True:
        wanted = [
            (curve, point)
            for curve in drawn
            for point in (curve.missing() if tolerance is None else curve.next_points(fractions, tolerance))
        ]
        if not wanted:
            return
        for start in range(0, len(wanted), at_once):
            part = wanted[start : start + at_once]
            masks = torch.cat([curve.mask(point, shape) for curve, point in part])
            for (curve, point), value in zip(part, _score(scores(masks), score, scores), strict=True):
                curve.put(point, value)
            done += len(part)
            if progress is not None:
                progress(done, total)


class _Curve:
    """One curve along one order of the cells, as far as it is ``scored``; NaN where it is not."""

    def __init__(self, order: np.ndarray, points: np.ndarray, *, insert: bool, ends: np.ndarray) -> None:
        self.order, self.points, self.insert = order, points, insert
        self.values = np.full(len(points), np.nan)
        self.scored = np.zeros(len(points), dtype=bool)
        self.put(0, ends[0])
        self.put(-1, ends[1])

    def put(self, point: int, value: float) -> None:
        self.values[point], self.scored[point] = value, True

    def mask(self, point: int, shape: Shape) -> torch.Tensor:
        """The mask of a point, ``(1, *shape)``."""
        return curve_masks(self.order, self.points[[point]], shape, insert=self.insert)

    def missing(self) -> list[int]:
        return np.flatnonzero(~self.scored).tolist()

    def filled(self, fractions: np.ndarray) -> np.ndarray:
        """All values, those between scored points interpolated."""
        return np.asarray(np.interp(fractions, fractions[self.scored], self.values[self.scored]))

    def open(self, fractions: np.ndarray) -> np.ndarray:
        """What each interval between scored points may change the area by, if the curve is monotone in it.

        The points left out all lie at one end's value at worst; the outermost cell next to the other end is a trapezoid
        either way, so it does not count.
        """
        known = np.flatnonzero(self.scored)
        left, right = known[:-1], known[1:]
        outer = np.minimum(fractions[left + 1] - fractions[left], fractions[right] - fractions[right - 1])
        width = np.where(right - left > 1, fractions[right] - fractions[left] - outer, 0.0)
        return np.asarray(width * np.abs(self.values[right] - self.values[left]) / 2)

    def next_points(self, fractions: np.ndarray, tolerance: float) -> list[int]:
        """Points that halve the intervals which are open by most, until what the others leave open is half of
        ``tolerance``; none when all together leave no more than that open."""
        known = np.flatnonzero(self.scored)
        if len(known) == 2:
            even = np.rint(np.linspace(0, len(self.values) - 1, _FIRST_INTERVALS + 1)).astype(int)
            return [point for point in np.unique(even).tolist() if not self.scored[point]]
        left_open = self.open(fractions)
        if not left_open.sum() > tolerance:  # also where a score is no number, and there will be no area
            return []
        rest, halves = float(left_open.sum()), []
        for interval in np.argsort(-left_open, kind="stable"):
            if rest <= tolerance / 2 or left_open[interval] == 0:
                break
            rest -= float(left_open[interval])
            halves.append(int(known[interval] + known[interval + 1]) // 2)
        return halves

    def turns(self, sign: float) -> float:
        """How far the scored points go against the direction ``sign`` (1 is up), in all."""
        steps = sign * np.diff(self.values[self.scored])
        return float(-steps[steps < 0].sum())


def release_area(counts: np.ndarray, curve: np.ndarray, *, insert: bool) -> float:
    """The released recipe's area: right end points; deletion's last chunk counts as 1 (a slip of precedence)."""
    chunks, scores = np.diff(counts), np.array(curve[1:], dtype=np.float64)
    if not insert:
        scores[-1] = 1.0
    return float((chunks * scores).sum() / counts[-1])


def _score(log_probs: torch.Tensor, kind: Followed, of: MaskScores) -> np.ndarray:
    scores: np.ndarray = followed(log_probs, kind, of.own).numpy()
    return scores
