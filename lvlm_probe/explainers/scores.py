"""Scores and heat: the score of the selected tokens that methods and metrics follow, and attributions as a heatmap.

``score`` is one of

* ``"log"``: log-likelihood of the selected tokens, nats: of methods their sum (paper, Eq. 7), of curves their mean;
* ``"prob"``: mean of their probabilities, as the deletion and insertion curves score;
* ``"geometric"``: exp of the mean log-likelihood, their geometric mean; of methods alone.

A selection with a score of its own is followed by that: as it is by ``"log"``, and by the others as a probability where
it is one's log-odds (a contrast), else as it is too.

Heatmaps are scaled to a highest value of 1; the diagnostics say what that 1 stands for, ``unit``, in the score's unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch

from lvlm_probe.boxes.painting import paint, pitch
from lvlm_probe.errors import ExplainError, ImageError, MaskError, ProcessorRefused
from lvlm_probe.explainers.registry import Outcome, Problem, Shape
from lvlm_probe.kinds import is_whole
from lvlm_probe.replaying.own_scores import OwnScore
from lvlm_probe.replaying.protocol import Estimating

CurveScore = Literal["log", "prob"]
Followed = Literal[CurveScore, "own"]
"""What curves follow: also a score of the user's own that has no unit."""
ScoreKind = Literal[CurveScore, "geometric"]
Sign = Literal["positive", "absolute"]

LEAST_SHARE = 0.05
"""Share of the original score that has to go with the whole image before parts of it can be measured by it. Scores
of masked images wander by some per cent for any mask, as no training image was ever masked; divided by less than
that, the wandering alone runs over the whole scale. It is also the paper's limit of what a baseline may leave (A.1)."""

NO_SIGHT = "the model sees no part of this image"


def no_effect(problem: Problem) -> str | None:
    """Why this image has no heatmap, as a sentence, where it plays no part in the selected tokens; ``None`` where it
    does, or nobody can tell.

    It plays no part when replacing it, and no other image of the prompt, by its baseline moves the log-probability of
    every selected token by no more than rounding (``Replay.rounding``). With one image the passes on the whole
    image and on the baseline say so, which a replay keeps; with several it takes one pass more. On a trace alone the
    recorded ratios say so, which are those of all images together.
    """
    replay, steps = problem.measuring, list(problem.columns)
    if problem.live and "passes" not in replay.offers:
        return None
    several = replay.n_images > 1
    try:
        if several and problem.live:
            with torch.no_grad():
                nothing = torch.zeros_like(problem.whole).to(replay.device)
                without = replay.log_probs(nothing, image=problem.target)[0]
            moved = replay.original_log_probs - without.to(replay.original_log_probs)
        elif (ratios := replay.llr) is None:
            return None
        else:
            moved = ratios if isinstance(ratios, torch.Tensor) else torch.tensor(ratios)
    except (ImageError, MaskError, ProcessorRefused):
        return None  # no mask reaches the pixels: methods that need none still work
    moved = moved.detach().cpu().double()[steps].abs()
    allowed = replay.rounding.detach().cpu().double()[steps]
    if not bool((moved <= allowed).all()):  # NaN has an effect: methods say what is wrong with it
        return None
    name = f"image {problem.image + 1} of {replay.n_images}" if several else "the image"
    name = name if problem.clip is None else "the clip"
    kind = str(replay.baseline.get("kind") or "baseline")
    what = "with all images" if several and not problem.live else "with it"
    own = problem.selection.score
    scored, unit = ("their log-probabilities move", "nats") if own is None else (f"{own.name!r} moves", "")
    return (
        f"{name} plays no part: the score of these tokens does not change with the image ({what} replaced by the "
        f"{kind} baseline {scored} by at most {f'{float(moved.max()):.2g} {unit}'.strip()}, and rounding by "
        f"{float(allowed.max()):.2g}){_same_image(problem)}"
    )


def no_slope(problem: Problem) -> str | None:
    """Why a method by gradients has found nothing, as a sentence, where they are zero in every cell of the whole image,
    as of words that are certain to the last digit. ``None`` where they are not. One pass forward and backward.
    """
    whole = problem.whole.to(problem.replay.device)
    _, slopes = problem.replay.score_and_grad(whole, problem.score, image=problem.target, steps=problem.columns)
    if bool(slopes.any()):
        return None
    return (
        "the score's gradient is zero in every cell of the whole image, which says nothing of its regions: a score at "
        "its end within the model's number format (words with a probability of 1) has no slope; use a method that "
        "needs no gradients: occlusion, rise, greedy"
    )


