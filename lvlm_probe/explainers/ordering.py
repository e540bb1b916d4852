"""The order of a heatmap, refined on what a heatmap is used for.

Whoever uses a heatmap takes its highest cells first, until enough of the picture is covered. A mask's objective does
not
see that order: along r · M all cells come and go together. Here H is a height per cell, S_q its soft level set over the
highest share q of the cells, S_q = σ((H − H_q) / T), and gradient steps are taken on H for::

    min_H  mean_q  P(Φ(I, Ĩ, 1 − S_q)) − P(Φ(I, Ĩ, S_q))

P is the mean probability of the selected tokens, Φ(I, Ĩ, M) = I ⊙ M + Ĩ ⊙ (1 − M) (paper, Eq. 3). Deletion and
insertion are sums of just such terms, so they say less about a map refined like this than pointing, average precision,
knockout and another baseline do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lvlm_probe.explainers.registry import Problem
from lvlm_probe.explainers.scaling import score_of

__all__ = ["level_sets", "refine_order"]


def level_sets(height: torch.Tensor, seen: torch.Tensor, levels: Sequence[float], softness: float) -> torch.Tensor:
    """Soft level sets S_q of a height, ``(level, row, col)`` in [0, 1]; differentiable in it, its limits held fixed.

    Args:
        height: H, ``(row, col)``.
        seen: Cells whose quantiles count, bool.
        levels: Shares q of them.
        softness: T.
    """
    limits = torch.quantile(height.detach()[seen], 1 - torch.tensor(list(levels)))
    return torch.sigmoid((height[None] - limits[:, None, None]) / softness)


def refine_order(
    problem: Problem,
    heat: torch.Tensor,
    seen: torch.Tensor,
    *,
    iterations: int,
    levels: Sequence[float],
    softness: float,
    rate: float,
    momentum: float,
    progress: Callable[[int], None],
) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """A heatmap's own values, handed out in an order refined on its level sets.

    Args:
        problem: What is explained.
        heat: ``(row, col)`` in [0, 1], on the CPU.
        seen: Cells that the model sees; the others stay as they are.
        iterations: Gradient steps, each ``2 · len(levels)`` forward and backward passes.
        levels, softness: Of the level sets.
        rate: Length of the first step's largest change of H, whose range is 1 at first.
        momentum: Of Nesterov's e = i / (i + momentum).
        progress: Called with the number of steps done.

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
    sign = torch.cat([torch.ones(len(levels)), -torch.ones(len(levels))])
    for iteration in range(iterations):
        leaf = height.clone().requires_grad_(True)
        with torch.enable_grad():
            shown = level_sets(leaf, seen, levels, softness)
            masks = torch.cat([1 - shown, shown])
            scores, slopes = problem.replay.score_and_grad(
                masks.detach().to(problem.replay.device),
                lambda log_probs: score_of(problem, log_probs, "prob"),
                image=problem.image,
            )
            pull = (sign[:, None, None] * slopes.to(masks) * masks).sum() / len(levels)
            (gradient,) = torch.autograd.grad(pull, leaf)
        if iteration == 0:
            largest = float(gradient[seen].abs().max())
            if largest == 0:
                break
            step = rate / largest
        point = height - step * gradient
        height = torch.where(seen, point + iteration / (iteration + momentum) * (point - previous), height)
        previous = point
        taken, given = scores.double().cpu().reshape(2, -1).mean(dim=1).tolist()
        records.append({"refinement": float(iteration), "probability_taken": taken, "probability_shown": given})
        progress(iteration + 1)
    ordered = torch.empty_like(values)
    ordered[height[seen].argsort(stable=True)] = values.sort().values
    refined = heat.clone()
    refined[seen] = ordered
    return refined, records
