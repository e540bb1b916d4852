"""``evaluate`` scores a heatmap by deletion and insertion and says in words whether to believe it.

**Held-out baseline.** A heatmap that was optimised against a baseline image and is scored against the same one is
scored on what it was trained on. ``evaluate(..., baseline="mean")`` judges it against another image than the
explanation saw. Unless told otherwise, a heatmap is judged over the baseline that its provenance names.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from lvlm_probe import drawing
from lvlm_probe._moved import grouped
from lvlm_probe.cards import card, equal, text_html
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.controls import center_values
from lvlm_probe.explainers.curve_points import STEPS, Known, facts_of
from lvlm_probe.explainers.explaining import frame_of, scored_by
from lvlm_probe.explainers.scores import CurveScore, Followed, check_rules, even_masks, whole_rule
from lvlm_probe.files import record_of
from lvlm_probe.heatmap import resample
from lvlm_probe.images import CompositePath
from lvlm_probe.metrics.deletion_insertion import (
    CurveRule,
    Curves,
    CurveSettings,
    MaskScores,
    area,
    curves,
    normalise,
    one_of,
    release_area,
)
from lvlm_probe.metrics.deletion_insertion import synergy as synergy_curve
from lvlm_probe.metrics.similarity import grid_of
from lvlm_probe.metrics.verdict import (
    BASELINE_PROBABILITY,
    MAX_REPLAY_DIFFERENCE,
    Measured,
    Verdict,
    judge,
    level_with_center,
    out_of_range,
)
from lvlm_probe.progress import ProgressChoice, show_progress
from lvlm_probe.replaying import Replay
from lvlm_probe.replaying.baselines import BaselineLike, baseline_identity
from lvlm_probe.replaying.isolation import taking_turns
from lvlm_probe.replaying.protocol import ReplayLike
from lvlm_probe.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lvlm_probe.selection import TokenSelection
    from lvlm_probe.trace.clips import Clip

BaselineChoice = BaselineLike | tuple[str, Mapping[str, Any]]
AnyReplay = TypeVar("AnyReplay", bound=ReplayLike)


class Explained(Protocol):
    """What is scored: a ``Heatmap``, or that of a clip."""

    @property
    def values(self) -> np.ndarray | None: ...
    @property
    def seen(self) -> np.ndarray | None: ...
    @property
    def selection(self) -> TokenSelection: ...
    @property
    def image_index(self) -> int: ...
    @property
    def target(self) -> int | Clip: ...
    @property
    def method(self) -> str: ...
    @property
    def params(self) -> Mapping[str, Any]: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...
    @property
    def reason(self) -> str | None: ...


@dataclass(frozen=True, repr=False)
class Score:
    """Deletion and insertion of one heatmap, with their curves and a verdict.

    Attributes:
        deletion, insertion: Areas under the normalised curves; NaN when there is nothing to score.
        fractions: Share of cells replaced at each point, ``(point,)``.
        deletion_curve, insertion_curve: Normalised: 1 the whole image, 0 the baseline.
        deletion_raw, insertion_raw: Before normalisation: mean probability, or mean log-likelihood in nats.
        tie_share: Share of seen cells whose value another has too.
        original, baseline: Raw score of the whole image and of the baseline image.
        baseline_check: Kind of the baseline that judged, mean probability the tokens keep on it, the limit, whether it
            passed, and whether the explanation was made against this very baseline (``None``: nobody can tell).
        verdict: Whether to trust the heatmap, with reasons.
        random_gains: Insertion − deletion of random heatmaps, when ``chance`` asked for them.
        center_gain: Insertion − deletion of the blob in the middle (method ``center``) on the same grid, by as few
            points as tell it from the heatmap's; NaN where it was not taken.
        synergy: Area under F_syn along deletion, when ``synergy`` asked for it, in the unit of the raw curves: how much
            of what image and question give together goes with the cells that the heatmap puts first. ``params`` has
            the curve, whose last point, the same for all heatmaps, is all that there is.
        params: How it was scored (score, auc, steps, grid, mode, seed, tie_orders, tie_spread, held_out); with adaptive
            sampling also the images it took, the error bound of both areas and how far their curves turn (see
            ``deletion_insertion``).
        provenance: Trace id, method and tokens of the heatmap.
    """

    __eq__ = equal

    deletion: float
    insertion: float
    fractions: tuple[float, ...]
    deletion_curve: tuple[float, ...]
    insertion_curve: tuple[float, ...]
    deletion_raw: tuple[float, ...]
    insertion_raw: tuple[float, ...]
    tie_share: float
    original: float
    baseline: float
    baseline_check: Mapping[str, Any]
    verdict: Verdict
    random_gains: tuple[float, ...] = ()
    center_gain: float = math.nan
    synergy: float = math.nan
    params: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        if not math.isfinite(self.gain):
            return f"<Score undefined: {self.verdict}>"
        return f"<Score deletion {self.deletion:.3f}, insertion {self.insertion:.3f}: {self.verdict}>"

    def _repr_html_(self) -> str:
        facts = [str(self.verdict), *self.remarks]
        if self.reason is not None:
            return card("No score", facts=facts)
        numbers = f"deletion {self.deletion:.3f} · insertion {self.insertion:.3f} · gain {self.gain:.3f}"
        return card(drawing.mark_of(self).verdict, text_html(f": {numbers}"), self._small_curves(), facts=facts)

    def _small_curves(self) -> str:
        """Both curves as an SVG of its own, without scripts and styles."""
        both = [*self.deletion_curve, *self.insertion_curve, 0.0, 1.0]
        low, high = min(both), max(both)
        lines = [
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="'
            + " ".join(
                f"{240 * x:.1f},{120 * (high - y) / (high - low):.1f}"
                for x, y in zip(self.fractions, curve, strict=True)
            )
            + f'"><title>{name}</title></polyline>'
            for name, curve, colour in (
                ("deletion", self.deletion_curve, "#d55e00"),
                ("insertion", self.insertion_curve, "#0072b2"),
            )
        ]
        return (
            '<br><svg viewBox="-2 -2 244 124" width="244" height="124" role="img" '
            f'aria-label="deletion (orange) and insertion (blue)">{"".join(lines)}</svg>'
        )

    @property
    def gain(self) -> float:
        """Insertion − deletion: 0 for a random heatmap, at best close to 1."""
        return self.insertion - self.deletion

    @property
    def reason(self) -> str | None:
        """Why there is no score, where deletion and insertion are NaN."""
        if math.isfinite(self.gain):
            return None
        return str(self.params.get("undefined") or "; ".join(self.verdict.reasons) or "the score is not a number")

    @property
    def remarks(self) -> tuple[str, ...]:
        """A sentence for each number that needs one: areas outside [0, 1], a gain level with that of the middle."""
        areas = (("deletion", self.deletion), ("insertion", self.insertion))
        own = self.params.get("own_score")
        told = [out_of_range(name, area, own) for name, area in areas]
        told.append(level_with_center(self.gain, self.center_gain))
        told.append(None if math.isnan(self.synergy) else self._together())
        return tuple(one for one in told if one is not None)

    def _together(self) -> str:
        curve = self.params["synergy"]["curve"]
        unit = "nats" if self.params.get("score") == "log" else "probability"
        unit = repr(self.params["own_score"]) if self.params.get("followed") == "own" else unit
        return (
            f"image and question together give {curve[-1]:.3f} of {unit} that neither gives alone; along deletion by "
            f"the map {self.synergy:.3f} of it is gone on average (F_syn)"
        )

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        width: str | float = "column",
        font_size: float = 8.0,
        dpi: float = 300,
    ) -> Figure:
        """Draw deletion and insertion with their areas and the verdict, for print.

        Args:
            path: where to save it, a PDF, SVG, PNG or TIFF; replaces what is there; by default nowhere.
            width: ``"column"`` (3.5 inches), ``"text"`` (7.2 inches) or inches.
            font_size: points.
            dpi: pixels per inch, of PNG and TIFF.

        Returns:
            The matplotlib figure, which belongs to no window.

        Raises:
            ExplainError: there are no curves, and the message says why; no such width; another file ending.
        """
        if self.reason is not None:
            raise ExplainError(f"there are no curves to draw: {self.reason}")
        drawn = drawing.curve_figure(self, width=width, font_size=font_size)
        if path is not None:
            drawing.save_figure(drawn, path, provenance=self.to_dict(), dpi=dpi)
        return drawn

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, NaN as ``None``; ``Score.from_dict`` is the inverse."""
        return record_of(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Score:
        """Rebuilds what ``to_dict`` wrote. Raises ``ExplainError`` for anything else."""
        try:
            known = {item.name: record[item.name] for item in dataclasses.fields(cls) if item.name not in _LATER}
            known |= {name: _number(record.get(name)) for name in _LATER}
            for name in ("deletion", "insertion", "tie_share", "original", "baseline"):
                known[name] = _number(known[name])
            for name in _CURVES:
                known[name] = tuple(_number(value) for value in known[name])
            if len({len(known[name]) for name in ("fractions", "deletion_curve", "insertion_curve")}) > 1:
                raise ValueError("its curves are not of one length")
            known["verdict"] = Verdict.from_dict(known["verdict"])
            known["params"] = dict(known["params"])
            return cls(**known)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ExplainError(f"not a stored score: {error!r}") from error


_CENTER_TOLERANCE = 0.04
"""Error bound of the areas of the blob in the middle: its curves are gentle, and straight lines between points that
leave so much open are within 0.03 of all of them. It is compared with a larger margin (``verdict.CENTER_MARGIN``)."""

_CENTER_PASSES = 40
"""Images that may take: some 16 to 22 for gentle curves, some more where a small thing stands right in the middle."""

_LATER = ("center_gain", "synergy")  # scores of before have none
_CURVES = ("fractions", "deletion_curve", "insertion_curve", "deletion_raw", "insertion_raw", "random_gains")


@grouped("curve", CurveRule)
@taking_turns
def evaluate(
    heat: Explained,
    replay: ReplayLike,
    *,
    baseline: BaselineChoice | None = None,
    steps: int | None = None,
    score: CurveScore = "prob",
    mode: Literal["fast", "exact"] = "fast",
    grid: int | Sequence[int] | None = None,
    chance: int = 0,
    center: bool = True,
    synergy: bool | str = False,
    curve: CurveRule = CurveRule(),
    shared: dict[Any, Known] | None = None,
    progress: ProgressChoice = None,
) -> Score:
    """Scores a heatmap by deletion and insertion on the tokens it explains, as ``deletion_insertion`` defines them.

    Args:
        heat: The heatmap, of an image or of a clip. One without values gives a score of NaN whose verdict says why.
        replay: The same answer on its model.
        baseline: What masked-out pixels are replaced by, instead of the baseline that the heatmap was made over, as its
            provenance names it (the replay's own, where it names none): ``"blur"``, ``"blank"``, ``"noise"``,
            ``"mean"``, an image (one per image), a kind with its parameters, ``("blur", {"strength": 0.6})``, or a
            description such as ``replay.baseline``.
        steps: Points on each curve besides the origin, 50 by default.
        score: ``"prob"``, mean probability of the tokens (as the paper's numbers), or ``"log"``, mean log-likelihood. A
            heatmap of a contrast is scored by the contrast, ``"log"``, or P(said) / (P(said) + P(not said)),
            ``"prob"``; one of a score of your own by that score, whichever is asked for.
        mode: ``"exact"`` sends real composites through the real processor.
        grid: Rank cells of this grid, ``n`` or ``(rows, columns)``, instead of the heatmap's own; use one grid when
            methods of different resolution are compared.
        chance: Also score this many random heatmaps on the same grid; the verdict then demands to beat them.
        center: Also score the blob in the middle of the image (method ``center``) on the same grid, once for all
            heatmaps of the same words, in some 16 to 30 passes; the verdict objects to a heatmap that is worse.
        synergy: Also score what image and question give together (F_syn), in 11 passes more in which the question is
            not read (``Replay.without``): a text, or ``True`` for the recorded question. Where the question alone gives
            the words, deletion and insertion say little of the two.
        curve: How curves are sampled and areas taken, ``probe.metrics.CurveRule(sampling="adaptive", tolerance=0.01)``:
            the rule of the areas, the order of tied cells, the seed, and whether every point is scored; with adaptive
            sampling ``params`` has the error bound.
        shared: A dictionary that is handed to several calls about one answer while its model stays as it is: what two
            heatmaps are both asked for, the ends of the curves and the random heatmaps of ``chance``, is scored once.
        progress: Called with (done, total) images of the heatmap's own curves; by default a bar where a person waits,
            ``False`` for none.

    Raises:
        ExplainError: The heatmap is of another answer or image, a parameter is out of range, or the replay is one on a
            server that gives no log-probabilities.
        ImageError: There is no such baseline; or the heatmap was made over an image of the user's, which it does not
            hold, and the replay has another one: give it as ``baseline``, or evaluate on ``replay.over(image)``.
    """
    _check(curve, score, steps, chance)
    one_of("mode", mode, "fast", "exact")
    settings = CurveSettings(**vars(curve), score=score, steps=steps or STEPS)
    check_answer(heat, replay)
    own = heat.selection.score
    if own is not None:
        kind: Followed = "own" if own.followed == "own" else score
        settings = dataclasses.replace(settings, score=kind, ordered=True)
    if heat.values is None:
        return _nothing(heat, replay)
    _check_offers(replay)
    explained = heat.provenance.get("baseline")
    replay = over_baseline(replay, (explained or replay.baseline) if baseline is None else baseline)
    replay = scored_by(replay, heat.selection)
    mode = "exact" if isinstance(replay.path, CompositePath) else mode  # real images: there is no other way
    values, seen = _on_grid(heat, replay, grid)
    inner, steps_of = 2 * (settings.steps - 1), heat.selection.columns
    images = 2 + inner * (curve.tie_orders or 1) * (1 + chance) + center * min(inner, _CENTER_PASSES)
    replay.announce("evaluate", lambda: images, steps_of)
    view = _unread(replay, synergy)
    known = _known(shared, replay, heat, mode)
    scores = MaskScores(replay, steps_of, image=heat.target, mode=mode, known=known)
    with replay.shortcuts.caching():
        with show_progress(progress, "deletion and insertion") as advance:
            decided = heat.selection.decided if own is None else None
            raw = curves(values, seen, scores, settings, decided=decided, progress=advance)
        areas = _areas(raw, settings)
        gains = _random_gains(values.shape, seen, scores, dataclasses.replace(settings, tie_orders=1), chance)
        middle = _center_gain(seen, scores, settings, replay, heat.target, mode) if center else math.nan
        together = None
        if view is not None:
            unread = MaskScores(view, steps_of, image=heat.target, mode=mode)
            together = synergy_curve(values, seen, scores, unread, settings)
    return Score(
        **_numbers(raw, areas),
        baseline_check={
            "kind": str(replay.baseline.get("kind")),
            # A score of its own need not be small on the baseline: a contrast is what the model would say unseeing.
            **({} if own is not None else _hidden(raw)),
            "same_as_explained": _same_baseline(explained, replay.baseline),
        },
        verdict=_verdict(replay, heat, raw, areas, (gains, middle), mode),
        random_gains=gains,
        center_gain=middle,
        synergy=math.nan if together is None else area(*together),
        params={
            "score": score,
            "grid": list(values.shape),
            "mode": mode,
            "held_out": baseline is not None,
            "center": center,
            **_rule_of(curve, raw),
            **({} if own is None else {"own_score": own.name, "followed": settings.score}),
            **({} if together is None else {"synergy": _points(together)}),
        },
        provenance=_of(heat, replay),
    )


def _rule_of(curve: CurveRule, raw: Curves) -> dict[str, Any]:
    """How curves were sampled and areas taken, as a ``Score`` holds it."""
    return {
        "auc": curve.auc,
        "steps": len(raw.fractions) - 1,
        "seed": curve.seed,
        "tie_orders": raw.tie_orders,
        "tie_spread": raw.tie_spread if math.isfinite(raw.tie_spread) else None,
        **({} if curve.sampling == "full" else _sampled(raw, curve.tolerance)),
        **({} if raw.undefined is None else {"undefined": raw.undefined}),
    }


def _numbers(raw: Curves, areas: _Areas) -> dict[str, Any]:
    """Curves and areas, as a ``Score`` holds them."""
    return {
        "deletion": areas.deletion,
        "insertion": areas.insertion,
        "fractions": tuple(raw.fractions.tolist()),
        "deletion_curve": tuple(areas.deletion_curve.tolist()),
        "insertion_curve": tuple(areas.insertion_curve.tolist()),
        "deletion_raw": tuple(raw.deletion.tolist()),
        "insertion_raw": tuple(raw.insertion.tolist()),
        "tie_share": raw.tie_share,
        "original": float(raw.deletion[0]),
        "baseline": float(raw.deletion[-1]),
    }


def _hidden(raw: Curves) -> dict[str, Any]:
    """Whether the baseline image hides the words."""
    return {
        "mean_probability": raw.baseline_probability,
        "original_probability": raw.original_probability,
        "limit": BASELINE_PROBABILITY,
        "passed": bool(raw.baseline_probability < BASELINE_PROBABILITY),
    }


def _points(together: tuple[np.ndarray, np.ndarray]) -> dict[str, list[float]]:
    return {"fractions": together[0].tolist(), "curve": together[1].tolist()}


def _unread(replay: ReplayLike, synergy: bool | str) -> Replay | None:
    """The view that does not read the question, where it is asked for."""
    if synergy is False:
        return None
    if not isinstance(replay, Replay):
        raise ExplainError(
            "synergy takes passes inside the model that do not read the question: replay on the model itself"
        )
    return replay.without(None if synergy is True else synergy)


def check_answer(heat: Explained, replay: ReplayLike) -> None:
    """Refuse a heatmap of another answer, image or video than the replay's, or a trace. Raises ``ExplainError``."""
    if isinstance(replay, Trace):
        raise ExplainError(
            "a heatmap is scored by running the model, and this is a trace: evaluate(heat, probe.replay(trace, model, "
            "processor))"
        )
    if not hasattr(heat, "selection"):
        raise ExplainError(f"a heatmap is what explain() returns; got a {type(heat).__name__}")
    if heat.selection.tokens != tuple(replay.tokens) or heat.image_index >= replay.n_images:
        raise ExplainError(
            f"this heatmap explains another answer ({''.join(heat.selection.tokens)[:60]!r}) than the replay's "
            f"({''.join(replay.tokens)[:60]!r})"
        )
    if not isinstance(heat.target, int) and frame_of(replay, heat.target.first) != heat.target:
        raise ExplainError("the heatmap is of a video that this prompt does not have")


def _check_offers(replay: ReplayLike) -> None:
    if "passes" not in replay.offers:
        raise ExplainError(
            f"a score takes log-probabilities, and {replay.origin['device']} is asked on a road that gives "
            f"{' and '.join(sorted(replay.offers)) or 'nothing'} in the place of log-probabilities: leave the road out "
            "(road=, --road), or replay on the model itself"
        )


def _check(curve: CurveRule, score: CurveScore, steps: int | None, chance: int) -> None:
    """Raises ``ExplainError`` where settings do not go together."""
    if not isinstance(curve, CurveRule):
        raise ExplainError(f"curve is a probe.metrics.CurveRule(…); got {curve!r}")
    if curve.release and steps is not None:
        raise ExplainError("auc='release' has its own steps (chunks of a fiftieth of the cells): leave steps out")
    if curve.release and curve.sampling != "full":
        raise ExplainError("auc='release' is defined on all of its points: leave sampling='full'")
    one_of("score", score, "prob", "log")
    check_rules("evaluate", steps=whole_rule(steps, or_none=True), chance=whole_rule(chance, 0))


def _known(
    shared: dict[Any, Known] | None, replay: ReplayLike, heat: Explained, mode: Literal["fast", "exact"]
) -> Known:
    """What has been scored of these tokens over the same baseline, by the calls that ``shared`` was handed to."""
    judge = baseline_identity(replay.baseline)
    if shared is None or judge == ("image", None):  # a description that does not tell one image from another
        return {}
    key = (replay.trace_id, judge, heat.selection.columns, heat.selection.score, heat.target, mode)
    return shared.setdefault(key, {})


def _random_gains(
    shape: tuple[int, ...],
    seen: np.ndarray,
    scores: MaskScores,
    settings: CurveSettings,
    chance: int,
) -> tuple[float, ...]:
    """Insertion − deletion of ``chance`` random heatmaps on the grid."""
    generator = np.random.default_rng([settings.seed, 1])
    gains = []
    for _ in range(chance):
        cells = generator.random(shape, dtype=np.float32)
        areas = _areas(curves(cells, seen, scores, settings), settings)
        gains.append(areas.insertion - areas.deletion)
    return tuple(gains)


def _center_gain(
    seen: np.ndarray,
    scores: MaskScores,
    settings: CurveSettings,
    replay: ReplayLike,
    image: int | Clip,
    mode: Literal["fast", "exact"],
) -> float:
    """Insertion − deletion of the blob in the middle on the grid of ``seen``; once for all views of a replay, and so
    by passes of its own: of what ``scores`` has met, the two ends alone, which every call asks for first."""
    settings = dataclasses.replace(settings, tie_orders=1, sampling="adaptive", tolerance=_CENTER_TOLERANCE)
    facts = facts_of(replay)
    key = ("center", baseline_identity(replay.baseline), tuple(scores.indices), image, mode, seen.shape, settings)
    if key not in facts:
        values = center_values(seen.shape).numpy()
        ends = scores.of_these(even_masks([1.0, 0.0], seen.shape))
        alone = MaskScores(replay, scores.indices, image=image, mode=mode, known=ends)
        areas = _areas(curves(values, seen, alone, settings), settings)
        facts[key] = areas.insertion - areas.deletion
    return float(facts[key])


def _verdict(
    replay: ReplayLike,
    heat: Explained,
    raw: Curves,
    areas: _Areas,
    floors: tuple[tuple[float, ...], float],
    mode: Literal["fast", "exact"],
) -> Verdict:
    report = replay.path.report
    difference, tolerated = _replay_difference(replay, heat.selection.indices)
    own = heat.selection.score
    measured = Measured(
        deletion=areas.deletion,
        insertion=areas.insertion,
        original_probability=raw.original_probability,
        baseline_probability=raw.baseline_probability,
        tie_share=raw.tie_share,
        tie_spread=raw.tie_spread,
        random_gains=floors[0],
        center_gain=floors[1],
        undefined=raw.undefined,
        own_score=None if own is None else _raised(own.name, raw),
        replay_difference=difference,
        replay_tolerance=tolerated,
        parity_error=report.mean_error,
        parity_mode=mode,
        deterministic=report.deterministic,
        way_on=_way_on(heat),
    )
    return judge(measured)


def _raised(name: str, raw: Curves) -> tuple[str, float, float, float]:
    """A score's name, its value on the image and on the baseline, and the highest that parts of the image give it."""
    return name, float(raw.deletion[0]), float(raw.deletion[-1]), float(np.nanmax(raw.insertion))


def _way_on(heat: Explained) -> str:
    """What may give a better heatmap of the same words; nothing, where nobody can tell."""
    preset = heat.params.get("preset")
    if heat.method != "igos++" or preset is None:
        return ""
    if preset == "thorough":
        return "no more passes of igos++ are likely to help; another method may (occlusion, rise, greedy)"
    more = "a larger budget=…, or " if heat.params.get("budget") else ""
    return f"explain again with {more}preset='thorough' (--param preset=thorough)"


def _of(heat: Explained, replay: ReplayLike) -> dict[str, Any]:
    return {
        "trace_id": replay.trace_id,
        "method": heat.method,
        "tokens": list(heat.selection.indices),
        "text": heat.selection.text,
        **({} if heat.selection.score is None else {"score": heat.selection.score.name}),
        **({} if "server" not in replay.origin else {"server": replay.origin["server"]}),
    }


def _sampled(raw: Curves, tolerance: float) -> dict[str, Any]:
    names = ("deletion", "insertion")
    return {
        "sampling": "adaptive",
        "tolerance": tolerance,
        "images": raw.images,
        "error_bound": dict(zip(names, raw.error_bound, strict=True)),
        "turns": dict(zip(names, raw.turns, strict=True)),
    }


class _Areas(NamedTuple):
    """Normalised curves and the areas under them; NaN where they are undefined."""

    deletion: float
    insertion: float
    deletion_curve: np.ndarray
    insertion_curve: np.ndarray


def _areas(raw: Curves, settings: CurveSettings) -> _Areas:
    if raw.undefined is not None:
        nothing = np.full(len(raw.fractions), np.nan)
        return _Areas(math.nan, math.nan, nothing, nothing)
    ends = settings.ends(float(raw.deletion[0]), float(raw.deletion[-1]))
    low = normalise(raw.deletion, **ends, score=settings.score)
    high = normalise(raw.insertion, **ends, score=settings.score)
    if settings.release:
        areas = release_area(raw.counts, low, insert=False), release_area(raw.counts, high, insert=True)
    else:
        areas = area(raw.fractions, low), area(raw.fractions, high)
    return _Areas(*areas, low, high)


def _on_grid(heat: Explained, replay: ReplayLike, grid: int | Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    assert heat.values is not None
    assert heat.seen is not None
    if grid is None:
        return heat.values, heat.seen
    if heat.values.ndim == 3:
        raise ExplainError("a heatmap of a clip is ranked on its own cells: leave grid out, and explain with size=…")
    pair = grid_of(grid)
    return resample(heat.values, pair), replay.seen(heat.image_index, pair).cpu().numpy()


def over_baseline(replay: AnyReplay, baseline: BaselineChoice) -> AnyReplay:
    """A replay over a baseline given as for ``evaluate``.

    Raises:
        ExplainError: A kind does not take its parameters.
        ImageError: There is no such baseline.
    """
    params: dict[str, Any] = {}
    kind: Any = baseline
    if isinstance(baseline, tuple) and len(baseline) == 2 and isinstance(baseline[1], Mapping):
        kind, params = baseline[0], dict(baseline[1])
    try:
        return replay.over(kind, **params)
    except TypeError as error:
        raise ExplainError(
            f"baseline is a kind, an image, one for each image, or a kind with its parameters such as "
            f"('blur', {{'strength': 0.6}}); got {baseline!r} ({error})"
        ) from error


def _same_baseline(explained: Mapping[str, Any] | None, scored: Mapping[str, Any]) -> bool | None:
    """Whether two descriptions name the same baseline image; ``None`` when they do not say."""
    if not explained:
        return None
    first, second = baseline_identity(explained), baseline_identity(scored)
    # A description of an older file does not tell one image of the user's from another.
    return None if first == second == ("image", None) else first == second


def _replay_difference(replay: ReplayLike, indices: Sequence[int]) -> tuple[float | None, float]:
    """By how much the replay misses the recording at its worst token, nats, and how much may be rounding there."""
    recorded = getattr(replay.trace, "log_probs", None)
    if recorded is None or not len(indices):
        return None, MAX_REPLAY_DIFFERENCE
    chosen = list(indices)
    replayed = replay.original_log_probs.detach().float().cpu().numpy()[chosen]
    missed = np.abs(np.asarray(recorded, dtype=np.float32)[chosen] - replayed)
    allowed = np.maximum(MAX_REPLAY_DIFFERENCE, replay.rounding.detach().cpu().double().numpy()[chosen])
    worst = int(np.argmax(np.where(np.isnan(missed), np.inf, missed / allowed)))
    return float(missed[worst]), float(allowed[worst])


def _nothing(heat: Explained, replay: ReplayLike) -> Score:
    none, verdict = math.nan, judge(empty=heat.reason)
    return Score(none, none, (), (), (), (), (), none, none, none, {}, verdict, provenance=_of(heat, replay))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