def _same_image(problem: Problem) -> str:
    """A way out where the baseline cannot hide anything: it is the image itself."""
    if not problem.live:
        return ""
    path, mine = problem.replay.path, list(problem.images)
    if len(path.baseline_images) <= mine[-1]:
        return ""
    for image, other in ((path.images[k], path.baseline_images[k]) for k in mine):
        if image.size != other.size or image.convert("RGB").tobytes() != other.convert("RGB").tobytes():
            return ""
    return "; its baseline is the image itself: choose another, such as explain(replay.over('blank'))"


def score_of(problem: Problem, log_probs: torch.Tensor, kind: ScoreKind) -> torch.Tensor:
    """Scores of masked images, ``(batch, step)`` → ``(batch,)``; see the module for the kinds."""
    if kind == "log":
        return problem.score(log_probs)
    chosen, own = problem.chosen(log_probs), problem.selection.score
    if kind == "geometric" and own is None:
        return chosen.mean(dim=1).exp()
    return followed(chosen, "prob", own)


def followed(log_probs: torch.Tensor, kind: Followed, own: OwnScore | None) -> torch.Tensor:
    """What a curve follows at each mask: of log-probabilities ``(batch, token)`` their mean, or that of the
    probabilities; of a score of its own ``(batch, 1)`` the score, or what it is the log-odds of. Returns ``(batch,)``.
    """
    if kind != "prob":
        return log_probs.mean(dim=1)
    probability = log_probs.exp() if own is None else own.bounded(log_probs)
    return (log_probs if probability is None else probability).mean(dim=1)


