"""Stability of several heatmaps of one image, completeness of attributions, ties.

Stability says how far chance (seeds) or wording (paraphrased prompts) decides a map. It says nothing about truth: a
method that draws the image's edges is perfectly stable.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lvlm_probe.cards import equal
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.scores import too_narrow
from lvlm_probe.files import json_ready, record_of
from lvlm_probe.heatmap import HeatGrid
from lvlm_probe.kinds import is_whole, naming_arguments, plain_number
from lvlm_probe.metrics.deletion_insertion import tie_share as _tie_share
from lvlm_probe.metrics.similarity import compare_maps, on_grid

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay
    from lvlm_probe.trace.clips import Clip


@dataclass(frozen=True, repr=False)
class Stability:
    """How alike several heatmaps of one image are, over all pairs.

    Attributes:
        n: Number of heatmaps.
        rank_correlation, top_iou: Means over pairs of Spearman's ρ over cells and of the overlap of the highest fifths.
        lowest_rank_correlation: That of the pair that agrees least.
        deviation: Root of the mean variance of a cell over the heatmaps (n − 1), each scaled to a maximum of 1.
        missing: How many further ones had no values.
        heatmaps: The heatmaps compared; not part of ``to_dict``.
    """

    __eq__ = equal

    n: int
    rank_correlation: float
    lowest_rank_correlation: float
    top_iou: float
    deviation: float
    missing: int = 0
    heatmaps: tuple[HeatGrid, ...] = field(default=(), compare=False)

    def __repr__(self) -> str:
        ranks = "rank correlation undefined, as a map is constant"
        if math.isfinite(self.rank_correlation):
            ranks = f"rank correlation {self.rank_correlation:.3f} (lowest {self.lowest_rank_correlation:.3f})"
        return f"<Stability of {self.n} heatmaps: {ranks}, top overlap {self.top_iou:.3f}>"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, NaN as ``None``."""
        return record_of(self, "heatmaps")


@naming_arguments
def stability(heats: Sequence[HeatGrid]) -> Stability:
    """Compares heatmaps of one image pair by pair, on the grid of the first; needs scipy.

    Args:
        heats: Heatmaps of one image, made with different seeds, prompts, or whatever is to make no difference.

    Raises:
        ExplainError: Fewer than two have values, or they are of images of different size.
        ProbeError: scipy is missing.
    """
    there = [heat for heat in heats if heat.values is not None]
    if len(there) < 2:
        raise ExplainError(f"stability compares at least two heatmaps; {len(there)} of {len(heats)} have values")
    pairs = [compare_maps(first, second) for first, second in itertools.combinations(there, 2)]
    rhos = [pair.rank_correlation for pair in pairs]
    scaled = []
    for heat in there:
        values = on_grid(np.asarray(heat.values), np.asarray(there[0].values).shape)
        scaled.append(values / max(float(values.max()), 1e-12))
    return Stability(
        n=len(there),
        rank_correlation=float(np.mean(rhos)),
        lowest_rank_correlation=float(np.min(rhos)),
        top_iou=float(np.mean([pair.top_iou for pair in pairs])),
        deviation=float(np.sqrt(np.var(scaled, axis=0, ddof=1).mean())),
        missing=len(heats) - len(there),
        heatmaps=tuple(there),
    )


@dataclass(frozen=True)
class Completeness:
    """Whether attributions add up to what they are said to explain (Sundararajan et al., 2017, axiom 1).

    Attributes:
        total: Sum of the attributions.
        difference: f(x) − f(x'), nats: image minus baseline.
    """

    total: float
    difference: float

    @property
    def error(self) -> float:
        """|total − difference| / |difference|; 0 is complete. NaN where ``reason`` says why."""
        return abs(self.total - self.difference) / abs(self.difference) if self.reason is None else math.nan

    @property
    def reason(self) -> str | None:
        """Why there is no error: image and baseline score alike, so it would divide by next to nothing."""
        return too_narrow(self.difference, 0.0, score="log")

    def to_dict(self) -> dict[str, float | None]:
        """JSON-ready, NaN as ``None``."""
        return {**record_of(self), "error": json_ready(self.error)}


@naming_arguments
def completeness(
    attributions: np.ndarray | torch.Tensor, replay: Replay, indices: Sequence[int], *, image: int | Clip = 0
) -> Completeness:
    """Compares the sum of signed attributions with the change of f they explain; two forward passes.

    A claim of methods such as integrated gradients, and only of their raw attributions: a heatmap is scaled to [0, 1].

    Args:
        attributions: Signed, any shape, in nats.
        replay: The answer on its model, over the baseline that the attributions refer to.
        indices: The explained tokens; f is the sum of their log-probabilities (paper, Eq. 7).
        image: The image, or the clip, that is taken away; others stay.

    Raises:
        ExplainError: Attributions are not finite, or the answer has no such tokens.
        ReplayError: The prompt has no such image.
    """
    given = torch.as_tensor(np.array(attributions) if isinstance(attributions, np.ndarray) else attributions)
    if not (given.numel() and bool(given.isfinite().all())):
        raise ExplainError(f"attributions are finite numbers, one or more; got shape {tuple(given.shape)}")
    ends = torch.tensor([1.0, 0.0], dtype=torch.float32, device=replay.device)
    ends = ends.reshape(2, *[1] * (2 if isinstance(image, int) else 3))
    with torch.no_grad():
        log_probs = replay.log_probs(ends, image=image)
    wanted, last = [plain_number(index) for index in indices], log_probs.shape[1] - 1
    if not wanted or not all(is_whole(index) and 0 <= int(index) <= last for index in wanted):
        raise ExplainError(f"indices are tokens 0 to {last} of the answer; got {list(indices)}")
    scores = log_probs[:, wanted].cpu().double().sum(dim=1)
    total = float(given.detach().cpu().double().sum())
    return Completeness(total, float(scores[0] - scores[1]))


@naming_arguments
def tie_share(heat: HeatGrid) -> float:
    """Share of the cells the model sees whose value another such cell has too: their order is not the heatmap's.

    Raises ``ExplainError`` when there are no values.
    """
    values = heat.known_values()
    assert heat.seen is not None
    return _tie_share(values, heat.seen)
