"""Questions about a layout of objects, with the answer's words and the objects that decide each of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS: tuple[str, ...] = ("red", "yellow", "green", "cyan", "blue", "purple")
NUMBERS: tuple[str, ...] = ("no", "one", "two", "three", "four", "five")
ROWS: tuple[str, ...] = ("top", "bottom")
COLUMNS: tuple[str, ...] = ("left", "right")
WAYS: tuple[str, ...] = ("left", "right", "up", "down")

DOMAINS: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "number": NUMBERS[1:],
    "row": ROWS,
    "column": COLUMNS,
    "way": (*WAYS, "nowhere"),
}
"""The words that a slot of each domain can hold."""

_AXIS_MARGIN = 0.07  # an object nearer than this to a centre line has no well-defined quadrant


@dataclass(frozen=True)
class Item:
    """One object. `x`, `y` and `radius` are fractions of the central square's side, y downwards; `angle` in radians.

    Its colour is `rgb`, of which a share ``1 - contrast`` is replaced by the ground's.
    """

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[float, float, float]
    contrast: float = 1.0

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
    """Objects without their pixels, later ones in front.

    `texture` seeds the ground; `pattern` is how far its weave departs from the mean, in levels of 255.
    """

    items: tuple[Item, ...]
    texture: int
    pattern: float = 0.0

    def mirrored(self) -> Layout:
        """The layout as a left-right flip of its image shows it."""
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

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """``(start, stop)`` of each slot's word in the characters of `answer`."""
        found: list[tuple[int, int]] = []
        position = 0
        for literal, word in zip(self.template.split("{}"), self.words, strict=False):
            position += len(literal.format())  # of doubled braces one
            found.append((position, position + len(word)))
            position += len(word)
        return tuple(found)


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
            inside = [i for i, item in enumerate(items) if may_be_in(item, row, column)]
            if len(inside) == 1 and items[inside[0]].row and items[inside[0]].column:
                item = items[inside[0]]
                found.append(cell_query(row, column, item.colour, item.shape, (inside[0],)))
    return found


def may_be_in(item: Item, row: str, column: str) -> bool:
    """True unless the object's centre is clearly outside the quadrant."""
    return item.row in (row, None) and item.column in (column, None)
