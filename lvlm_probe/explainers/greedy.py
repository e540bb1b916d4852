"""Greedy search over regions (EAGLE, Chen et al., 2025): which few regions suffice for the words, and are missed most.

The image is cut into regions. A set S of them is worth::

    F(S) = λ1 · P(only S shown) + λ2 · (1 − P(all but S shown))

P is the mean probability of the selected tokens; what is not shown is the baseline image. The search starts with
nothing and takes, again and again, the region that raises F most. For a submodular monotone F, the first k regions are
worth at least 1 − 1/e of the best k (Nemhauser et al., 1978); a model's P is neither, so this is a heuristic on models.

**Exact** search tries every region left in every round: about m (m + 1) images for m regions, 1,056 for 32.

**Windowed** search (default) hides every region alone once, and ranks regions by what that takes from F. A round tries
the first ``window`` of the ranking and takes the best; the others fall to where their new gain puts them. When two
rounds together have added less than ``enough`` leaves of the rise of F, one round tries all regions left; when that
happens again, the search ends. It also ends when ``enough`` of the rise is there, and neither the last round nor P's
limit of 1 promises as much more (parts of an image may make the words likelier than the whole). Regions that are left
follow in the order of F with each of them more, which is tried for that where no round tried them all. That is about
3 m images and 2 · ``window`` for each region taken.

**At any time** what has been taken, followed by the ranking, is a map: with ``budget=n`` the search ends before it
sends more than n images, and the map is the best so far. F of the regions taken gives insertion − deletion of that map
at no further pass, over the share of cells that they cover, with a straight line over the rest; the last point of this
curve in the heatmap's diagnostics knows some more points of the rest.

**Heat.** A region's value is the share of F's total rise that was still missing when the region was taken:
1 − (F(before) − F(∅)) / (max F − F(∅)), F taken as the highest so far. It falls from 1 along the order; regions that
were not taken have what was missing at the end. Regions of one value are told apart by rank:
heat = (1 − ε) · value + ε · (m − position) / m, ε = 0.001, so no two regions tie.

**Clips** are cut in time first, into even stretches, and each of those in space: by a grid, or by superpixels of all
its frames together, which follow what moves.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from lvlm_probe.errors import ExplainError, ImageError
from lvlm_probe.explainers.curve_points import area, curve_ends, normalise
from lvlm_probe.explainers.registry import Cost, Outcome, Problem, register
from lvlm_probe.explainers.scores import NO_SIGHT, check_rules, require_finite, score_of, whole_rule

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from lvlm_probe.explainers.scores import Followed

Search = Literal["windowed", "exact"]
Segments = Literal["slic", "grid"]

_RANK_SHARE = 1e-3
_PATIENCE = 2
"""Rounds that together have to add something, for another to follow."""
_REST = (0.15, 0.5)
"""Shares of the regions not taken at which the finished map is scored."""
_LONG_SIDE = 224
"""Cells of the long side of a map of superpixels: enough for their borders, and 64 masks of it are 13 MB."""
_CLIP_SIDE = 112
"""... of a clip, with its 16 steps in time 51 MB."""
_REGIONS, _CLIP_REGIONS = 32, 64
"""Regions by default: of an image, and of a clip, whose stretches have 16 each. With eight, which are half as many
passes, maps of drawn clips have less gain and leave more of their heat beside the object (docs/video.md)."""
_STRETCHES = 4
"""Parts of a clip's time by default."""


