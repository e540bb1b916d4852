"""The result of a sanity check: what was changed, how alike the heatmap stayed, and what that says of the heatmap.

A verdict is ``passes``, ``fails`` or ``cannot say``, with a sentence that holds the numbers and the limit they are held
against. The limits are constants below, each with its reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lvlm_probe.cards import equal
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers import resolve
from lvlm_probe.extras import require
from lvlm_probe.files import json_ready, record_of
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.metrics.scoring import check_answer, over_baseline
from lvlm_probe.metrics.similarity import Similarity, compare_maps
from lvlm_probe.sanity.stability import Stability
from lvlm_probe.video import ClipHeatmap
from lvlm_probe.video.explaining import explain_by

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay
    from lvlm_probe.selection import TokenSelection

AnyHeatmap = Heatmap | ClipHeatmap
Check = Literal["weights", "answers", "seeds", "prompts"]
Verdict = Literal["passes", "fails", "cannot say"]

SIMILAR = 0.5
"""|ρ| above which two heatmaps count as the same: two unrelated maps with some 16 independent regions have ρ of
0 ± 0.26, so 0.5 is about two standard deviations."""

SAME = 0.95
"""|ρ| above which a heatmap of other words is the heatmap of these: the evidence against "blue" lies where that for
"red" does, so a map of other words may rightly resemble the first, but not in the order of nearly all its cells."""

AGREEING = 1 / 3
"""Overlap (IoU) of the highest fifths of two heatmaps, mean over pairs, above which they show the same regions: they
share half of those cells. Unrelated maps have 0.11. The rank correlation is no measure here: it is ruled by the order
of the many cells that hardly matter, which is chance in any method that samples."""

LEAST_CELLS = 16
"""Cells that the model sees below which chance alone brings ρ over ``SIMILAR`` more often than one time in twenty."""


@dataclass(frozen=True)
class SanityStep:
    """One heatmap under a change.

    Attributes:
        name: what was changed: a block of the model, the words put in, a seed, a question.
        modules: paths of all modules whose weights are random at this step.
        weights: how many numbers are random.
        similarity: likeness to the original heatmap; ``None`` where there was no heatmap any more.
        reason: why there was none.
    """

    name: str
    modules: tuple[str, ...] = ()
    weights: int = 0
    similarity: Similarity | None = None
    reason: str | None = None

    @property
    def shown(self) -> str:
        """The rank correlation as text, or why there is none."""
        if self.similarity is None:
            return "no heatmap"
        rho = self.similarity.rank_correlation
        return "a constant heatmap" if math.isnan(rho) else f"{rho:.2f}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return record_of(self)


@dataclass(frozen=True, repr=False)
class SanityCheck:
    """How a heatmap changes when something else than the image is changed, and what that says of it.

    Attributes:
        check: ``"weights"``, ``"answers"``, ``"seeds"`` or ``"prompts"``.
        verdict: ``"passes"``, ``"fails"`` or ``"cannot say"``.
        reason: the verdict's sentence, with the numbers.
        threshold: what the verdict hangs on: of ``weights`` and ``answers`` the |rank correlation| that must not be
            exceeded, of ``seeds`` and ``prompts`` the overlap of the highest fifths that must be.
        steps: in the order they were made; the last one of cascading weights has every block random.
        params: how it was done: kind, how and seed of random weights, draws, seeds.
        heatmap: the one that was checked.
        heatmaps: those of the steps, to be looked at; not part of ``to_dict``.
        stability: of ``seeds`` and ``prompts``: likeness over all pairs of heatmaps, the checked one among them.
    """

    __eq__ = equal

    check: Check
    verdict: Verdict
    reason: str
    threshold: float
    steps: tuple[SanityStep, ...]
    params: Mapping[str, Any]
    heatmap: AnyHeatmap
    heatmaps: tuple[AnyHeatmap, ...] = field(default=(), compare=False)
    stability: Stability | None = None

    def __repr__(self) -> str:
        return f"<SanityCheck {self.heatmap.method}, {self}>"

    def __str__(self) -> str:
        return f"{self.check}: {self.verdict}: {self.reason}"

    @property
    def rank_correlations(self) -> tuple[float, ...]:
        """Spearman's ρ with the original heatmap at each step, ``(step,)``; NaN where there was no heatmap."""
        return tuple(math.nan if step.similarity is None else step.similarity.rank_correlation for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: everything but the heatmaps."""
        heat = self.heatmap
        return {
            **record_of(self, "heatmap", "heatmaps"),
            "method": heat.method,
            "method_params": json_ready(heat.params),
            "trace_id": heat.provenance.get("trace_id"),
            "tokens": list(heat.selection.indices),
            "text": heat.selection.text,
        }

    def attached(self, heat: AnyHeatmap | None = None) -> AnyHeatmap:
        """The heatmap with this check in its provenance, ``["sanity"][check]``, where ``write`` keeps it and ``report``
        shows it; ``heat`` for one that has other checks attached already."""
        heat = self.heatmap if heat is None else heat
        provenance = dict(heat.provenance)
        provenance["sanity"] = {**provenance.get("sanity", {}), self.check: self.to_dict()}
        return dataclasses.replace(heat, provenance=provenance)


def opened(replay: Replay, heat: AnyHeatmap) -> Replay:
    """The replay over the baseline that the heatmap was made over.

    Raises:
        ExplainError: the heatmap has no values, is of another answer, image or video, or its method is not registered.
        ImageError: it was made over an image of the user's that the replay does not have.
        ProbeError: scipy is missing.
    """
    require("scipy.stats", extra="stats", purpose="a sanity check")  # now, not after the first explanation
    if heat.values is None:
        raise ExplainError(f"there is no heatmap to check: {heat.reason}")
    check_answer(heat, replay)
    resolve(heat.method)
    return over_baseline(replay, heat.provenance.get("baseline") or replay.baseline)


def again(
    replay: Replay, heat: AnyHeatmap, *, selection: TokenSelection | None = None, seed: int | None = None
) -> AnyHeatmap:
    """The heatmap made once more on another replay, as it was made: its method, parameters, tokens and image.

    Where the method cannot be run any more the heatmap has no values, and a reason: that is a result here.
    """
    chosen = heat.selection if selection is None else selection
    params = dict(heat.params)
    if params.get("source") == "recorded":
        params["source"] = "replay"  # what was recorded is of the true model and answer
    own: Any = heat.provenance.get("seed", 0)
    try:
        made = explain_by(
            replay,
            target=heat.target,
            method=heat.method,
            tokens=chosen,
            seed=int(own if seed is None else seed),
            strengthen=False,
            progress=False,
            search_dtype=heat.search_dtype,
            **params,
        )
    except ExplainError as error:  # a random model's scores need not be finite
        reason = f"the method could not be run any more: {error}"
        return dataclasses.replace(
            heat,
            values=None,
            seen=None,
            selection=chosen,
            params={},
            provenance={},
            history=(),
            reason=reason,
            trace=None,
        )
    return dataclasses.replace(made, trace=heat.trace)


def step_of(name: str, original: AnyHeatmap, heat: AnyHeatmap, **details: Any) -> SanityStep:
    """The step of a heatmap under a change, compared with the original."""
    if heat.values is None:
        return SanityStep(name, reason=heat.reason, **details)
    return SanityStep(name, similarity=compare_maps(original, heat), **details)


def cannot_say(heat: AnyHeatmap, steps: Sequence[SanityStep]) -> str | None:
    """Why nothing can be told from these steps, as a sentence; ``None`` where something can."""
    assert heat.values is not None
    assert heat.seen is not None
    cells = np.asarray(heat.values)[heat.seen]
    if len(cells) < LEAST_CELLS:
        return (
            f"the heatmap has {len(cells)} cells that the model sees, and rank correlations of fewer than "
            f"{LEAST_CELLS} come out anyhow: explain with a larger size"
        )
    if cells.min() == cells.max():
        return "the heatmap has the same value everywhere, so there is no order to compare"
    if all(one.similarity is None for one in steps):
        return f"there was no second heatmap to compare with: {steps[0].reason if steps else 'nothing was changed'}"
    return None
