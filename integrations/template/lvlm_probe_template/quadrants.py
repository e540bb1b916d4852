"""Quadrants: cover a quarter of the picture, see how much the words lose, and look closer where they lose most.

The picture is one box. Level by level, the boxes that mattered most are cut into four, and each of the four is replaced
by the baseline picture once::

    drop(box) = Σ_{t ∈ K} log P(a_t | I) − Σ_{t ∈ K} log P(a_t | I with the box replaced)
    value(cell) = mean over levels of drop(box of that level around the cell) / largest drop of that level

negative drops cut. Boxes that were not looked into have no drop below their level. So few passes find a small object:
1 + 4 + (levels − 1) · 4 · keep.
"""

from __future__ import annotations

import torch

from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers import Outcome, Problem, register

__all__ = ["quadrants", "quarters"]

Box = tuple[int, int, int]
"""Row and column of the top left cell, and the edge, cells."""


@register("quadrants")
@torch.no_grad()
def quadrants(problem: Problem, *, levels: int = 4, keep: int = 4) -> Outcome:
    """Importance of a place = how much less likely the selected tokens are when ever smaller boxes there are replaced.

    Args:
        problem: the answer's tokens and the picture.
        levels: how often boxes are cut into four; the heatmap has 2^levels × 2^levels cells.
        keep: boxes of a level that are looked into at the next one.
    """
    if not 1 <= levels <= 8 or keep < 1:
        raise ExplainError(f"quadrants: levels is 1 to 8 and keep at least 1; got levels={levels}, keep={keep}")
    edge = 2**levels
    used = {"levels": levels, "keep": keep}
    original = problem.score(problem.replay.log_probs(None)).cpu()
    values = torch.zeros(edge, edge)
    boxes: list[Box] = [(0, 0, edge)]
    for level in range(levels):
        boxes = [quarter for box in boxes for quarter in quarters(box)]
        masks = torch.ones(len(boxes), edge, edge)
        for mask, (row, col, side) in zip(masks, boxes, strict=True):
            mask[row : row + side, col : col + side] = 0.0
        scores = problem.score(problem.replay.log_probs(masks.to(problem.replay.device), image=problem.image))
        drops = (original - scores.cpu()).clamp(min=0.0)
        if float(drops.max()) > 0.0:
            for drop, (row, col, side) in zip((drops / drops.max()).tolist(), boxes, strict=True):
                values[row : row + side, col : col + side] += drop / levels
        boxes = [boxes[k] for k in drops.argsort(descending=True, stable=True)[:keep].tolist()]
        problem.advance(level + 1, levels)
    if float(values.max()) == 0.0:
        return Outcome(None, used, reason="covering any quarter of the picture makes the selected words no less likely")
    return Outcome(values.clamp(0.0, 1.0), used)


def quarters(box: Box) -> list[Box]:
    """The four boxes of half the edge that a box is made of."""
    row, col, side = box
    half = side // 2
    return [(row + down, col + right, half) for down in (0, half) for right in (0, half)]
