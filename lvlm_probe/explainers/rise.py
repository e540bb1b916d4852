"""RISE (Petsiuk et al., 2018): how well the words do on images of which random parts are kept.

Masks m are random bits, 1 with probability p, on knots 1/s of the image apart, shifted at random by less than that
and interpolated bilinearly. Importance of a place is the mean score of the images that show it::

    S = (1 / N p) Σ_n f(m_n) · m_n

A score that does not depend on the image adds to S nothing but the same for all cells in expectation, yet with N
masks it is most of the noise. With ``centred`` the mean score is taken off first, with the one degree of freedom that
this costs paid for: S = (1 / (N − 1) p) Σ_n (f(m_n) − f̄) · m_n. Its expectation is that of the sum above minus E f for
every cell, exactly, and its variance is far smaller. Both are shown relative to the mean score: a cell is important if
images that show it do better than images in general.

Of a model that gives bounds on probabilities instead of them (``replaying.protocol.Estimating``), f is the middle of
the least and the most that a score can be, and half the distance, weighted as f is, bounds by how much S is off. Where
that is as much as the highest value there is no map. Of one that gives samples, f is the share of the tokens that were
drawn: its expectation is the mean of their probabilities, so that of S is what it would be, and the standard error has
the samples' noise in it.

The standard error of S, per cell, is in the diagnostics, in units of the highest value. Expectations of probabilities
suit this average; those of log-likelihoods are ruled by the few masks under which the words are all but impossible.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.registry import Cost, Outcome, Problem, Shape, batches, register
from lvlm_probe.explainers.scores import (
    NO_SIGHT,
    ScoreKind,
    check_rules,
    require_finite,
    scaled,
    score_rule,
    scores_between,
    whole_rule,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


def _cost(problem: Problem, params: Mapping[str, Any]) -> Cost:
    masks, batch = params["masks"], params["batch"]
    shape = problem.shape(params["size"], cells=1024)
    numbers = 2 * min(batch, masks) * math.prod(shape)
    return Cost("forward", masks, 0, batches(masks, batch), numbers=numbers, grids=(shape,))


@register("rise", cost=_cost, clips=True, takes=("bounds", "samples"))
@torch.no_grad()
def rise(
    problem: Problem,
    *,
    masks: int = 1000,
    cells: int | tuple[int, int] = 8,
    p: float = 0.5,
    size: int | tuple[int, int] | None = None,
    score: ScoreKind = "geometric",
    centred: bool = True,
    batch: int = 64,
) -> Outcome:
    """RISE by ``masks`` forward passes; the module's docstring has the method.

    Args:
        problem: The answer's tokens and the image.
        masks: N, random masks.
        cells: s, knots of a mask along the image, ``n`` or ``(row, col)``; of a clip also ``(t, row, col)``.
        p: Share of the image that a mask keeps.
        size: Cells of masks and heatmap, ``None`` for about 1024 as square as the image allows.
        score: ``"geometric"`` mean of the tokens' probabilities, ``"prob"`` for the arithmetic one, ``"log"``.
        centred: Take the mean score off; ``False`` is the published sum.
        batch: Masks per call of the replay, between two reports of progress.

    Raises:
        ExplainError: A parameter out of range, scores that are not finite, or a kind of score that bounds or samples
            do not bound or estimate.
    """
    check_rules(
        "rise",
        masks=whole_rule(masks, 2),
        p=(p, 0 < p < 1, "between 0 and 1, both excluded"),
        score=score_rule(score),
        batch=whole_rule(batch),
    )
    _check_score(problem, score)
    knots = problem.shape(cells)
    shape = problem.shape(size, cells=1024)
    params = {"masks": masks, "cells": list(knots), "p": p, "size": list(shape), "score": score, "centred": centred}
    params["batch"] = batch
    seen = problem.seen(shape)
    if not seen.any():
        return Outcome(None, params, reason=NO_SIGHT)
    drawn = RandomMasks(masks, knots, p, problem.generator())
    parts = [slice(start, min(start + batch, masks)) for start in range(0, masks, batch)]
    ends = []
    problem.advance(0, masks)
    for part in parts:
        drawn_masks = drawn.masks(part, shape).to(problem.replay.device)
        ends.append(torch.stack(scores_between(problem, drawn_masks, score)).cpu().double())
        problem.advance(part.stop, masks)
    low, high = torch.cat(ends, dim=1)
    f, off = (low + high) / 2, (high - low) / 2
    require_finite("rise", problem, f)
    # Masks are drawn again where they are needed again: at the size of a photo a thousand of them fill the memory.
    value, error = estimate(f, lambda part: drawn.masks(part, shape), parts, p, centred=centred)
    relative = value if centred else value - f.mean()
    heat = scaled(relative, seen)
    if heat is None:
        return Outcome(None, params, reason="the words do no better on images that show any one place than on others")
    unit = float(relative[seen].max())
    diagnostics = {
        "mean_score": float(f.mean()),
        "unit": unit,
        "standard_error_mean": float(error[seen].mean()) / unit,
        "standard_error_max": float(error[seen].max()) / unit,
    }
    if off.any():
        bound = _bound(off, lambda part: drawn.masks(part, shape), parts, p, centred=centred)
        share, most = float((off > 0).double().mean()), float(bound[relative == relative[seen].max()].max()) / unit
        diagnostics |= {"bounded_share": share, "bound_max": float(bound[seen].max()) / unit}
        if most >= 1:
            reason = (
                f"the words' tokens are not listed for {share:.0%} of the masked images, and by what is known of those "
                "no place is certain to matter: choose words that stay likely, or a server that gives log-probabilities"
            )
            return Outcome(None, params, reason=reason, diagnostics=diagnostics)
    return Outcome(heat, params, diagnostics=diagnostics)


def _check_score(problem: Problem, score: ScoreKind) -> None:
    offers = problem.replay.offers
    if "samples" in offers and score != "prob" and (score == "log" or len(problem.selection) > 1):
        raise ExplainError(
            f"rise: by samples the {score!r} score of these tokens would be biased: use score='prob', or a single token"
        )
    if "bounds" in offers and score == "log":
        raise ExplainError("rise: a token that is not listed has no least log-probability: score='prob' or 'geometric'")


def _bound(
    off: torch.Tensor, masks: Callable[[slice], torch.Tensor], parts: Sequence[slice], p: float, *, centred: bool
) -> torch.Tensor:
    """By how much S, relative to the mean score, is off at most, ``(row, col)``, when f of every mask is by ``off``."""
    number = len(off)
    middle = torch.stack([masks(part).double().sum(dim=0) for part in parts]).sum(dim=0) / number if centred else p
    total = torch.stack([(off[part, None, None] * (masks(part) - middle).abs()).sum(dim=0) for part in parts]).sum(
        dim=0
    )
    return total / p / (number - 1 if centred else number)


def estimate(
    scores: torch.Tensor, masks: Callable[[slice], torch.Tensor], parts: Sequence[slice], p: float, *, centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """S and its standard error, ``(row, col)`` float64 each, in the unit of the scores.

    Args:
        scores: f of every mask, ``(N,)`` float64.
        masks: Gives the masks ``(batch, row, col)`` of one of ``parts``, which cover 0 … N − 1.
        p: Share of the image that a mask keeps.
        centred: Whether the mean score is taken off.
    """
    number = len(scores)
    used = scores - scores.mean() if centred else scores
    average = torch.stack([masks(part).double().sum(dim=0) for part in parts]).sum(dim=0) / number
    first, second = torch.zeros_like(average), torch.zeros_like(average)
    for part in parts:
        weight = used[part].reshape(-1, *[1] * average.ndim)
        # Σ (f − f̄) m is Σ (f − f̄)(m − m̄): the latter is what varies from mask to mask.
        product = weight * (masks(part).double() - (average if centred else 0.0)) / p
        first += product.sum(dim=0)
        second += product.square().sum(dim=0)
    variance = (second / number - (first / number).square()).clamp(min=0.0) * number / (number - 1)
    return first / (number - 1 if centred else number), (variance / number).sqrt()


class RandomMasks:
    """Random masks, see the module: the numbers of all of them; the masks themselves are made when asked for."""

    def __init__(self, number: int, knots: Shape, p: float, generator: torch.Generator) -> None:
        self.knots = knots
        # Two more knots than fit: one for the far end, one for the shift. So every cell has the same distribution.
        more = [count + 2 for count in knots]
        self.bits = (torch.rand(number, *more, generator=generator, dtype=torch.float32) < p).float()
        self.shift = torch.rand(number, len(knots), generator=generator, dtype=torch.float32)

    def masks(self, part: slice, shape: Shape) -> torch.Tensor:
        """The masks of ``part`` on a grid of ``shape``, ``(batch, *shape)`` float32 in [0, 1]."""
        *steps, rows, cols = (
            _tents(self.shift[part, axis], self.knots[axis], shape[axis]) for axis in range(len(shape))
        )  # (batch, cell, knot)
        bits = self.bits[part]
        if steps:
            bits = torch.einsum("ntk,nkrc->ntrc", steps[0], bits)
            rows, cols = rows[:, None], cols[:, None]
        return (rows @ bits @ cols.transpose(-1, -2)).clamp(0.0, 1.0)


def _tents(shift: torch.Tensor, knots: int, cells: int) -> torch.Tensor:
    """Weight of every knot at every cell centre, linear interpolation, ``(batch, cell, knots + 2)``."""
    position = (torch.arange(cells, dtype=torch.float32) + 0.5) / cells * knots + shift[:, None]
    return (1 - (position[..., None] - torch.arange(knots + 2)).abs()).clamp(min=0.0)
