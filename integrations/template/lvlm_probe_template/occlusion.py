"""Occlusion: slide a patch of the baseline picture over the image and see how much the words depend on it.

Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, section 4.2, with the baseline
picture in place of a grey square and the log-likelihood of the selected tokens as the score::

    drop(patch) = Σ_{t ∈ K} log P(a_t | I) − Σ_{t ∈ K} log P(a_t | I with the patch replaced)
    value(cell) = mean of drop over the patches that cover the cell, negative values cut, scaled to a maximum of 1
"""

from __future__ import annotations

import torch

from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers import Outcome, Problem, register

__all__ = ["cover_masks", "mean_over_patches", "occlusion"]


@register("occlusion")
@torch.no_grad()
def occlusion(problem: Problem, *, size: int | tuple[int, int] = 12, patch: int = 4, batch: int = 32) -> Outcome:
    """Importance of a place = how much less likely the selected tokens are when a patch there is replaced.

    Args:
        problem: the answer's tokens and the picture.
        size: cells of the grid that patches move on, ``n`` or ``(row, col)``.
        patch: edge of the square patch, cells. Patches start up to ``patch − 1`` cells outside the picture, so that
            border cells are covered as often as the others.
        batch: masks per call of the replay; memory is its own concern.
    """
    if patch < 1 or batch < 1:
        raise ExplainError(f"occlusion: patch and batch are at least 1; got patch={patch}, batch={batch}")
    rows, cols = problem.grid(size)
    masks = cover_masks(rows, cols, patch)
    original = problem.score(problem.replay.log_probs(None)).cpu()
    scores: list[torch.Tensor] = []
    for start in range(0, len(masks), batch):
        part = masks[start : start + batch]
        scores.append(problem.score(problem.replay.log_probs(part, image=problem.image)).cpu())
        problem.advance(min(start + batch, len(masks)), len(masks))
    mean_drop = mean_over_patches(original - torch.cat(scores), masks)
    gain = mean_drop.clamp(min=0.0)
    used = {"size": [rows, cols], "patch": patch, "batch": batch}
    if float(gain.max()) == 0.0:
        return Outcome(None, used, reason="covering a patch anywhere makes the selected words no less likely")
    return Outcome(gain / gain.max(), used)


def cover_masks(rows: int, cols: int, patch: int) -> torch.Tensor:
    """All masks that replace one square patch, ``(batch, row, col)``: 0 in the patch, 1 elsewhere.

    ``batch = (rows + patch − 1) · (cols + patch − 1)``; every cell is covered by ``patch²`` of them.
    """
    top = torch.arange(1 - patch, rows)[:, None]
    left = torch.arange(1 - patch, cols)[:, None]
    in_rows = (torch.arange(rows) >= top) & (torch.arange(rows) < top + patch)  # (row of the patch, row)
    in_cols = (torch.arange(cols) >= left) & (torch.arange(cols) < left + patch)
    covered = in_rows[:, None, :, None] & in_cols[None, :, None, :]
    return 1.0 - covered.reshape(-1, rows, cols).float()


def mean_over_patches(drops: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Mean of ``drops`` ``(batch,)`` over the masks that cover a cell, ``(row, col)``."""
    covered = 1.0 - masks
    return torch.einsum("brc,b->rc", covered, drops) / covered.sum(dim=0)
