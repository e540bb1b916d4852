"""Deletion and insertion (Petsiuk et al., 2018): do the regions a heatmap calls important carry the answer?

Cells of the heatmap are ranked by value, highest first. *Deletion* replaces them in that order by the baseline picture
and scores the answer on the way; *insertion* starts from the baseline picture and brings them back. Both curves are
normalised by their end points (Jiang et al., 2024b; the paper, 4.3): 1 is the whole picture and 0 the baseline::

    s(x) = (score(x) − score(baseline)) / (score(original) − score(baseline))          not clamped

The score is the area under the curve: low is good for deletion, high for insertion, ½ for both is chance.

**The x-axis** is the share of the cells that the model *sees*. Cells out of its sight (margins of a centre crop) cannot
change the score; counted in, they would make both areas look better the more a processor crops. They are ranked last.

**Area.** ``"trapezoid"``: trapezoidal rule over all points, both ends included. ``"release"``: for comparison with
numbers published with the paper, its rule with its two flaws: right end points only, so that a perfectly linear curve
gives 0.494 for deletion and 0.510 for insertion on 32 × 32 cells, and deletion counts the last chunk of cells as if it
scored 1. Its x-axis is the share of *all* cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from lvlm_probe.errors import ExplainError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lvlm_probe.player import Replay

__all__ = [
    "Curves",
    "area",
    "curve_masks",
    "curves",
    "normalise",
    "rank",
    "release_area",
    "release_counts",
    "sample_counts",
]

ScoreKind = Literal["prob", "log"]

TIES_THAT_MATTER = 0.05
TIE_ORDERS = 3
_MASK_NUMBERS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Curves:
    """Scores along both curves before normalisation.

    Attributes:
        fractions: Share of ranked cells removed (brought back) at each point, ``(point,)``, 0 to 1.
        deletion, insertion: Scores, ``(point,)``, mean over tie orders.
        counts: Number of cells at each point.
        tie_share: Share of seen cells that have the value of another seen cell.
        tie_orders: How many random orders of tied cells were averaged.
        original_probability, baseline_probability: Mean probability of the decided tokens at the two ends.
    """

    fractions: np.ndarray
    deletion: np.ndarray
    insertion: np.ndarray
    counts: np.ndarray
    tie_share: float
    tie_orders: int
    original_probability: float
    baseline_probability: float


def rank(values: np.ndarray, seen: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Flat indices of cells, most important first; ties in random order; unseen cells last. ``(cell,)``."""
    flat = np.where(seen, values, -np.inf).reshape(-1)
    return np.lexsort((generator.random(flat.size), -flat))


def tie_share(values: np.ndarray, seen: np.ndarray) -> float:
    """Share of seen cells whose value another seen cell has as well."""
    inside = values[seen]
    if inside.size == 0:
        return 0.0
    _, counts = np.unique(inside, return_counts=True)
    return float(counts[counts > 1].sum() / inside.size)


def sample_counts(cells: int, steps: int) -> np.ndarray:
    """How many cells are removed at each point: at most ``steps`` + 1 even counts, 0 and ``cells`` included."""
    return np.unique(np.rint(np.linspace(0, cells, steps + 1)).astype(int))


