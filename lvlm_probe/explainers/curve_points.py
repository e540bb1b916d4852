"""Points of deletion and insertion curves: which cells are gone at each, what the answer scores there, a quick gain.

``metrics.deletion_insertion`` draws whole curves of these; a method that goes on until its map is good enough asks for
a few of the same points (``quick_areas``). Scores are not handed from one call to the next: the same mask beside other
ones, or alone, rounds otherwise, and a call would give what depends on those before it.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch

from lvlm_probe.explainers.scores import Followed, followed, too_narrow
from lvlm_probe.replaying import Replay
from lvlm_probe.replaying.baselines import baseline_identity

if TYPE_CHECKING:
    from lvlm_probe.explainers.registry import Problem
    from lvlm_probe.replaying.own_scores import OwnScore
    from lvlm_probe.replaying.protocol import ReplayLike
    from lvlm_probe.trace.clips import Clip

STEPS = 50
"""Points on a curve besides the origin."""

MIN_GAIN = 0.35
"""Insertion − deletion: random heatmaps have 0 in the mean, but single ones scatter widely where an answer hangs on one
small object; on 100 held-out scenes of the embedded model 95 % of them stay below 0.32. ``evaluate(chance=n)``
measures it for the answer at hand, and then the heatmap has to beat them all as well."""

_QUICK_POINTS = (1, 3, 8, 20)
"""Of ``STEPS``: shares 2 %, 6 %, 16 % and 40 %, close where curves of good maps are steep."""

QUICK_PASSES = 2 * len(_QUICK_POINTS)
"""Forward passes of ``quick_areas``."""

Known = MutableMapping[tuple[tuple[int, ...], bytes], torch.Tensor]


class MaskScores:
    """Log-probabilities of the tokens ``indices`` under masks of zeros and ones; each different mask is scored once.

    Args:
        replay: the answer on its model, over the baseline that judges.
        indices: the tokens; of a view that is ``scored`` its last column.
        image: number of the image that is masked, or the clip.
        mode: ``"exact"`` sends real composites through the real processor.
        known: what has been scored, which is added to; by default nothing.
    """

    def __init__(
        self,
        replay: ReplayLike,
        indices: Sequence[int],
        *,
        image: int | Clip,
        mode: Literal["fast", "exact"],
        known: Known | None = None,
    ) -> None:
        self._replay, self.indices, self._image, self._mode = replay, list(indices), image, mode
        own: OwnScore | None = getattr(replay, "own", None)
        self.own = own if own is not None and self.indices == [len(replay.tokens)] else None
        self._known: Known = {} if known is None else known

    def __len__(self) -> int:
        """Different masks scored so far."""
        return len(self._known)

    def __call__(self, masks: torch.Tensor) -> torch.Tensor:
        """``(batch, row, col)`` → ``(batch, token)`` float64 on the CPU, nats."""
        keys = _keys(masks)
        new = {key: place for place, key in reversed(list(enumerate(keys))) if key not in self._known}
        if new:
            places = sorted(new.values())
            with torch.no_grad():
                log_probs = self._replay.log_probs(
                    masks[places].to(self._replay.device), image=self._image, mode=self._mode, steps=self.indices
                )
            self._known.update(
                zip((keys[place] for place in places), log_probs[:, self.indices].cpu().double(), strict=True)
            )
        return torch.stack([self._known[key] for key in keys])

    def of_these(self, masks: torch.Tensor) -> Known:
        """What has been scored of these masks, as ``known=`` of another."""
        return {key: self._known[key] for key in _keys(masks) if key in self._known}


def _keys(masks: torch.Tensor) -> list[tuple[tuple[int, ...], bytes]]:
    shape = tuple(masks.shape[1:])
    return [(shape, np.packbits(mask.numpy() > 0.5).tobytes()) for mask in masks]


def facts_of(replay: ReplayLike) -> dict[Any, Any]:
    """What is known of this answer on its model, shared by all views of a replay; nothing, where its passes are looked
    into and may be changed, or where the baseline's description does not tell one image of the user's from another."""
    alone = isinstance(replay, Replay) and not replay.inside and baseline_identity(replay.baseline) != ("image", None)
    return cast(Replay, replay).kept.facts if alone else {}


def rank(values: np.ndarray, seen: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Flat indices of cells, most important first; ties in random order; unseen cells last. ``(cell,)``."""
    flat = np.where(seen, values, -np.inf).reshape(-1)
    return np.lexsort((generator.random(flat.size), -flat))


