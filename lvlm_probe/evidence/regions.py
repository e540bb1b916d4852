"""The smallest region of a map that keeps the score, as polygons and boxes in pixels of the original image.

Cells are ranked by the map and shown alone, as in insertion; of all numbers of cells that were asked, the smallest is
taken that keeps ``keep`` of the score, normalised as the insertion curve is (1 the whole image, 0 the baseline). A
score that ``evaluate`` has taken holds that curve: then no pass is run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_probe.cards import equal, in_one_line
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.curve_points import MaskScores, curve_masks, rank
from lvlm_probe.explainers.explaining import scored_by
from lvlm_probe.explainers.scores import Followed, even_masks, followed, too_narrow
from lvlm_probe.files import record_of
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.metrics import Score
from lvlm_probe.metrics.scoring import check_answer, over_baseline
from lvlm_probe.models.exhaustion import told_out_of_memory
from lvlm_probe.replaying.isolation import outside_modes

if TYPE_CHECKING:
    from lvlm_probe.heatmap import Heatmap
    from lvlm_probe.replaying import ReplayLike

Ring = tuple[tuple[float, float], ...]


@dataclass(frozen=True, repr=False)
class Region:
    """Where most of a score is.

    Attributes:
        keep: share of the score that was asked for.
        kept: share that the region alone has.
        area: its share of the image, 0 to 1.
        box: ``(left, top, right, bottom)`` around all of it, pixels of the original image.
        boxes: the same around each part.
        polygons: outlines ``((x, y), …)`` in pixels along the cells' edges: outer ones clockwise as seen, holes the
            other way round; to be filled by the even-odd rule.
        image, image_size: number of the image, and its ``(width, height)`` in pixels.
        passes: images that were sent through the model for it.
        cells: ``(row, col)`` bool; not part of ``to_dict``.
    """

    __repr__, __eq__ = in_one_line, equal

    keep: float
    kept: float
    area: float
    box: tuple[float, ...]
    boxes: tuple[tuple[float, ...], ...]
    polygons: tuple[Ring, ...]
    image: int
    image_size: tuple[int, int]
    passes: int
    cells: np.ndarray = field(compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return record_of(self, "cells")

    def __str__(self) -> str:
        place = ", ".join(f"{edge:.0f}" for edge in self.box)
        return f"{100 * self.kept:.0f} % of the score stays with {100 * self.area:.2g} % of the image, in ({place})"


@naming_arguments
@outside_modes
@told_out_of_memory
def region(source: ReplayLike | Score, heat: Heatmap, *, keep: float = 0.9) -> Region:
    """Find the smallest area of a map's ranked cells that keeps a share of the score.

    Args:
        source: the map's score, whose insertion curve is read at no pass: the smallest of its points that keeps it; or
            the recorded answer on its model, which is asked by cells: 1, 2, 4, … of them, then by halving, at most
            2 log₂ n + 2 passes for n cells.
        heat: the map.
        keep: share of the score, above 0 and at most 1.

    Raises:
        ExplainError: the map has no values or is of a video, the score is another map's or has no curve, or the image
            as a whole decides too little of the score for shares of it.
    """
    values = heat.known_values()
    if values.ndim != 2:
        raise ExplainError("a region is of an image, and this heatmap is of a video: take one frame, heat.frame(3)")
    if not 0 < keep <= 1:
        raise ExplainError(f"keep is a share of the score in (0, 1]; got {keep!r}")
    assert heat.seen is not None
    order = rank(values, heat.seen, np.random.default_rng(0))
    seen = int(heat.seen.sum())
    if isinstance(source, Score):
        count, kept, passes = (*_on_curve(source, heat, keep, seen), 0)
    else:
        count, kept, passes = _searched(source, heat, keep, order, seen)
    cells = np.zeros(values.shape, dtype=bool)
    cells.flat[order[:count]] = True
    rings, boxes = polygons_of(cells, heat.image_size)
    edges = np.array(boxes)
    around = (*edges[:, :2].min(0).tolist(), *edges[:, 2:].max(0).tolist())
    return Region(
        keep, kept, float(cells.mean()), around, boxes, rings, heat.image_index, heat.image_size, passes, cells
    )  # fmt: skip


def _on_curve(score: Score, heat: Heatmap, keep: float, seen: int) -> tuple[int, float]:
    own = heat.selection.score
    of_heat = [heat.provenance.get("trace_id"), list(heat.selection.indices), None if own is None else own.name]
    if [score.provenance.get(name) for name in ("trace_id", "tokens", "score")] != of_heat:
        raise ExplainError("this score is of another answer or of other words than the map: evaluate(heat, replay)")
    assert heat.values is not None
    if list(score.params.get("grid") or ()) != list(heat.values.shape):
        raise ExplainError("this score was taken on another grid than the map's: give the replay instead of the score")
    curve = np.asarray(score.insertion_curve, dtype=np.float64)
    if not len(curve) or np.isnan(curve).any():
        raise ExplainError(f"this score has no curve: {score.reason or 'the heatmap has no values'}")
    point = int(np.argmax(curve >= min(keep, curve[-1])))
    return max(1, round(score.fractions[point] * seen)), float(curve[point])


def _searched(replay: ReplayLike, heat: Heatmap, keep: float, order: np.ndarray, seen: int) -> tuple[int, float, int]:
    check_answer(heat, replay)
    assert heat.values is not None
    shape, own = heat.values.shape, heat.selection.score
    kind: Followed = "own" if own is not None and own.followed == "own" else "prob"  # as evaluate does
    replay = over_baseline(replay, heat.provenance.get("baseline") or replay.baseline)
    replay, columns, before = scored_by(replay, heat.selection), heat.selection.columns, replay.passes.forward
    scores = MaskScores(replay, columns, image=heat.image_index, mode="fast")
    original, baseline = followed(scores(even_masks([1.0, 0.0], shape)), kind, own).tolist()
    if why := too_narrow(original, baseline, score=kind):
        raise ExplainError(f"no share of the score can be told: {why}")
    bottom = baseline if own is None else min(original, baseline)  # 0 and 1 of the curves of evaluate

    def kept(count: int) -> float:
        alone = followed(scores(curve_masks(order, np.array([count]), shape, insert=True)), kind, own)
        return (float(alone[0]) - bottom) / (original - baseline if own is None else abs(original - baseline))

    count = first_that(lambda cells: kept(cells) >= keep, seen) or seen
    return count, kept(count), replay.passes.forward - before


def first_that(holds: Callable[[int], bool], most: int) -> int | None:
    """The smallest number that ``holds``, of those that are asked: 1, 2, 4, … up to ``most`` until one does, then by
    halving down to the one before it. It does hold, and one less does not. ``None`` where none does."""
    least, number = 0, 1
    while not holds(number):
        if number >= most:
            return None
        least, number = number, min(2 * number, most)
    while number - least > 1:
        middle = (least + number) // 2
        least, number = (least, middle) if holds(middle) else (middle, number)
    return number


def polygons_of(cells: np.ndarray, size: tuple[int, int]) -> tuple[tuple[Ring, ...], tuple[tuple[float, ...], ...]]:
    """The outlines of cells, and a box around each part of them; cells that touch at a corner alone are two parts.

    Args:
        cells: ``(row, col)`` bool.
        size: ``(width, height)`` of the image that the grid lies over, pixels.

    Returns:
        rings of ``(x, y)``, corners alone, outer ones clockwise as seen (y goes down), holes the other way round; and
        ``(left, top, right, bottom)`` of each outer one.
    """
    edges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    padded = np.pad(cells, 1)
    for row, col in np.argwhere(cells):
        r, c = int(row), int(col)
        # Clockwise around each cell; an edge that two cells share is no outline.
        for (dr, dc), start, end in (
            ((-1, 0), (r, c), (r, c + 1)), ((0, 1), (r, c + 1), (r + 1, c + 1)),
            ((1, 0), (r + 1, c + 1), (r + 1, c)), ((0, -1), (r + 1, c), (r, c)),
        ):  # fmt: skip
            if not padded[r + 1 + dr, c + 1 + dc]:
                edges.setdefault(start, []).append(end)
    across, down = size[0] / cells.shape[1], size[1] / cells.shape[0]
    rings, boxes = [], []
    while edges:
        rings.append(tuple((col * across, row * down) for row, col in _ring(edges)))
        if twice_the_area(rings[-1]) > 0:
            xs, ys = zip(*rings[-1], strict=True)
            boxes.append((min(xs), min(ys), max(xs), max(ys)))
    return tuple(rings), tuple(boxes)


def twice_the_area(ring: Ring) -> float:
    """Twice the area in an outline of ``polygons_of``; negative around a hole."""
    return sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(ring, (*ring[1:], ring[0]), strict=True))


def _ring(edges: dict[tuple[int, int], list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """Take one closed outline out of directed edges: its corners, (row, col)."""
    start = min(edges)
    place, way = start, (0, 0)
    corners: list[tuple[int, int]] = []
    while True:
        ends = edges[place]
        # Where two cells meet at a corner, turn right: each keeps an outline of its own.
        right = (place[0] + way[1], place[1] - way[0])
        end = right if len(ends) > 1 and right in ends else ends[0]
        ends.remove(end)
        if not ends:
            del edges[place]
        step = (end[0] - place[0], end[1] - place[1])
        if step != way:
            corners.append(place)
        place, way = end, step
        if place == start:
            return corners if corners[0] == start else [start, *corners]
