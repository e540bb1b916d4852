"""What methods share that talk to the model through masks: the score they follow, and signed attributions as a heatmap.

``score`` of a method is one of

* ``"log"``: log-likelihood of the selected tokens, nats (paper, Eq. 7);
* ``"prob"``: mean of their probabilities, as the deletion and insertion curves score;
* ``"geometric"``: exp of the mean log-likelihood, their geometric mean.

Heatmaps are scaled to a highest value of 1; the diagnostics say what that 1 stands for, ``unit``, in the score's unit.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from lvlm_probe.errors import ExplainError, ImageError, MaskError, ProcessorRefused
from lvlm_probe.explainers.registry import Problem

__all__ = [
    "NO_SIGHT",
    "ScoreKind",
    "Sign",
    "check_rules",
    "no_effect",
    "require_finite",
    "scaled",
    "score_of",
    "score_rule",
    "sign_rule",
    "whole_rule",
]

ScoreKind = Literal["log", "prob", "geometric"]
Sign = Literal["positive", "absolute"]

NO_SIGHT = "the model sees no part of this picture"


def no_effect(problem: Problem) -> str | None:
    """Why this picture has no heatmap, as a sentence, where it plays no part in the selected tokens; ``None`` where it
    does, or nobody can tell.

    It plays no part when replacing it, and no other picture of the prompt, by its baseline moves the log-probability of
    every selected token by no more than rounding (``Replay.rounding``). With one picture the passes on the whole
    picture and on the baseline say so, which a replay keeps; with several it takes one pass more. On a trace alone the
    recorded ratios say so, which are those of all pictures together.
    """
    replay, steps = problem.replay, list(problem.selection.indices)
    several = replay.n_images > 1
    try:
        if several and problem.live:
            with torch.no_grad():
                without = replay.log_probs(torch.zeros(1, 1, 1, device=replay.device), image=problem.image)[0]
            moved = replay.original_log_probs - without.to(replay.original_log_probs)
        elif (ratios := replay.llr) is None:
            return None
        else:
            moved = ratios if isinstance(ratios, torch.Tensor) else torch.tensor(ratios)
    except (ImageError, MaskError, ProcessorRefused):
        return None  # no mask reaches the pixels: methods that need none still work
    moved = moved.detach().double().cpu()[steps].abs()
    rounding: torch.Tensor | None = getattr(replay, "rounding", None)
    allowed = torch.zeros_like(moved) if rounding is None else rounding.detach().double().cpu()[steps]
    if not bool((moved <= allowed).all()):  # NaN has an effect: methods say what is wrong with it
        return None
    name = f"picture {problem.image + 1} of {replay.n_images}" if several else "the picture"
    kind = str(replay.baseline.get("kind") or "baseline")
    what = "with all pictures" if several and not problem.live else "with it"
    return (
        f"{name} plays no part: the score of these tokens does not change with the picture ({what} replaced by the "
        f"{kind} baseline their log-probabilities move by at most {float(moved.max()):.2g} nats, and rounding by "
        f"{float(allowed.max()):.2g}){_same_picture(problem)}"
    )


def _same_picture(problem: Problem) -> str:
    """A way out where the baseline cannot hide anything: it is the picture itself."""
    path = getattr(problem.replay, "path", None) if problem.live else None
    if path is None or len(path.baseline_images) <= problem.image:
        return ""
    picture, other = path.images[problem.image], path.baseline_images[problem.image]
    if picture.size != other.size or picture.convert("RGB").tobytes() != other.convert("RGB").tobytes():
        return ""
    return "; its baseline is the picture itself: choose another, such as explain(replay.over('blank'))"


def score_of(problem: Problem, log_probs: torch.Tensor, kind: ScoreKind) -> torch.Tensor:
    """Scores of masked pictures, ``(batch, step)`` → ``(batch,)``; see the module for the kinds."""
    if kind == "log":
        return problem.score(log_probs)
    chosen = log_probs[:, list(problem.selection.indices)]
    return chosen.exp().mean(dim=1) if kind == "prob" else chosen.mean(dim=1).exp()


def scaled(
    attribution: torch.Tensor, seen: torch.Tensor, *, sign: Sign = "positive", tie_break: float = 1e-3
) -> torch.Tensor | None:
    """A signed attribution as importance in [0, 1], ``(row, col)`` float32 on the CPU; 0 where the model sees nothing.

    ``"positive"``: what speaks against the words is cut to 0. So that such cells keep their order, which deletion and
    insertion go by, the heat is (1 − ε) · a⁺ / max a⁺ + ε · (a − min a) / (max a − min a), ε = ``tie_break``.
    ``"absolute"``: |a| / max |a|. ``None`` when nothing is left to scale.
    """
    raw = attribution.detach().double().cpu()
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


def whole_rule(number: object, at_least: int = 1) -> tuple[object, bool, str]:
    """The rule of a count, for ``check_rules``."""
    holds = isinstance(number, int) and not isinstance(number, bool) and number >= at_least
    return number, holds, f"a whole number of at least {at_least}"


def require_finite(method: str, problem: Problem, *numbers: torch.Tensor) -> None:
    """Raises ``ExplainError`` when scores or gradients are not finite."""
    if not all(bool(item.isfinite().all()) for item in numbers):
        raise ExplainError(
            f"{method} met scores or gradients that are not finite on {problem.replay.trace_id}: load the model in "
            f"float32 (or bfloat16 instead of float16)"
        )
