"""Greedy search over regions (EAGLE, Chen et al., 2025): which few regions suffice for the words, and are missed most.

The image is cut into regions. A set S of them is worth::

    F(S) = λ1 · P(only S shown) + λ2 · (1 − P(all but S shown))

P is the mean probability of the selected tokens; what is not shown is the baseline image. The search starts with
nothing and takes, again and again, the region that raises F most. For a submodular monotone F, the first k regions are
worth at least 1 − 1/e of the best k (Nemhauser et al., 1978); a model's P is neither, so this is a heuristic on models,
and lazy evaluation of gains, which needs submodularity to be exact, is not used.

**Exact** search tries every region left in every round: m (m + 1) + 2 images for m regions, 4,162 for 64.

**Fast** search (default) tries every region left in every ``rescan``-th round only, and else the ``top`` ones by their
last known gains. Every round it also settles one region at the other end: of the ``pending`` regions of least gain, the
one without which F of all regions not yet put at the end is highest. So two regions are settled per round, with about
1,400 images for 64 regions.

**Heat.** A region's value is the share of F's total rise that was still missing when the region was taken:
1 − (F(before) − F(∅)) / (max F − F(∅)), F taken as the highest so far. It falls from 1 along the order. Regions that
add nothing are told apart by rank: heat = (1 − ε) · value + ε · (m − position) / m, ε = 0.001, so no two regions tie.

**Clips** are cut in time first, into even stretches, and each of those in space: by a grid, or by superpixels of all
its frames together, which follow what moves.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from lvlm_probe.errors import ExplainError, ImageError
from lvlm_probe.explainers.registry import Cost, Outcome, Problem, register
from lvlm_probe.explainers.scores import NO_SIGHT, check_rules, require_finite, score_of, whole_rule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Search = Literal["fast", "exact"]
Segments = Literal["slic", "grid"]

_RANK_SHARE = 1e-3
_LONG_SIDE = 224
"""Cells of the long side of a map of superpixels: enough for their borders, and 64 masks of it are 13 MB."""
_CLIP_SIDE = 112
"""... of a clip, with its 16 steps in time 51 MB."""
_STRETCHES = 4
"""Parts of a clip's time by default: of 64 regions, 16 in space each."""