def sample_counts(cells: int, steps: int) -> np.ndarray:
    """How many cells are removed at each point: at most ``steps`` + 1 even counts, 0 and ``cells`` included."""
    return np.unique(np.rint(np.linspace(0, cells, steps + 1)).astype(int))


def curve_masks(order: np.ndarray, counts: np.ndarray, shape: tuple[int, ...], *, insert: bool) -> torch.Tensor:
    """Masks along a curve ``(point, *shape)``: the first ``count`` cells are 0 in deletion, 1 in insertion."""
    position = np.empty(order.size, dtype=np.int64)
    position[order] = np.arange(order.size)
    ends = torch.from_numpy(np.asarray(counts)).reshape(-1, *[1] * len(shape))
    touched = torch.from_numpy(position.reshape(shape))[None] < ends
    return (touched if insert else ~touched).float()


def normalise(curve: np.ndarray, *, original: float, baseline: float, score: Followed = "prob") -> np.ndarray:
    """(curve − baseline) / (original − baseline); NaN where that divides by next to nothing (``too_narrow``)."""
    if too_narrow(original, baseline, score=score):
        return np.full(np.shape(curve), np.nan)
    return (np.asarray(curve, dtype=np.float64) - baseline) / (original - baseline)


def curve_ends(original: float, baseline: float, *, ordered: bool) -> dict[str, float]:
    """Scores that are 1 and 0 of a normalised curve, as ``original=`` and ``baseline=`` of ``normalise``; ``ordered``:
    the higher and the lower of the two, whichever is the baseline."""
    if ordered and original < baseline:
        original, baseline = baseline, original
    return {"original": original, "baseline": baseline}


def area(fractions: np.ndarray, curve: np.ndarray) -> float:
    """Area under a curve by the trapezoidal rule on its own x-axis."""
    widths = np.diff(fractions)
    return float((widths * (np.asarray(curve)[1:] + np.asarray(curve)[:-1]) / 2).sum())


def quick_areas(problem: Problem, values: torch.Tensor, seen: torch.Tensor) -> tuple[float, float]:
    """Deletion and insertion of a map by ``QUICK_PASSES`` of the points that ``evaluate`` scores, over the same ends.

    The areas are those of straight lines between them: 0.02 from the whole curves' gain in the mean over 105 held-out
    scenes, 0.28 at worst, where curves turn. NaN where there is nothing to normalise by.

    Args:
        problem: what is explained.
        values: the map, ``(row, col)``, or ``(t, row, col)`` of a clip, on the CPU.
        seen: its cells that the model sees, bool.
    """
    replay, indices, own = problem.measuring, list(problem.columns), problem.selection.score
    kind: Followed = "prob" if own is None else own.followed
    cells = int(seen.sum())
    even = sample_counts(cells, STEPS)
    counts = np.unique(even[[min(point, len(even) - 1) for point in _QUICK_POINTS]])
    counts = counts[(counts > 0) & (counts < cells)]
    ends = torch.stack([replay.original_log_probs, replay.baseline_log_probs]).double()[:, indices]
    original, baseline = followed(ends, kind, own).tolist()
    by = curve_ends(original, baseline, ordered=own is not None)
    order = rank(values.numpy(), seen.numpy(), np.random.default_rng(0))
    masks = torch.cat([curve_masks(order, counts, tuple(values.shape), insert=insert) for insert in (False, True)])
    scores = MaskScores(replay, indices, image=problem.target, mode="fast")
    met = followed(scores(masks) if len(masks) else torch.zeros(0, 1), kind, own)
    lost, given = met.numpy().reshape(2, -1)
    fractions = np.array([0, *(counts / cells), 1.0])
    low, high = (
        normalise(np.array([start, *between, end]), **by, score=kind)
        for start, between, end in ((original, lost, baseline), (baseline, given, original))
    )
    return area(fractions, low), area(fractions, high)
