"""The order of a heatmap, refined on what a heatmap is used for.

Whoever uses a heatmap takes its highest cells first, until enough of the image is covered. A mask's objective does not
see that order: along r · M all cells come and go together. Here H is a height per cell, S_q its soft level set over the
highest share q of the cells, S_q = σ((H − H_q) / T), and gradient steps are taken on H for::

    min_H  mean_q  P(Φ(I, Ĩ, 1 − S_q)) − P(Φ(I, Ĩ, S_q))

P is the mean probability of the selected tokens, Φ(I, Ĩ, M) = I ⊙ M + Ĩ ⊙ (1 − M) (paper, Eq. 3). Some steps may see
the order on other cells, coarser ones that are drawn anew each time, as means of H over their area: edges of one grid
of cells are a pattern of their own, and an order can be made to suit a network's answer to that pattern. Deletion and
insertion are sums of just such terms, so they say less about a map refined like this than pointing, average precision,
knockout and another baseline do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch.nn import functional

from lvlm_probe.explainers.registry import Problem, Shape
from lvlm_probe.explainers.scores import score_of

Pace = Literal["first", "each", "level"]
"""What sets the length of a step on the order: the gradient of the first step, its own, or that of each level by
itself."""


_FLAT = 1e-4
"""Probability per unit of height: the slope below which a level says nothing of the order."""


def level_sets(height: torch.Tensor, seen: torch.Tensor, levels: Sequence[float], softness: float) -> torch.Tensor:
    """Soft level sets S_q of a height, ``(level, row, col)`` in [0, 1]; differentiable in it, its limits held fixed.

    Args:
        height: H, ``(row, col)``.
        seen: Cells whose quantiles count, bool.
        levels: Shares q of them.
        softness: T.
    """
    limits = torch.quantile(height.detach()[seen], 1 - torch.tensor(list(levels), dtype=torch.float32))
    return torch.sigmoid((height[None] - limits.reshape(-1, *[1] * height.ndim)) / softness)


def draw_levels(
    levels: Sequence[float], *, steps: int, per_step: int, generator: torch.Generator
) -> list[tuple[float, ...]]:
    """Levels of each of some steps, ``per_step`` different ones, drawn so that each comes up as often as any other: the
    levels are shuffled, dealt out, and shuffled again when they run out.
    """
    plan: list[tuple[float, ...]] = []
    deck: list[int] = []
    for _ in range(steps):
        hand: list[int] = []
        while len(hand) < per_step:
            if not deck:
                deck = [
                    place for place in torch.randperm(len(levels), generator=generator).tolist() if place not in hand
                ]
                deck = deck or torch.randperm(len(levels), generator=generator).tolist()
            hand.append(deck.pop())
        plan.append(tuple(levels[place] for place in sorted(hand)))
    return plan


def draw_grids(shape: Shape, *, steps: int, shares: tuple[float, float], generator: torch.Generator) -> list[Shape]:
    """Cells on which each of some steps sees an order of ``shape``: every second step, from the first on, on coarser
    ones, with a share of the rows and one of the columns that are drawn from ``shares``; the others on its own.
    """
    low, high = shares
    grids = [shape] * steps
    for step in range(0, steps, 2):
        rows, columns = (torch.rand(2, generator=generator, dtype=torch.float32) * (high - low) + low).tolist()
        grids[step] = (*shape[:-2], max(1, round(rows * shape[-2])), max(1, round(columns * shape[-1])))
    return grids


def over_cells(height: torch.Tensor, seen: torch.Tensor, grid: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of a height over the coarser cells of a grid, of what is seen alone, and which of them are seen at all;
    differentiable in it."""
    if tuple(height.shape) == tuple(grid):
        return height, seen
    # Every step in time of a clip by itself.
    weights, values = (part.to(height).reshape(-1, 1, *height.shape[-2:]) for part in (seen, height * seen))
    share, summed = (
        functional.adaptive_avg_pool2d(part, (grid[-2], grid[-1])).reshape(grid) for part in (weights, values)
    )
    return torch.where(share > 0, summed / share.clamp(min=torch.finfo(share.dtype).tiny), -1.0), share > 0