def release_counts(cells: int) -> np.ndarray:
    """The released recipe's counts: chunks of ``cells // 50`` and a remainder; 0, which it leaves out, is included."""
    chunk = max(1, cells // 50)
    return np.append(np.arange(0, cells, chunk), cells)


def curve_masks(order: np.ndarray, counts: np.ndarray, shape: tuple[int, int], *, insert: bool) -> torch.Tensor:
    """Masks along a curve ``(point, row, col)``: the first ``count`` cells are 0 in deletion, 1 in insertion."""
    position = np.empty(order.size, dtype=np.int64)
    position[order] = np.arange(order.size)
    touched = torch.from_numpy(position.reshape(shape))[None] < torch.from_numpy(np.asarray(counts))[:, None, None]
    return (touched if insert else ~touched).float()


def curves(
    values: np.ndarray,
    seen: np.ndarray,
    replay: Replay,
    indices: Sequence[int],
    *,
    decided: Sequence[int] | None = None,
    image: int = 0,
    score: ScoreKind = "prob",
    steps: int = 50,
    counts: np.ndarray | None = None,
    mode: Literal["fast", "exact"] = "fast",
    seed: int = 0,
    tie_orders: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Curves:
    """Scores the tokens ``indices`` along the deletion and the insertion curve of ``values``.

    Args:
        values, seen: Heatmap ``(row, col)`` and which of its cells reach the model.
        decided: Those of ``indices`` whose probability at the two ends is reported; by default all.
        score: ``"prob"``, mean probability of the tokens, or ``"log"``, their mean log-likelihood in nats.
        steps: Points besides the origin.
        counts: Cells at each point instead of ``steps``, over all cells.
        tie_orders: Random orders of tied cells to average; by default 3 where more than 5 % of cells are tied, else 1.
        progress: Called with (done, total) pictures.
    """
    shape = (values.shape[0], values.shape[1])
    ranked = int(seen.sum())
    if ranked == 0:
        raise ExplainError("deletion and insertion need cells that the model sees; it sees none of this picture")
    over_all = counts is not None
    points = sample_counts(ranked, steps) if counts is None else counts
    shared = tie_share(values, seen)
    orders = tie_orders if tie_orders is not None else (TIE_ORDERS if shared > TIES_THAT_MATTER else 1)
    generator = np.random.default_rng(seed)
    chosen = list(indices)

    def run(masks: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return replay.log_probs(masks.to(replay.device), image=image, mode=mode)[:, chosen].double().cpu()

    ends = run(torch.stack([torch.ones(shape), torch.zeros(shape)]))
    total, done = 2 + orders * 2 * (len(points) - 2), 2
    at_once = max(1, _MASK_NUMBERS_AT_ONCE // values.size)
    inner = points[1:-1]
    sums = np.zeros((2, len(points)))
    # Rows are deletion and insertion: one starts from the whole picture and ends at the baseline, the other back.
    sums[:, 0], sums[:, -1] = orders * _score(ends, score), orders * _score(ends.flip(0), score)
    for _ in range(orders):
        order = rank(values, seen, generator)
        for row, insert in enumerate((False, True)):
            for start in range(0, len(inner), at_once):
                part = slice(start, start + at_once)
                masks = curve_masks(order, inner[part], shape, insert=insert)
                sums[row, 1:-1][part] += _score(run(masks), score)
                done += len(masks)
                if progress is not None:
                    progress(done, total)
    probability = ends[:, [chosen.index(step) for step in (decided or chosen)]].exp().mean(dim=1)
    return Curves(
        fractions=points / (values.size if over_all else ranked),
        deletion=sums[0] / orders,
        insertion=sums[1] / orders,
        counts=points,
        tie_share=shared,
        tie_orders=orders,
        original_probability=float(probability[0]),
        baseline_probability=float(probability[1]),
    )


def normalise(curve: np.ndarray, *, original: float, baseline: float) -> np.ndarray:
    """(curve − baseline) / (original − baseline); NaN where the ends are equal: there is nothing to divide by."""
    span = original - baseline
    if not np.isfinite(span) or abs(span) < 1e-9:
        return np.full(np.shape(curve), np.nan)
    return (np.asarray(curve, dtype=np.float64) - baseline) / span


def area(fractions: np.ndarray, curve: np.ndarray) -> float:
    """Area under a curve by the trapezoidal rule on its own x-axis."""
    widths = np.diff(fractions)
    return float((widths * (np.asarray(curve)[1:] + np.asarray(curve)[:-1]) / 2).sum())


def release_area(counts: np.ndarray, curve: np.ndarray, *, insert: bool) -> float:
    """The released recipe's area: right end points; deletion's last chunk counts as 1 (a slip of precedence)."""
    chunks, scores = np.diff(counts), np.array(curve[1:], dtype=np.float64)
    if not insert:
        scores[-1] = 1.0
    return float((chunks * scores).sum() / counts[-1])


def _score(log_probs: torch.Tensor, kind: ScoreKind) -> np.ndarray:
    scores: np.ndarray = (log_probs.exp() if kind == "prob" else log_probs).mean(dim=1).numpy()
    return scores
