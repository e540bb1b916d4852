"""Hard scenes: the demo's shapes, crowded, partly hidden, faint, and beside others that look like them.

On the plain scenes nearly every explanation finds the object, so methods tie. Here a heatmap must tell apart what the
easy scenes keep apart. Every hard scene has all of this (`layout` is the scene's, ``hidden_shares`` measures it):

* five to eight objects instead of three to five, on a ground with a weave (stripes, checks, ripples);
* low contrast: every object's colour is blended towards the ground's;
* at least one object that the answer needs is partly behind others; no object of the scene is hidden by more than the
  largest share in `HARD`, and none by one of its own colour, so that everything can be told;
* at least one object that the answer needs has a look-alike next to it, which the answer does not need: the same shape
  in another colour or the same colour in another shape, with at most `NEAR` between the two reaches.

Answers that need two objects or more are ``pair`` and most of ``count``, which here also counts by colour and shape at
once (*How many red stars are there?*, beside blue stars and red hearts). ``which`` asks for one of several objects of
the same shape (*What color is the star in the top left?*).

`HARD` has the numbers. Masks are of the visible pixels, as everywhere in `lvlm_probe.demo.scene`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lvlm_probe.demo.drawing import REACH, footprints, shade
from lvlm_probe.demo.questions import (
    COLOURS,
    COLUMNS,
    NUMBERS,
    ROWS,
    SHAPES,
    Item,
    Layout,
    Query,
    count_query,
    may_be_in,
    plural,
)
from lvlm_probe.demo.questions import queries as plain_queries

if TYPE_CHECKING:
    import numpy as np

NEAR = 0.06
"""Largest distance between the reaches of an object and its look-alike, as a fraction of the shorter side."""


@dataclass(frozen=True)
class Ranges:
    """Smallest and largest of what makes layouts hard.

    `objects` is their number, `radius` is a fraction of the shorter side, `contrast` the share of an object's own
    colour that is left, `pattern` the amplitude of the ground's weave in levels of 255, and `hidden` the share of the
    area of the most hidden object that the answer needs which lies behind others.
    """

    objects: tuple[int, int]
    radius: tuple[float, float]
    contrast: tuple[float, float]
    pattern: tuple[float, float]
    hidden: tuple[float, float]


HARD = Ranges(objects=(5, 8), radius=(0.115, 0.150), contrast=(0.60, 0.95), pattern=(8.0, 20.0), hidden=(0.10, 0.25))
"""What hard scenes are drawn with."""

_GAP = 0.015  # smallest distance between two objects of one colour, as a fraction of the shorter side
_EDGE = 0.10  # an object that others are to reach from outside its quadrant is nearer than this to a centre line
_RASTER = 168  # side of the raster on which hidden shares are measured
_MOST_ALIKE = 5  # the largest number that has a word


def draw_question(rng: np.random.Generator, kind: str) -> tuple[Layout, Query]:
    """A hard layout and a question of a kind (one of ``HARD_KINDS``) that is hard in it.

    The number that a ``count`` asks for is one to three in equal shares.
    """
    group = int(rng.integers(1, 4)) if kind == "count" else None
    while True:
        layout = draw_layout(rng, kind, group)
        hidden = hidden_shares(layout)
        options = [q for q in queries(layout) if q.kind == kind and _is_hard(q, layout, hidden)]
        if group is not None:
            options = [q for q in options if q.words[0] == NUMBERS[group]]
        if options:
            return layout, options[int(rng.integers(len(options)))]


def draw_layout(rng: np.random.Generator, kind: str, group: int | None = None, *, ranges: Ranges = HARD) -> Layout:
    """A hard layout laid out for a question of a kind, which it need not make hard; for training.

    With `group`, at least that many objects share a shape, a colour, or both.
    """
    while True:
        layout = _attempt(rng, kind, group, ranges)
        if layout is not None and hidden_shares(layout).max() <= ranges.hidden[1]:
            return layout


def hidden_shares(layout: Layout) -> np.ndarray:
    """Share of each object's area that is behind others, ``(objects,)`` in 0..1.

    Measured on a raster whose outlines count in full; a finer drawing departs from it by less than 0.05.
    """
    import numpy as np

    alone = footprints(layout, _RASTER)
    in_front = np.zeros((_RASTER, _RASTER), dtype=bool)
    shares = np.zeros(len(alone))
    for index in range(len(alone) - 1, -1, -1):
        shares[index] = (alone[index] & in_front).sum() / alone[index].sum()
        in_front |= alone[index]
    return shares


def queries(layout: Layout) -> list[Query]:
    """Every question that `layout` answers without ambiguity, hard or not, in a fixed order."""
    items = layout.items
    found = plain_queries(layout)
    for colour in COLOURS:
        for shape in SHAPES:
            alike = tuple(i for i, item in enumerate(items) if (item.colour, item.shape) == (colour, shape))
            if alike:
                found.append(count_query((f"{colour} {shape}", f"{colour} {plural(shape)}"), len(alike), alike))
    for shape in SHAPES:
        of_shape = [i for i, item in enumerate(items) if item.shape == shape]
        for row in ROWS:
            for column in COLUMNS:
                inside = [i for i in of_shape if may_be_in(items[i], row, column)]
                if len(of_shape) > 1 and len(inside) == 1 and items[inside[0]].row and items[inside[0]].column:
                    found.append(which_query(shape, row, column, items[inside[0]].colour, (inside[0],)))
    return found


def which_query(shape: str, row: str, column: str, colour: str, targets: tuple[int, ...]) -> Query:
    """ "What color is the star in the top left?" """
    return Query(
        kind="which",
        question=f"What color is the {shape} in the {row} {column}?",
        template=f"The {shape} in the {row} {column} is {{}}.",
        words=(colour,),
        domains=("colour",),
        targets=(targets,),
        hidden_words=("hidden",),
        hidden_template=f"The {shape} in the {row} {column} is hidden.",
    )


def _is_hard(query: Query, layout: Layout, hidden: np.ndarray) -> bool:
    needed = {t for targets in query.targets for t in targets}
    if max(hidden[i] for i in needed) < HARD.hidden[0]:
        return False
    others = [item for i, item in enumerate(layout.items) if i not in needed]
    return any(_look_alikes(layout.items[i], other) for i in needed for other in others)


def _look_alikes(item: Item, other: Item) -> bool:
    """Whether the two are next to each other and share their shape or their colour, not both."""
    distance = math.hypot(item.x - other.x, item.y - other.y)
    near = distance <= (item.radius + other.radius) * REACH + NEAR
    return near and (item.shape == other.shape) != (item.colour == other.colour)


def _attempt(rng: np.random.Generator, kind: str, group: int | None, ranges: Ranges) -> Layout | None:
    """A crowded layout built around its first object, or None where the objects found no place."""
    names = _names(rng, kind, int(rng.integers(ranges.objects[0], ranges.objects[1] + 1)), group)
    for words in zip(*names, strict=True):
        if max(words.count(word) for word in words) > _MOST_ALIKE:
            return None
    quadrant = (str(rng.choice(ROWS)), str(rng.choice(COLUMNS))) if kind in ("cell", "which") else None
    items: list[Item] = []
    for shape, colour in names:
        # A question that names a quadrant admits no other object there, or no other of the shape.
        barred = quadrant is not None and (kind == "cell" or shape == names[0][0])
        item = _place(rng, items, shape, colour, quadrant if barred else None, ranges, near_edge=kind == "cell")
        if item is None:
            return None
        items.append(item)
    order = rng.permutation(len(items))
    return Layout(tuple(items[i] for i in order), int(rng.integers(2**31)), pattern=float(rng.uniform(*ranges.pattern)))


def _names(rng: np.random.Generator, kind: str, n: int, group: int | None) -> list[tuple[str, str]]:
    """Shape and colour of `n` objects: the first, those counted with it, its look-alikes, then any."""
    shape, colour = str(rng.choice(SHAPES)), str(rng.choice(COLOURS))
    other_shapes, other_colours = [s for s in SHAPES if s != shape], [c for c in COLOURS if c != colour]
    # A question that names an object by its shape alone admits no other of that shape; likewise for colour.
    shapes = other_shapes if kind in ("colour", "pair") else list(SHAPES)
    colours = other_colours if kind == "shape" else list(COLOURS)
    names = [(shape, colour)]
    if group is not None:
        common = int(rng.integers(3))  # what is counted: a shape, a colour, or both at once
        for _ in range(group - 1):
            of_shape = str(rng.choice(SHAPES)) if common == 1 else shape
            names.append((of_shape, str(rng.choice(COLOURS)) if common == 0 else colour))
        shapes = other_shapes if common == 0 else shapes
        colours = other_colours if common == 1 else colours
    for _ in range(2):
        if shape in shapes and (colour not in colours or rng.random() < 0.5):
            names.append((shape, str(rng.choice(other_colours))))
        else:
            names.append((str(rng.choice(other_shapes)), colour))
    while len(names) < n:
        names.append((str(rng.choice(shapes)), str(rng.choice(colours))))
    return names


def _place(
    rng: np.random.Generator,
    items: list[Item],
    shape: str,
    colour: str,
    quadrant: tuple[str, str] | None,
    ranges: Ranges,
    *,
    near_edge: bool,
) -> Item | None:
    """One more object: across an earlier one, beside it, or anywhere; None where it finds no place.

    The first object is in `quadrant`, all others are clearly outside of it. With `near_edge` the first is where an
    object from outside can reach it.
    """
    angle, contrast, rgb = float(rng.uniform(-0.22, 0.22)), float(rng.uniform(*ranges.contrast)), shade(rng, colour)
    for _ in range(40):
        radius = float(rng.uniform(*ranges.radius))
        edge = radius * REACH + 0.012
        way = rng.random()
        if not items or way < 0.25:
            x, y = (float(v) for v in rng.uniform(edge, 1.0 - edge, 2))
        else:
            by = items[0 if rng.random() < 0.5 else int(rng.integers(len(items)))]
            apart = (radius + by.radius) * (float(rng.uniform(0.45, 0.85)) if way < 0.7 else REACH) + _GAP
            turn = float(rng.uniform(0, math.tau))
            x, y = by.x + apart * math.cos(turn), by.y + apart * math.sin(turn)
        item = Item(shape, colour, x, y, radius, angle, rgb, contrast)
        inside = edge <= min(x, y) and max(x, y) <= 1.0 - edge
        if quadrant is not None:
            inside &= not may_be_in(item, *quadrant) if items else (item.row, item.column) == quadrant
            inside &= bool(items) or not near_edge or min(abs(x - 0.5), abs(y - 0.5)) < _EDGE
        if inside and all(_keeps_clear(item, other) for other in items):
            return item
    return None


def _keeps_clear(item: Item, other: Item) -> bool:
    """Whether two objects are far enough apart: side by side if they have one colour, else not on top of each other."""
    distance = math.hypot(item.x - other.x, item.y - other.y)
    return distance >= (item.radius + other.radius) * (REACH if item.colour == other.colour else 0.45) + _GAP
