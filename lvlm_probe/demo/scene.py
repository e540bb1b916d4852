"""Synthetic scenes with questions, full-sentence answers and ground-truth masks.

A *layout* is a few coloured shapes in the unit square; `render` draws it at any size with anti-aliased edges on a
softly textured background; `queries` lists what can be asked about it. A `Scene` is one layout with one question.

Three rules make the scenes useful for explanation:

* The wording of an answer is a function of the question alone; only the words in its *slots* come from the picture.
* Every slot knows the objects that decide it, so each visual word has a ground-truth mask of its own.
* Everything is drawn in the central square of the picture, which is what a resize-and-centre-crop processor keeps.

Scene ``index`` of ``(split, seed)`` is drawn from ``SeedSequence([split number, seed, index])``: it is deterministic,
does not depend on how many scenes are asked for, and no two splits share a scene.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lvlm_probe.demo.drawing import REACH, render, shade

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

KINDS: tuple[str, ...] = ("colour", "shape", "count", "where", "pair", "cell")
"""Every kind of question, in the order in which `scenes` deals them."""

SPLITS: dict[str, int] = {"train": 0, "tune": 1, "eval": 2}
"""Split name to the number that starts its seed sequence."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS: tuple[str, ...] = ("red", "yellow", "green", "cyan", "blue", "purple")
NUMBERS: tuple[str, ...] = ("no", "one", "two", "three", "four", "five")
ROWS: tuple[str, ...] = ("top", "bottom")
COLUMNS: tuple[str, ...] = ("left", "right")

DOMAINS: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "number": NUMBERS[1:],
    "row": ROWS,
    "column": COLUMNS,
}
"""The words that a slot of each domain can hold."""

RADIUS: tuple[float, float] = (0.088, 0.150)
"""Smallest and largest object radius, as a fraction of the picture's shorter side."""

_GAP = 0.022  # smallest distance between two outlines, as a fraction of the shorter side
_AXIS_MARGIN = 0.07  # an object nearer than this to a centre line has no well-defined quadrant