def scores_between(problem: Problem, masks: torch.Tensor, kind: ScoreKind) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the most that the scores of masked images can be, ``(batch,)`` each: the same thing twice but where
    the replay knows log-probabilities within bounds."""
    replay, steps = problem.replay, problem.columns
    if isinstance(replay, Estimating):
        low, high = replay.between(masks, image=problem.image, steps=steps)
        return score_of(problem, low, kind), score_of(problem, high, kind)
    found = score_of(problem, replay.log_probs(masks, image=problem.target, steps=steps), kind)
    return found, found


def scaled(
    attribution: torch.Tensor, seen: torch.Tensor, *, sign: Sign = "positive", tie_break: float = 1e-3
) -> torch.Tensor | None:
    """A signed attribution as importance in [0, 1], ``(row, col)`` float32 on the CPU; 0 where the model sees nothing.

    ``"positive"``: what speaks against the words is cut to 0. So that such cells keep their order, which deletion and
    insertion go by, the heat is (1 − ε) · a⁺ / max a⁺ + ε · (a − min a) / (max a − min a), ε = ``tie_break``.
    ``"absolute"``: |a| / max |a|. ``None`` when nothing is left to scale.
    """
    raw = attribution.detach().cpu().double()
    seen = seen.cpu()
    if not seen.any():
        return None
    kept = (raw.abs() if sign == "absolute" else raw.clamp(min=0.0)).masked_fill(~seen, 0.0)
    highest = kept.max()
    if not highest > 0:
        return None
    heat = kept / highest
    if sign == "positive" and tie_break > 0:
        low, high = raw[seen].min(), raw[seen].max()
        order = (raw - low) / (high - low) if high > low else torch.zeros_like(raw)
        heat = (1 - tie_break) * heat + tie_break * order
    return heat.masked_fill(~seen, 0.0).clamp(0.0, 1.0).float()


def even_masks(values: Sequence[float], shape: Shape) -> torch.Tensor:
    """One mask for each value, which it has in all cells, ``(batch, *shape)`` float32 on the CPU."""
    made = torch.tensor(list(values), dtype=torch.float32).reshape(-1, *[1] * len(shape))
    return made.expand(-1, *shape).contiguous()


def check_rules(method: str, **rules: tuple[object, bool, str]) -> None:
    """Raises ``ExplainError`` for the first parameter, ``name=(value, holds, rule)``, whose rule does not hold."""
    for name, (value, holds, rule) in rules.items():
        if not holds:
            raise ExplainError(f"{method}: {name} is {rule}; got {name}={value!r}")


def sign_rule(sign: object) -> tuple[object, bool, str]:
    """The rule of a ``sign`` parameter, for ``check_rules``."""
    return sign, sign in get_args(Sign), "'positive' or 'absolute'"


def score_rule(score: object) -> tuple[object, bool, str]:
    """The rule of a ``score`` parameter, for ``check_rules``."""
    return score, score in get_args(ScoreKind), "'log', 'prob' or 'geometric'"


def whole_rule(number: object, at_least: int = 1, *, or_none: bool = False) -> tuple[object, bool, str]:
    """The rule of a count, or of one that may be ``None``, for ``check_rules``."""
    holds = is_whole(number) and int(number) >= at_least
    rule = f"a whole number of at least {at_least}"
    return (number, holds or number is None, f"{rule}, or None") if or_none else (number, holds, rule)


def require_finite(method: str, problem: Problem, *numbers: torch.Tensor) -> None:
    """Raises ``ExplainError`` when scores or gradients are not finite."""
    check_finite(method, problem.replay.trace_id, *numbers)


def check_finite(what: str, trace_id: str, *numbers: torch.Tensor | np.ndarray) -> None:
    """``require_finite`` of anything else that measures by the model: no sentence can be made of such numbers."""
    if not all(bool(torch.as_tensor(item).isfinite().all()) for item in numbers):
        raise ExplainError(
            f"{what} met scores or gradients that are not finite on {trace_id}: load the model in float32 (or bfloat16 "
            f"instead of float16)"
        )


def finish(
    grid: torch.Tensor,
    met: torch.Tensor,
    params: Mapping[str, object],
    *,
    diagnostics: Mapping[str, object] | None = None,
) -> Outcome:
    """An outcome from a painted grid: scaled from its smallest to its largest value, 0 where no token is.

    Raises:
        ExplainError: Values are not finite.
    """
    if not bool(torch.isfinite(grid).all()):
        raise ExplainError("the method gave values that are not finite; replay on a model in float32")
    if not bool(met.any()):
        return Outcome(None, params, reason="no token of the method has a place in the image")
    low, high = float(grid[met].min()), float(grid[met].max())
    if high <= low:
        return Outcome(None, params, reason="the method gives every region of the image the same value")
    scaled = torch.where(met, (grid - low) / (high - low), 0.0)
    return Outcome(scaled.clamp(0, 1), params, diagnostics=diagnostics or {})


def of_tokens(
    problem: Problem,
    values: torch.Tensor,
    boxes: np.ndarray,
    size: int | tuple[int, int] | None,
    params: Mapping[str, object],
    *,
    diagnostics: Mapping[str, object] | None = None,
) -> Outcome:
    """An outcome from one value per token (``paint``, ``finish``).

    Args:
        values, boxes: ``(token,)``, and ``(token, 4)`` or of a clip ``(token, 6)``.
        size: Grid of the heatmap; ``None`` is the tokens' own. It is added to ``params``.

    Raises:
        ExplainError: Values are not finite, or no token has a place.
    """
    shape = pitch(boxes, problem.extent) if size is None else problem.shape(size)
    grid, met = paint(values, boxes, problem.extent, shape)
    return finish(grid, met, {**params, "size": list(shape)}, diagnostics=diagnostics)


def too_narrow(
    original: float, baseline: float, *, score: Followed = "prob", met: np.ndarray | None = None
) -> str | None:
    """Why scores cannot be normalised by their two ends, as a sentence; ``None`` where they can.

    The ends lie closer than ``LEAST_SHARE`` of the original: of the mean probability, or, in nats, of the geometric
    mean probability, 1 − e^(−|original − baseline|). Or closer than ``LEAST_SHARE`` of the range of what was met
    between them, against which they are lost.

    Args:
        original, baseline: Score of the whole image and of the baseline image.
        score: ``"prob"`` or ``"log"``; ``"own"`` has no unit and no zero, so there is no share of it.
        met: Scores along the curves; NaN is left out.
    """
    span = abs(original - baseline)
    if not math.isfinite(span):
        return f"the score is not a number with the whole image ({original:g}) or on the baseline ({baseline:g})"
    lost = -math.expm1(-span) if score == "log" else span
    whole = {"prob": abs(original), "log": 1.0, "own": 0.0}[score]
    if not lost > 0 or lost < LEAST_SHARE * whole:
        share = lost / abs(original) if score == "prob" and original else lost
        return (
            f"the whole image decides {share:.2g} of the score ({original:.3g} with it, {baseline:.3g} on the "
            f"baseline), and parts of it are measured by that (at least {LEAST_SHARE:g} is needed)"
        )
    if met is None:
        return None
    there = met[~np.isnan(met)]
    if not np.isfinite(there).all() or len(there) < len(met):
        return "scores of masked images are not numbers"
    if span < LEAST_SHARE * (there.max() - there.min()):
        return (
            f"scores of masked images run from {there.min():.3g} to {there.max():.3g}, and the whole image decides "
            f"only {span:.2g} of that ({original:.3g} with it, {baseline:.3g} on the baseline)"
        )
    return None