def refine_order(
    problem: Problem,
    heat: torch.Tensor,
    seen: torch.Tensor,
    *,
    plan: Sequence[Sequence[float]],
    grids: Sequence[Shape] | None = None,
    softness: float,
    rate: float,
    momentum: float,
    progress: Callable[[int], None],
    pace: Pace = "first",
    decay: bool = False,
) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """A heatmap's own values, handed out in an order refined on its level sets.

    Args:
        problem: What is explained.
        heat: ``(row, col)`` in [0, 1], on the CPU.
        seen: Cells that the model sees; the others stay as they are.
        plan: Levels q of each gradient step, which takes two forward and backward passes per level.
        grids: Cells on which each step sees the order, no finer ones than its own; ``None``: always its own.
        softness: T.
        rate: Length of the first step's largest change of H, whose range is 1 at first.
        momentum: Of Nesterov's e = i / (i + momentum).
        progress: Called with the number of steps done.
        pace: ``"first"``: later steps are as long as their gradient is against the first one's. ``"each"``: the largest
            change is ``rate`` at every step, for steps that see few levels each: gradients of different levels differ
            in size, and the first would set the pace of all. ``"level"``: so it is, and the levels of a step have
            gradients of one size, or the steepest of them would have it alone.
        decay: Steps shorten linearly, step i of n to 1 − i / n: what single levels pull back and forth averages out.

    Returns:
        the heatmap ``(row, col)``, and one record per step: mean probability over the level sets, taken away and shown.
    """
    values = heat[seen]
    # Halfway between value and rank: many cells of a mask have one value, and no level set could end among them.
    rank = values.argsort().argsort().to(values) / max(len(values) - 1, 1)
    height = torch.full_like(heat, -1.0)
    height[seen] = (values / values.max().clamp(min=1e-12) + rank) / 2
    previous, step = height, 0.0
    records: list[dict[str, float]] = []
    for iteration, levels in enumerate(plan):
        sign = torch.tensor([1.0, -1.0], dtype=torch.float32).repeat_interleave(len(levels))
        leaf = height.clone().requires_grad_(True)
        with torch.enable_grad():
            shown = level_sets(*over_cells(leaf, seen, grids[iteration] if grids else leaf.shape), levels, softness)
            masks = torch.cat([1 - shown, shown])
            scores, slopes = problem.replay.score_and_grad(
                masks.detach().to(problem.replay.device),
                lambda log_probs: score_of(problem, log_probs, "prob"),
                image=problem.target,
                steps=problem.columns,
            )
            pulls = (sign.reshape(-1, *[1] * heat.ndim) * slopes.to(masks) * masks).flatten(1).sum(dim=1)
            pulls = pulls.reshape(2, -1).sum(dim=0) / len(levels)
            if pace == "level":
                parts = [torch.autograd.grad(pull, leaf, retain_graph=True)[0] for pull in pulls]
                gradient = torch.stack([part / part[seen].abs().max().clamp(min=_FLAT) for part in parts]).sum(dim=0)
            else:
                (gradient,) = torch.autograd.grad(pulls.sum(), leaf)
        if step == 0 or pace != "first":
            largest = float(gradient[seen].abs().max())
            if largest == 0 and pace == "first":
                break
            step = rate / largest if largest > 0 else 0.0
        point = height - step * (1 - iteration / len(plan) if decay else 1.0) * gradient
        height = torch.where(seen, point + iteration / (iteration + momentum) * (point - previous), height)
        previous = point
        taken, given = scores.cpu().double().reshape(2, -1).mean(dim=1).tolist()
        records.append({"refinement": float(iteration), "probability_taken": taken, "probability_shown": given})
        progress(iteration + 1)
    ordered = torch.empty_like(values)
    ordered[height[seen].argsort(stable=True)] = values.sort().values
    refined = heat.clone()
    refined[seen] = ordered
    return refined, records
