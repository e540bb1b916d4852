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

from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.registry import Problem

__all__ = [
    "NO_SIGHT",
    "ScoreKind",
    "Sign",
    "check_rules",
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