def _cost(problem: Problem, params: Mapping[str, Any]) -> Cost:
    regions, batch = params["regions"], params["batch"]
    parts = 1 if problem.clip is None else _parts(problem, params["stretches"])
    count = regions if isinstance(regions, int) else regions[0] * regions[1] * parts
    if params["segments"] == "slic":
        width, height = _small(problem)
        shape = problem.shape((height, width))
    else:
        shape = problem.shape(None, cells=max(1, count // parts))
    if params["search"] == "exact":
        passes = count * (count + 1) + 2
    else:
        left, rounds, sets = count, 0, 1
        while left > 0:
            sets += left if rounds % params["rescan"] == 0 else min(params["top"], left)
            left -= 1
            if left and params["pending"]:
                sets += min(params["pending"], left)
                left -= 1
            rounds += 1
        passes = 2 * (sets + count // 2)
    numbers = (batch // 2 + count) * math.prod(shape)
    return Cost("forward", passes, 0, (min(batch, 2 * count),), numbers=numbers, about=True, grids=(shape,))


@register("greedy", cost=_cost, clips=True)
@torch.no_grad()
def greedy(
    problem: Problem,
    *,
    segments: Segments = "slic",
    regions: int | tuple[int, int] = 64,
    stretches: int | None = None,
    search: Search = "fast",
    l1: float = 1.0,
    l2: float = 1.0,
    rescan: int = 5,
    top: int = 10,
    pending: int = 8,
    batch: int = 64,
) -> Outcome:
    """Greedy search over regions; the module's docstring has the method.

    Args:
        problem: The answer's tokens and the image.
        segments: ``"slic"``, superpixels (Achanta et al., 2012, zero-parameter version; needs the extra
            ``superpixels``), or ``"grid"``, rectangles.
        regions: About how many, or ``(rows, columns)`` of a grid; of a clip in all its stretches together, or
            ``(rows, columns)`` in each.
        stretches: Of a clip, even parts of its time, by default at most 4; regions lie within one.
        search: ``"fast"`` or ``"exact"``.
        l1, l2: λ1 and λ2.
        rescan, top, pending: Of the fast search.
        batch: Masks per call of the replay.

    Raises:
        ExplainError: A parameter out of range, scores that are not finite, or superpixels that cannot be had.
    """
    check_rules(
        "greedy",
        segments=(segments, segments in get_args(Segments), "'slic' or 'grid'"),
        search=(search, search in get_args(Search), "'fast' or 'exact'"),
        l1=(l1, l1 >= 0, "not negative"),
        l2=(l2, l2 >= 0 and l1 + l2 > 0, "not negative, and not 0 when l1 is"),
        rescan=whole_rule(rescan),
        top=whole_rule(top),
        pending=whole_rule(pending, 0),
        batch=whole_rule(batch, 2),
    )
    labels = regions_of(problem, segments, regions, stretches)
    shape = tuple(labels.shape)
    params: dict[str, Any] = {
        "segments": segments,
        "regions": list(regions) if isinstance(regions, (tuple, list)) else regions,
        "search": search,
        "l1": l1,
        "l2": l2,
        "batch": batch,
    }
    if problem.clip is not None:
        params["stretches"] = _parts(problem, stretches)
    if search == "fast":
        params |= {"rescan": rescan, "top": top, "pending": pending}
    seen = problem.seen(shape)
    if not seen.any():
        return Outcome(None, params, reason=NO_SIGHT)
    # Regions out of the model's sight are left alone: nothing can be said about them.
    inside = torch.stack([labels == number for number in labels[seen].unique().tolist()])
    worth = _Worth(problem, inside, l1, l2, batch)
    if search == "exact":
        order = _exact(worth)
    else:
        order = _fast(worth, rescan=rescan, top=top, pending=pending)
    prefixes = [order[:length] for length in range(len(order) + 1)]
    track = torch.tensor(worth.of(prefixes), dtype=torch.float64)
    history = tuple(
        {"regions": float(length), "worth": float(value), "region": float(order[length - 1]) if length else -1.0}
        for length, value in enumerate(track)
    )
    diagnostics = {"regions": len(order), "images": worth.images, "worth_of_all": float(track[-1])}
    diagnostics["worth_of_nothing"] = float(track[0])
    highest = track.cummax(dim=0).values
    rise = highest[-1] - track[0]
    if not rise > 0:
        reason = "no set of regions makes the selected words more likely than none"
        return Outcome(None, params, history, reason, diagnostics)
    missing = 1 - (highest[:-1] - track[0]) / rise
    return Outcome(_painted(inside, order, missing), params, history, diagnostics=diagnostics)


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
    """F of sets of regions, each set evaluated once."""

    def __init__(self, problem: Problem, inside: torch.Tensor, l1: float, l2: float, batch: int) -> None:
        self.problem, self.l1, self.l2, self.batch = problem, l1, l2, batch
        self.inside = inside.flatten(1).float()
        self.shape = inside.shape[1:]
        self.regions = len(inside)
        self.images = 0
        self.known: dict[frozenset[int], float] = {}

    def of(self, sets: Sequence[Sequence[int]]) -> list[float]:
        keys = [frozenset(members) for members in sets]
        new = [key for key in dict.fromkeys(keys) if key not in self.known]
        for start in range(0, len(new), self.batch // 2):
            part = new[start : start + self.batch // 2]
            chosen = torch.zeros(len(part), self.regions, dtype=torch.float32)
            for row, key in enumerate(part):
                chosen[row, list(key)] = 1.0
            shown = (chosen @ self.inside).reshape(-1, *self.shape)
            masks = torch.cat([shown, 1 - shown]).to(self.problem.replay.device)
            log_probs = self.problem.replay.log_probs(masks, image=self.problem.target, steps=self.problem.columns)
            probability = score_of(self.problem, log_probs, "prob").cpu().double()
            require_finite("greedy", self.problem, probability)
            self.images += len(masks)
            only, without = probability.chunk(2)
            for key, value in zip(part, self.l1 * only + self.l2 * (1 - without), strict=True):
                self.known[key] = float(value)
        return [self.known[key] for key in keys]

    def settled(self, done: int) -> None:
        self.problem.advance(done, self.regions)


def _exact(worth: _Worth) -> list[int]:
    order: list[int] = []
    worth.settled(0)
    while len(order) < worth.regions:
        left = [region for region in range(worth.regions) if region not in order]
        values = worth.of([[*order, region] for region in left])
        order.append(left[max(range(len(left)), key=values.__getitem__)])
        worth.settled(len(order))
    return order


def _fast(worth: _Worth, *, rescan: int, top: int, pending: int) -> list[int]:
    front: list[int] = []
    back: list[int] = []  # the least important last
    last: dict[int, float] = {}
    left = set(range(worth.regions))
    rounds = 0
    worth.settled(0)
    while left:
        # Gains of different rounds are gains over different sets; their order is all that is used.
        by_gain = sorted(left, key=lambda region: (-last.get(region, 0.0), region))
        tried = sorted(left) if rounds % rescan == 0 else by_gain[:top]
        values = worth.of([[*front, region] for region in tried])
        base = worth.of([front])[0]
        last |= {region: value - base for region, value in zip(tried, values, strict=True)}
        best = tried[max(range(len(tried)), key=values.__getitem__)]
        front.append(best)
        left.discard(best)
        if left and pending:
            weak = sorted(left, key=lambda region: (last.get(region, 0.0), region))[:pending]
            kept = [*front, *left]
            losses = worth.of([[region for region in kept if region != out] for out in weak])
            worst = weak[max(range(len(weak)), key=losses.__getitem__)]
            back.insert(0, worst)
            left.discard(worst)
        rounds += 1
        worth.settled(len(front) + len(back))
    return front + back