def _cost(problem: Problem, params: Mapping[str, Any]) -> Cost:
    regions, batch = _wanted(problem, params["regions"]), params["batch"]
    parts = 1 if problem.clip is None else _parts(problem, params["stretches"])
    count = regions if isinstance(regions, int) else regions[0] * regions[1] * parts
    if params["segments"] == "slic":
        width, height = _small(problem)
        shape = problem.shape((height, width))
    else:
        shape = problem.shape(None, cells=max(1, count // parts))
    if params["search"] == "exact" or params["window"] >= count:
        passes, least = count * (count + 1), None
    else:
        passes, least = 3 * count + 2 * (1 + len(_REST)) + 2 * params["window"] * count, (count + 2, 0)
    passes = min(passes, params["budget"] or passes)
    most = min(batch, max(2, count))  # each region alone, or all but one; first none and all
    numbers = (most + count) * math.prod(shape)
    return Cost("forward", passes, 0, (most,), numbers=numbers, about=True, grids=(shape,), at_least=least)


@register("greedy", cost=_cost, clips=True)
@torch.no_grad()
def greedy(
    problem: Problem,
    *,
    segments: Segments = "slic",
    regions: int | tuple[int, int] | None = None,
    stretches: int | None = None,
    search: Search = "windowed",
    l1: float = 1.0,
    l2: float = 1.0,
    window: int = 4,
    enough: float = 0.98,
    budget: int | None = None,
    batch: int = 64,
) -> Outcome:
    """Greedy search over regions; the module's docstring has the method.

    Args:
        problem: The answer's tokens and the image.
        segments: ``"slic"``, superpixels (Achanta et al., 2012, zero-parameter version; needs the extra
            ``superpixels``), or ``"grid"``, rectangles.
        regions: About how many, or ``(rows, columns)`` of a grid; of a clip in all its stretches together, or
            ``(rows, columns)`` in each. By default 32 of an image, 64 of a clip.
        stretches: Of a clip, even parts of its time, by default at most 4; regions lie within one.
        search: ``"windowed"`` or ``"exact"``.
        l1, l2: λ1 and λ2.
        window: Regions tried per round of the windowed search.
        enough: Share of the rise of F at which the windowed search ends; above 1 it goes on to the last region.
        budget: Images at most; the map is the best that was found with them.
        batch: Masks per call of the replay.

    Raises:
        ExplainError: A parameter out of range, a budget that has no room for a look at each region, scores that are not
            finite, or superpixels that cannot be had.
    """
    check_rules(
        "greedy",
        segments=(segments, segments in get_args(Segments), "'slic' or 'grid'"),
        search=(search, search in get_args(Search), "'windowed' or 'exact'"),
        l1=(l1, l1 >= 0, "not negative"),
        l2=(l2, l2 >= 0 and l1 + l2 > 0, "not negative, and not 0 when l1 is"),
        window=whole_rule(window),
        enough=(enough, 0 < enough < math.inf, "a positive number"),
        budget=whole_rule(budget, or_none=True),
        batch=whole_rule(batch, 2),
    )
    regions = _wanted(problem, regions)
    labels = regions_of(problem, segments, regions, stretches)
    shape = tuple(labels.shape)
    params: dict[str, Any] = {
        "segments": segments,
        "regions": list(regions) if isinstance(regions, (tuple, list)) else regions,
        "search": search,
        "l1": l1,
        "l2": l2,
        "budget": budget,
        "batch": batch,
    }
    if problem.clip is not None:
        params["stretches"] = _parts(problem, stretches)
    if search == "windowed":
        params |= {"window": window, "enough": enough}
    seen = problem.seen(shape)
    if not seen.any():
        return Outcome(None, params, reason=NO_SIGHT)
    # Regions out of the model's sight are left alone: nothing can be said about them.
    inside = torch.stack([labels == number for number in labels[seen].unique().tolist()])
    worth = _Worth(problem, inside, l1, l2, batch, budget)
    found = _searched(worth, len(inside), math.inf) if search == "exact" else _searched(worth, window, enough)
    return _outcome(worth, found, params)


def _outcome(worth: _Worth, found: _Found, params: Mapping[str, Any]) -> Outcome:
    """The map of what was found, with its curve."""
    track = torch.tensor(found.track, dtype=torch.float64)
    everything = worth.of([range(worth.regions)])[0]
    history = tuple(
        {"regions": float(length), "worth": float(value), "region": float(found.order[length - 1]) if length else -1.0}
        for length, value in enumerate(found.track)
    )
    diagnostics = {
        "regions": worth.regions,
        "images": worth.images,
        "worth_of_nothing": found.track[0],
        "worth_of_all": everything,
        "curve": found.curve,
        "stopped": found.stopped,
    }
    highest = track.cummax(dim=0).values
    rise = max(float(highest[-1]), everything) - track[0]
    if not rise > 0:
        reason = "no set of regions that was tried makes the selected words more likely than none"
        return Outcome(None, params, history, reason, diagnostics)
    missing = 1 - (highest - track[0]) / rise
    before = torch.cat([missing[:-1], missing[-1:].expand(worth.regions - len(track) + 1)])
    return Outcome(_painted(worth.inside, found.order, before), params, history, diagnostics=diagnostics)


def _painted(inside: torch.Tensor, order: list[int], missing: torch.Tensor) -> torch.Tensor:
    """Each region's value over its cells: the share of the rise that was missing before it, and its rank."""
    rank = 1 - torch.arange(len(order), dtype=torch.float32) / len(order)
    value = torch.empty(len(order), dtype=torch.float64)
    value[order] = (1 - _RANK_SHARE) * missing + _RANK_SHARE * rank
    return torch.einsum("m...,m->...", inside.double(), value).clamp(0.0, 1.0).float()


def regions_of(
    problem: Problem, segments: Segments, regions: int | tuple[int, int], stretches: int | None = None
) -> torch.Tensor:
    """Number of the region of every cell, ``(row, col)`` int64, of a clip ``(t, row, col)``.

    Raises:
        ExplainError: scikit-image is missing, there is no image to cut up, a number of regions below 1, or more
            stretches than steps in time.
    """
    clip = problem.clip
    if clip is None and stretches is not None:
        raise ExplainError("greedy: stretches are of a clip's time, and this is an image: leave stretches out")
    parts = 1 if clip is None else _parts(problem, stretches)
    if isinstance(regions, (tuple, list)) and segments == "grid":
        number = math.prod(problem.grid(regions))
    else:
        number = max(1, _number(regions) // parts)
    steps = 1 if clip is None else problem.shape(1)[0]
    bounds = [round(part * steps / parts) for part in range(parts + 1)]
    spans = list(itertools.pairwise(bounds))
    if segments == "grid":
        shape = problem.grid(regions) if isinstance(regions, (tuple, list)) else problem.grid(None, cells=number)
        cut = [torch.arange(math.prod(shape)).reshape(1, *shape).expand(stop - start, -1, -1) for start, stop in spans]
    else:
        numbers = [0] if clip is None else [part[len(part) // 2] for part in clip.parts(steps)]
        frames = [_pixels(problem, number) for number in numbers]
        cut = [_superpixels(frames[start:stop], number) for start, stop in spans]
    first = 0
    for place, part in enumerate(cut):
        cut[place] = part + first
        first += int(part.max()) + 1
    labels = torch.cat(cut)
    return labels[0] if clip is None else labels


def _wanted(problem: Problem, regions: int | tuple[int, int] | None) -> int | tuple[int, int]:
    if regions is None:
        return _REGIONS if problem.clip is None else _CLIP_REGIONS
    return regions


def _parts(problem: Problem, stretches: int | None) -> int:
    steps = problem.shape(1)[0]
    parts = min(_STRETCHES, steps) if stretches is None else stretches
    check_rules("greedy", stretches=(parts, whole_rule(parts)[1] and parts <= steps, f"between 1 and {steps}"))
    return parts


def _small(problem: Problem) -> tuple[int, int]:
    """Columns and rows of a map of superpixels."""
    edges = problem.replay.image_sizes[problem.image]
    scale = min(1.0, (_LONG_SIDE if problem.clip is None else _CLIP_SIDE) / max(edges))
    return max(1, round(edges[0] * scale)), max(1, round(edges[1] * scale))


def _pixels(problem: Problem, number: int) -> np.ndarray:
    """The image, or one frame of the clip, small: ``(row, col, channel)`` uint8."""
    try:
        image = problem.replay.image(problem.image + number).convert("RGB")
    except (ImageError, IndexError) as error:
        raise ExplainError(f"greedy: no image to cut into superpixels ({error}); use segments='grid'") from error
    return np.asarray(image.resize(_small(problem)))


def _superpixels(frames: Sequence[np.ndarray], number: int) -> torch.Tensor:
    """Superpixels of some frames together, ``(t, row, col)`` int64 from 0."""
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise ExplainError(
            "greedy: superpixels need scikit-image: pip install 'lvlm-probe[superpixels]', or segments='grid'"
        ) from error
    pixels = np.stack(frames) if len(frames) > 1 else frames[0]
    labels = slic(pixels, n_segments=number, slic_zero=True, start_label=0, channel_axis=-1)
    return torch.from_numpy(np.asarray(labels, dtype=np.int64)).reshape(len(frames), *frames[0].shape[:2])


def _number(regions: object) -> int:
    check_rules("greedy", regions=whole_rule(regions))
    assert isinstance(regions, int)
    return regions


class _Worth:
    """F of sets of regions, each image sent once.

    Attributes:
        inside: cells of every region, ``(region, *shape)`` bool.
        images: sent so far.
        limit: F cannot be above it; none where a score of the user's own is no probability.
    """

    def __init__(
        self, problem: Problem, inside: torch.Tensor, l1: float, l2: float, batch: int, budget: int | None
    ) -> None:
        self.problem, self.l1, self.l2, self.batch, self.budget = problem, l1, l2, batch, budget
        self.inside = inside
        self.regions = len(inside)
        self.images = 0
        own = problem.selection.score
        self._followed: Followed = "prob" if own is None else own.followed
        self.limit = l1 + l2 if self._followed == "prob" else math.inf
        self._known: dict[frozenset[int], float] = {}
        cells = inside.flatten(1).sum(dim=1).double()
        self._share = (cells / cells.sum()).tolist()

    def of(self, sets: Sequence[Collection[int]]) -> list[float]:
        """F of some sets."""
        only, without = self.shown(sets), self.shown(self.others(sets))
        return [self.l1 * one + self.l2 * (1 - other) for one, other in zip(only, without, strict=True)]

    def others(self, sets: Sequence[Collection[int]]) -> list[frozenset[int]]:
        """All regions but those of each set."""
        return [frozenset(range(self.regions)) - frozenset(members) for members in sets]

    def affords(self, sets: Sequence[Collection[int]]) -> bool:
        """Whether the budget has room for showing these alone."""
        return self.budget is None or self.images + len(set(map(frozenset, sets)) - self._known.keys()) <= self.budget

    def gain(self, order: Sequence[int], lengths: Sequence[int]) -> float:
        """Insertion − deletion of a map of this order, from F of so many first regions, straight between them; NaN
        where there is nothing to normalise by."""
        prefixes = [order[:length] for length in (*lengths, self.regions)]
        fractions = [sum(self._share[region] for region in prefix) for prefix in prefixes]
        given, lost = self.shown(prefixes), self.shown(self.others(prefixes))
        by = curve_ends(given[-1], given[0], ordered=self.problem.selection.score is not None)
        high, low = (normalise(np.array(values), **by, score=self._followed) for values in (given, lost))
        return area(np.array(fractions), high - low)

    def settled(self, done: int) -> None:
        self.problem.advance(done, self.regions)

    def shown(self, sets: Sequence[Collection[int]]) -> list[float]:
        """P with nothing but these regions."""
        keys = list(map(frozenset, sets))
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        for start in range(0, len(new), self.batch):
            part = new[start : start + self.batch]
            chosen = torch.zeros(len(part), self.regions, dtype=torch.float32)
            for row, key in enumerate(part):
                chosen[row, list(key)] = 1.0
            masks = (chosen @ self.inside.flatten(1).float()).reshape(-1, *self.inside.shape[1:])
            log_probs = self.problem.replay.log_probs(
                masks.to(self.problem.replay.device), image=self.problem.target, steps=self.problem.columns
            )
            probability = score_of(self.problem, log_probs, "prob").cpu().double()
            require_finite("greedy", self.problem, probability)
            self.images += len(masks)
            self._known |= dict(zip(part, probability.tolist(), strict=True))
        return [self._known[key] for key in keys]


@dataclass(frozen=True)
class _Found:
    """What a search found.

    Attributes:
        order: all regions; those that were taken first.
        track: F of the regions taken, from none of them on.
        curve: after every round images sent, regions taken, and insertion − deletion of the map so far.
        stopped: why it ended, as a sentence.
    """

    order: list[int]
    track: list[float]
    curve: list[dict[str, float]]
    stopped: str


def _searched(worth: _Worth, window: int, enough: float) -> _Found:
    left, taken = set(range(worth.regions)), list[int]()
    first = [[region] for region in left]
    look = [*first, *worth.others(first)] if window >= worth.regions else worth.others(first) if worth.l2 else first
    if not worth.affords([[], left, *look]):
        raise ExplainError(
            f"greedy: a budget of {worth.budget} images is less than the {len(look) + 2} that a first look at "
            f"{worth.regions} regions takes; fewer regions=… take less"
        )
    nothing, everything = worth.of([[], left])
    gains = _alone(worth) if window < worth.regions else {}
    track, curve = [nothing], list[dict[str, float]]()
    stopped = "every region has its place"
    worth.settled(0)

    def ranked() -> list[int]:
        return sorted(left, key=lambda region: (-gains.get(region, 0.0), region))

    def told(lengths: Sequence[int], order: Sequence[int]) -> None:
        gain = worth.gain(order, lengths)
        curve.append({"images": float(worth.images), "regions": float(len(taken)), "gain": gain})

    size, looked = window, 0  # how many regions taken when all that were left were tried
    while left:
        tried = ranked()[:size]
        sets = [[*taken, region] for region in tried]
        if not worth.affords([*sets, *worth.others(sets)]):
            stopped = f"the budget of {worth.budget} images is spent"
            break
        values = dict(zip(tried, worth.of(sets), strict=True))
        gains |= {region: value - track[-1] for region, value in values.items()}
        best = max(values, key=lambda region: (values[region], -region))
        taken.append(best)
        left.discard(best)
        track.append(values[best])
        told(range(len(track)), [*taken, *ranked()])
        worth.settled(len(taken))
        if left and enough <= 1:
            reached, rise = max(track) - nothing, max(*track, everything) - nothing
            little = (1 - enough) * rise
            if reached >= enough * rise > 0 and min(track[-1] - track[-2], worth.limit - track[-1]) <= little:
                stopped = f"{reached / rise:.1%} of what the regions can tell is there"
                break
            vain = len(taken) - looked >= _PATIENCE and max(track) - max(track[:-_PATIENCE]) < little
            if vain and looked:
                stopped = "more regions did not help"
                break
            size, looked = (len(left), len(taken) + 1) if vain else (window, looked)
    beside = [[*taken, region] for region in sorted(left)]
    if beside and not looked and worth.affords([*beside, *worth.others(beside)]):
        gains |= dict(zip(sorted(left), worth.of(beside), strict=True))
    rest = ranked()
    lengths = sorted({len(taken) + round(share * len(rest)) for share in _REST} - {len(taken), worth.regions})
    some = [[*taken, *rest][:length] for length in lengths]
    if some and worth.affords([*some, *worth.others(some)]):
        told([*range(len(track)), *lengths], [*taken, *rest])
    worth.settled(worth.regions)
    return _Found([*taken, *rest], track, curve, stopped)


def _alone(worth: _Worth) -> dict[int, float]:
    """What hiding each region alone takes from F; where F does not look at that, what showing it adds."""
    each = [[region] for region in range(worth.regions)]
    nothing, everything = worth.shown([[], range(worth.regions)])
    if worth.l2:
        rises = [everything - value for value in worth.shown(worth.others(each))]
    else:
        rises = [value - nothing for value in worth.shown(each)]
    return {region: (worth.l2 or worth.l1) * rise for region, rise in enumerate(rises)}
