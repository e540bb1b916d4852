"""Occlusion (Zeiler and Fergus, 2014): slide a patch of the baseline image over the image, see what the words lose.

With the baseline image in place of a grey square, and a patch that covers cell c to the degree w_n(c) in [0, 1]::

    drop_n  = score(I) − score(I with patch n replaced)
    value(c) = Σ_n w_n(c) · drop_n / Σ_n w_n(c)

the mean drop over the patches that cover the cell, negative values cut. Patches are squares; with soft edges w falls
off linearly over ``soft`` cells around the border, so that the patch adds no edge of its own to the image. A patch
must cover all that carries an answer to show it: two objects that each suffice hide one another.

**Passes.** One for the whole image and one per patch: ⌈(rows + patch − 1) / stride⌉ times the same of the columns.
Patches reach over the border, so that border cells are covered as often as the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lvlm_probe.explainers.registry import Cost, Outcome, Problem, batches, register
from lvlm_probe.explainers.scores import (
    NO_SIGHT,
    ScoreKind,
    check_rules,
    require_finite,
    scaled,
    score_of,
    score_rule,
    whole_rule,
)


def _cost(problem: Problem, params: Mapping[str, Any]) -> Cost:
    shape, batch = problem.shape(params["size"]), params["batch"]
    places = math.prod(-(-(edge + params["patch"] - 1) // params["stride"]) for edge in shape[-2:])
    if problem.clip is not None:
        places *= shape[0] + _lasting(params["lasting"], shape[0]) - 1
    masks = 1 + places
    return Cost("forward", masks, 0, batches(masks, batch), numbers=3 * masks * math.prod(shape), grids=(shape,))


@register("occlusion", cost=_cost, clips=True)
@torch.no_grad()
def occlusion(
    problem: Problem,
    *,
    size: int | tuple[int, int] | None = None,
    patch: int = 3,
    stride: int = 1,
    soft: float = 0.0,
    score: ScoreKind = "prob",
    batch: int = 64,
    lasting: int | None = None,
) -> Outcome:
    """Importance of a place = how much the selected tokens lose when patches over it are replaced.

    Args:
        problem: The answer's tokens and the image.
        size: Cells of the grid that patches move on: ``n``, ``(rows, columns)``, or ``None`` for about 256 as square
            as the image allows.
        patch: Edge of a patch, cells.
        stride: Step between patches, cells; at most ``patch``, so that every cell is covered.
        soft: Width of the ramp around a patch's border, cells; 0 is a hard edge.
        score: ``"prob"`` or ``"geometric"`` mean probability of the tokens, or ``"log"`` likelihood.
        batch: Masks per call of the replay, between two reports of progress.
        lasting: Of a clip, steps in time for which a patch lasts, by default half of them: what is shown again and
            again answers the question as long as it can be seen once.

    Raises:
        ExplainError: A parameter out of range, or scores that are not finite.
    """
    check_rules(
        "occlusion",
        patch=whole_rule(patch),
        stride=(stride, isinstance(stride, int) and 1 <= stride <= patch, f"between 1 and patch={patch}"),
        soft=(soft, 0 <= soft <= patch, f"between 0 and patch={patch}"),
        score=score_rule(score),
        batch=whole_rule(batch),
    )
    shape = problem.shape(size)
    params = {"size": list(shape), "patch": patch, "stride": stride, "soft": soft, "score": score, "batch": batch}
    seen = problem.seen(shape)
    if not seen.any():
        return Outcome(None, params, reason=NO_SIGHT)
    down, right = (covers(edge, patch, stride, soft) for edge in shape[-2:])
    cover = (down[:, None, :, None] * right[None, :, None, :]).reshape(-1, *shape[-2:])
    if problem.clip is not None:
        params["lasting"] = steps = _lasting(lasting, shape[0])
        check_rules("occlusion", lasting=whole_rule(steps))
        when = covers(shape[0], steps)
        cover = (when[:, None, :, None, None] * cover[None, :, None]).reshape(-1, *shape)
    masks = torch.cat([torch.ones(1, *shape, dtype=torch.float32), 1 - cover])
    scores = []
    problem.advance(0, len(masks))
    for start in range(0, len(masks), batch):
        part = masks[start : start + batch].to(problem.replay.device)
        log_probs = problem.replay.log_probs(part, image=problem.target, steps=problem.columns)
        scores.append(score_of(problem, log_probs, score).cpu().double())
        problem.advance(start + len(part), len(masks))
    f = torch.cat(scores)
    require_finite("occlusion", problem, f)
    drops = f[0] - f[1:]
    weights = cover.double()
    value = torch.einsum("n...,n->...", weights, drops) / weights.sum(dim=0)
    heat = scaled(value, seen)
    if heat is None:
        return Outcome(None, params, reason="covering a patch anywhere makes the selected words no less likely")
    return Outcome(heat, params, diagnostics={"unit": float(value[seen].max())})


def _lasting(wanted: int | None, steps: int) -> int:
    return max(1, steps // 2) if wanted is None else wanted


def covers(cells: int, patch: int, stride: int = 1, soft: float = 0.0) -> torch.Tensor:
    """How far each patch covers each cell along one axis, ``(patch, cell)`` in [0, 1]; every cell is covered by some.

    Patches start ``stride`` apart, the first and the last equally far over the border, up to half a cell.
    """
    number = math.ceil((cells + patch - 1) / stride)
    reach = (number - 1) * stride + patch  # from the first patch's start to the last one's end
    first = (cells - reach) // 2
    centre = first + torch.arange(number, dtype=torch.float32) * stride + patch / 2
    inside = (
        patch / 2 - (torch.arange(cells, dtype=torch.float32) + 0.5 - centre[:, None]).abs()
    )  # depth of a cell's centre in the patch
    if soft == 0:
        return (inside > 0).float()
    return (inside / soft + 0.5).clamp(0.0, 1.0)