@dataclass(frozen=True)
class Item:
    """One object. `x`, `y` and `radius` are fractions of the central square's side, y downwards; `angle` in radians."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[float, float, float]

    @property
    def row(self) -> str | None:
        """``"top"`` or ``"bottom"``; None near the horizontal centre line."""
        return None if abs(self.y - 0.5) < _AXIS_MARGIN else ROWS[int(self.y > 0.5)]

    @property
    def column(self) -> str | None:
        """``"left"`` or ``"right"``; None near the vertical centre line."""
        return None if abs(self.x - 0.5) < _AXIS_MARGIN else COLUMNS[int(self.x > 0.5)]


@dataclass(frozen=True)
class Layout:
    """Objects without their pixels. `texture` seeds the background."""

    items: tuple[Item, ...]
    texture: int

    def mirrored(self) -> Layout:
        """The layout as a left-right flip of its picture shows it."""
        return replace(self, items=tuple(replace(i, x=1.0 - i.x, angle=-i.angle) for i in self.items))


@dataclass(frozen=True)
class Query:
    """One question about a layout.

    `template` is the answer with a ``{}`` for every slot, `words` are the slots' true values, `domains` name the lists
    they come from (keys of `DOMAINS`), and `targets` are, per slot, the indices of the objects that decide it.
    `hidden_words` is what each slot holds when those objects cannot be seen, `hidden_template` the whole answer then.
    """

    kind: str
    question: str
    template: str
    words: tuple[str, ...]
    domains: tuple[str, ...]
    targets: tuple[tuple[int, ...], ...]
    hidden_words: tuple[str, ...]
    hidden_template: str

    @property
    def answer(self) -> str:
        return self.template.format(*self.words)

    @property
    def slots(self) -> tuple[int, ...]:
        """Position of each slot in ``answer.split()``."""
        return tuple(i for i, word in enumerate(self.template.split()) if "{}" in word)


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, a question, and the answer that the picture decides.

    `image` is RGB; `mask` is ``(H, W)`` bool, True on the objects that the answer needs; `visual_spans` are the
    ``(start, stop)`` character positions in `answer` of the words that only the picture can tell, and `word_masks` are
    the ``(H, W)`` masks of the objects that decide each of them.
    """

    image: Image.Image = field(repr=False)
    question: str
    answer: str
    kind: str
    mask: np.ndarray = field(repr=False)
    visual_spans: tuple[tuple[int, int], ...]
    word_masks: tuple[np.ndarray, ...] = field(repr=False)
    layout: Layout = field(repr=False)
    split: str
    seed: int
    index: int

    @property
    def visual_words(self) -> tuple[str, ...]:
        """The words at `visual_spans`."""
        return tuple(self.answer[start:stop] for start, stop in self.visual_spans)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The question as chat messages for ``processor.apply_chat_template``."""
        content = [{"type": "image", "image": self.image}, {"type": "text", "text": self.question}]
        return [{"role": "user", "content": content}]


def scenes(
    n: int,
    *,
    seed: int = 0,
    split: str = "eval",
    kinds: Sequence[str] | None = None,
    size: tuple[int, int] = (336, 336),
    start: int = 0,
) -> list[Scene]:
    """Draws `n` scenes; scene ``index`` asks a question of kind ``kinds[index % len(kinds)]``.

    `split` is ``"train"`` (whose seed 0 the demo model was trained on), ``"tune"`` or ``"eval"``; they share no scene.
    `kinds` defaults to `KINDS`. `size` is ``(width, height)`` in pixels; the objects stay in the central square, scaled
    by the shorter side. `start` is the index of the first scene.

    Raises:
        ValueError: an unknown split or kind, a negative number of scenes, or a picture under 32 pixels.
    """
    kinds = KINDS if kinds is None else tuple(kinds)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    if unknown := [kind for kind in kinds if kind not in KINDS] or not kinds:
        raise ValueError(f"unknown kinds {unknown!r}; there are {', '.join(KINDS)}")
    if n < 0 or start < 0:
        raise ValueError(f"cannot draw {n} scenes from index {start}")
    if min(size) < 32:
        raise ValueError(f"a scene of {size[0]}x{size[1]} pixels is too small to read; the shorter side must be >= 32")
    return [_scene(split, seed, index, kinds[index % len(kinds)], size) for index in range(start, start + n)]


def _scene(split: str, seed: int, index: int, kind: str, size: tuple[int, int]) -> Scene:
    rng = scene_rng(split, seed, index)
    while True:
        group = int(rng.integers(1, 5)) if kind == "count" else None
        layout = draw_layout(rng, group=group)
        options = [q for q in queries(layout) if q.kind == kind]
        if group is not None:
            options = [q for q in options if q.words[0] == NUMBERS[group]]
        if options:
            break
    query = options[int(rng.integers(len(options)))]
    image, labels = render(layout, size)
    word_masks = tuple(_mask_of(labels, targets) for targets in query.targets)
    mask = _mask_of(labels, tuple(t for targets in query.targets for t in targets))
    return Scene(
        image=image,
        question=query.question,
        answer=query.answer,
        kind=kind,
        mask=mask,
        visual_spans=tuple(_spans(query)),
        word_masks=word_masks,
        layout=layout,
        split=split,
        seed=seed,
        index=index,
    )


def _mask_of(labels: np.ndarray, targets: tuple[int, ...]) -> np.ndarray:
    import numpy as np

    return np.isin(labels, targets)


def _spans(query: Query) -> Iterator[tuple[int, int]]:
    position = 0
    for literal, word in zip(query.template.split("{}"), query.words, strict=False):
        position += len(literal)
        yield position, position + len(word)
        position += len(word)


def scene_rng(split: str, seed: int, index: int) -> np.random.Generator:
    """The generator that a scene is drawn from."""
    import numpy as np

    return np.random.default_rng(np.random.SeedSequence([SPLITS[split], seed, index]))


def draw_layout(rng: np.random.Generator, *, objects: tuple[int, int] = (3, 5), group: int | None = None) -> Layout:
    """Places between ``objects[0]`` and ``objects[1]`` objects that do not overlap.

    With `group`, exactly that many objects (and at least that many are placed) share a shape or a colour. Without it,
    some layouts get such a group by chance, so that counts above one are not rare.
    """
    n = int(rng.integers(objects[0], objects[1] + 1))
    if group is None and rng.random() < 0.4:
        group = int(rng.integers(2, 5))
    group = 0 if group is None else group
    n = max(n, group)
    shapes = [str(s) for s in rng.choice(SHAPES, n)]
    colours = [str(c) for c in rng.choice(COLOURS, n)]
    if group:
        names, words = (shapes, SHAPES) if rng.random() < 0.5 else (colours, COLOURS)
        common = str(rng.choice(words))
        others = [w for w in words if w != common]
        names[:] = [common] * group + [str(w) for w in rng.choice(others, n - group)]
    places = _places(rng, n)
    items = []
    for shape, colour, (x, y, radius) in zip(shapes, colours, places, strict=True):
        angle = float(rng.uniform(-0.22, 0.22))
        items.append(Item(shape, colour, x, y, radius, angle, shade(rng, colour)))
    return Layout(tuple(items), int(rng.integers(2**31)))


def _places(rng: np.random.Generator, n: int) -> list[tuple[float, float, float]]:
    while True:
        found: list[tuple[float, float, float]] = []
        for _ in range(60):
            radius = float(rng.uniform(*RADIUS))
            edge = radius * REACH + 0.012
            x, y = (float(v) for v in rng.uniform(edge, 1.0 - edge, 2))
            if all(math.hypot(x - a, y - b) > (radius + r) * REACH + _GAP for a, b, r in found):
                found.append((x, y, radius))
            if len(found) == n:
                return found


def plural(shape: str) -> str:
    """``"circle"`` to ``"circles"``, ``"cross"`` to ``"crosses"``."""
    return shape + ("es" if shape.endswith("s") else "s")


def colour_query(shape: str, colour: str, targets: tuple[int, ...]) -> Query:
    """ "What color is the star?" """
    return Query(
        kind="colour",
        question=f"What color is the {shape}?",
        template=f"The {shape} is {{}}.",
        words=(colour,),
        domains=("colour",),
        targets=(targets,),
        hidden_words=("hidden",),
        hidden_template=f"The {shape} is hidden.",
    )


def shape_query(colour: str, shape: str, targets: tuple[int, ...]) -> Query:
    """ "What shape is the red object?" """
    return Query(
        kind="shape",
        question=f"What shape is the {colour} object?",
        template=f"The {colour} object is a {{}}.",
        words=(shape,),
        domains=("shape",),
        targets=(targets,),
        hidden_words=("hidden",),
        hidden_template=f"The {colour} object is a hidden object.",
    )


def count_query(noun: tuple[str, str], number: int, targets: tuple[int, ...]) -> Query:
    """ "How many circles are there?"; `noun` is singular and plural."""
    return Query(
        kind="count",
        question=f"How many {noun[1]} are there?",
        template=f"I count {{}} {noun[0] if number == 1 else noun[1]}.",
        words=(NUMBERS[number],),
        domains=("number",),
        targets=(targets,),
        hidden_words=("no",),
        hidden_template=f"I count no {noun[1]}.",
    )


def where_query(colour: str, shape: str, row: str, column: str, targets: tuple[int, ...]) -> Query:
    """ "Where is the red square?" """
    return Query(
        kind="where",
        question=f"Where is the {colour} {shape}?",
        template=f"The {colour} {shape} is in the {{}} {{}}.",
        words=(row, column),
        domains=("row", "column"),
        targets=(targets, targets),
        hidden_words=("hidden", "hidden"),
        hidden_template=f"The {colour} {shape} is in the hidden part.",
    )


def pair_query(shapes: tuple[str, str], colours: tuple[str, str], targets: tuple[tuple[int, ...], ...]) -> Query:
    """ "What color are the star and the circle?" """
    first, second = shapes
    return Query(
        kind="pair",
        question=f"What color are the {first} and the {second}?",
        template=f"The {first} is {{}} and the {second} is {{}}.",
        words=colours,
        domains=("colour", "colour"),
        targets=targets,
        hidden_words=("hidden", "hidden"),
        hidden_template=f"The {first} is hidden and the {second} is hidden.",
    )


def cell_query(row: str, column: str, colour: str, shape: str, targets: tuple[int, ...]) -> Query:
    """ "What is in the top left?" """
    return Query(
        kind="cell",
        question=f"What is in the {row} {column}?",
        template=f"In the {row} {column} is a {{}} {{}}.",
        words=(colour, shape),
        domains=("colour", "shape"),
        targets=(targets, targets),
        hidden_words=("hidden", "object"),
        hidden_template=f"In the {row} {column} is a hidden object.",
    )


def queries(layout: Layout) -> list[Query]:
    """Every question that `layout` answers without ambiguity, in a fixed order."""
    items = layout.items
    by_shape = {s: tuple(i for i, item in enumerate(items) if item.shape == s) for s in SHAPES}
    by_colour = {c: tuple(i for i, item in enumerate(items) if item.colour == c) for c in COLOURS}
    found: list[Query] = []
    single = {s: of[0] for s, of in by_shape.items() if len(of) == 1}
    found += [colour_query(s, items[i].colour, (i,)) for s, i in single.items()]
    found += [shape_query(c, items[of[0]].shape, of) for c, of in by_colour.items() if len(of) == 1]
    found += [count_query((s, plural(s)), len(of), of) for s, of in by_shape.items() if of]
    found += [count_query((f"{c} object", f"{c} objects"), len(of), of) for c, of in by_colour.items() if of]
    for i, item in enumerate(items):
        alone = sum((other.shape, other.colour) == (item.shape, item.colour) for other in items) == 1
        if alone and item.row and item.column:
            found.append(where_query(item.colour, item.shape, item.row, item.column, (i,)))
    for first, i in single.items():
        for second, j in single.items():
            if first != second:
                found.append(pair_query((first, second), (items[i].colour, items[j].colour), ((i,), (j,))))
    for row in ROWS:
        for column in COLUMNS:
            inside = [i for i, item in enumerate(items) if _may_be_in(item, row, column)]
            if len(inside) == 1 and items[inside[0]].row and items[inside[0]].column:
                item = items[inside[0]]
                found.append(cell_query(row, column, item.colour, item.shape, (inside[0],)))
    return found


def _may_be_in(item: Item, row: str, column: str) -> bool:
    """True unless the object's centre is clearly outside the quadrant."""
    return item.row in (row, None) and item.column in (column, None)
