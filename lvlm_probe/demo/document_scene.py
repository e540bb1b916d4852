"""Small synthetic documents with questions, answers, and the box in which each value is printed.

A *page* is a receipt, a ruled table or a form. It has a date, two or three things with their prices, and the total of
the prices, each value with its label: beside it, or above it on a form. Where they stand, in which order, how large, on
which side the values are and in which colours is drawn at random, so that a place tells no value. The font is the one
that comes with Pillow.

==========  ================================  =============================================
kind        question                          answer (what the page decides in bold)
==========  ================================  =============================================
``date``    What is the date?                 The date is **24.03**.
``total``   What is the total?                The total is **7.45**.
``price``   What does the tea cost?           The tea costs **2.10**.
``record``  Read the date and the total.      {"date": "**24.03**", "total": "**7.45**"}
==========  ================================  =============================================

The truth of a value is the box of its figures (`DocumentScene.boxes`); which value it is, its label tells
(`DocumentScene.labels`). Document ``index`` of ``(split, seed)`` is drawn from a seed sequence of its own, as scenes
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from lvlm_probe.demo.drawing import background
from lvlm_probe.demo.questions import Query
from lvlm_probe.demo.scene import Posed, dealt, rng_of

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

DOCUMENT_KINDS: tuple[str, ...] = ("date", "total", "price", "record")
"""Every kind of question, in the order in which `documents` deals them."""

GOODS: tuple[str, ...] = ("tea", "milk", "rice", "soup", "cake", "fish", "salt", "plum")
"""What has a price."""

_CAPITAL = 0.72  # height of capitals and figures, in font sizes
_EDGE = 0.045  # least distance of print from the edge of the page, as a fraction of its side


@dataclass(frozen=True)
class Printed:
    """A text on a page. `x` is its left edge, `y` its baseline and `size` the font's, in sides of the page."""

    text: str
    name: str
    is_label: bool
    x: float
    y: float
    size: float

    @property
    def glyphs(self) -> tuple[tuple[float, float, float, float], ...]:
        """Box of each character, (left, top, right, bottom) in sides of the page."""
        ends = [self.x + width_of(self.text[:n]) * self.size for n in range(len(self.text) + 1)]
        top = self.y - _CAPITAL * self.size
        return tuple((a, top, b, self.y) for a, b in pairwise(ends))

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Its box, (left, top, right, bottom) in sides of the page."""
        return (self.x, self.y - _CAPITAL * self.size, self.x + width_of(self.text) * self.size, self.y)


@dataclass(frozen=True)
class Page:
    """A document without its pixels.

    `rules` are lines, (left, top, right, bottom) in sides of the page; `texture` seeds the table under the paper.
    """

    layout: Literal["receipt", "table", "form"]
    texts: tuple[Printed, ...]
    rules: tuple[tuple[float, float, float, float], ...]
    paper: tuple[int, int, int]
    ink: tuple[int, int, int]
    texture: int

    def find(self, name: str, *, label: bool = False) -> int:
        """Index of a value's text, or of its label's."""
        return next(k for k, text in enumerate(self.texts) if text.name == name and text.is_label == label)

    @property
    def goods(self) -> tuple[str, ...]:
        """What has a price on it."""
        return tuple(text.name for text in self.texts if text.is_label and text.name in GOODS)

    def render(self, side: int) -> Image.Image:
        """Draw it, `side` pixels wide and high."""
        import numpy as np
        from PIL import Image, ImageDraw, ImageFilter

        image = Image.fromarray(np.clip(background(self.texture, (side, side)), 0, 255).astype(np.uint8))
        edges = self._paper_edges()
        sheet = tuple(round(edge * side) for edge in edges)
        shadow = Image.new("L", (side, side))
        ImageDraw.Draw(shadow).rectangle([edge + round(0.012 * side) for edge in sheet], fill=110)
        image.paste((20, 20, 24), mask=shadow.filter(ImageFilter.BoxBlur(max(1, round(0.01 * side)))))
        pen = ImageDraw.Draw(image)
        pen.rectangle(sheet, fill=self.paper)
        faint = tuple((2 * a + b) // 3 for a, b in zip(self.paper, self.ink, strict=True))
        for rule in self.rules:
            pen.line([edge * side for edge in rule], fill=faint, width=max(1, round(0.005 * side)))
        for text in self.texts:
            place = (text.x * side, text.y * side)
            pen.text(place, text.text, font=_font(text.size * side), fill=self.ink, anchor="ls")
        return image

    def _paper_edges(self) -> tuple[float, float, float, float]:
        boxes = [text.box for text in self.texts] + list(self.rules)
        room = 0.035
        return (
            max(0.0, min(box[0] for box in boxes) - room),
            max(0.0, min(box[1] for box in boxes) - room),
            min(1.0, max(box[2] for box in boxes) + room),
            min(1.0, max(box[3] for box in boxes) + room),
        )

    def queries(self) -> list[Query]:
        """Every question that the page answers, in a fixed order."""
        date, total = (self.texts[self.find(name)].text for name in ("date", "total"))
        found = [value_query("date", date, self.find("date")), value_query("total", total, self.find("total"))]
        found += [price_query(name, self.texts[self.find(name)].text, (self.find(name),)) for name in self.goods]
        return [*found, record_query((date, total), (self.find("date"), self.find("total")))]


def value_query(name: str, value: str, target: int) -> Query:
    """ "What is the total?" """
    return Query(
        kind=name,
        question=f"What is the {name}?",
        template=f"The {name} is {{}}.",
        words=(value,),
        domains=("date" if name == "date" else "amount",),
        targets=((target,),),
        hidden_words=("hidden",),
        hidden_template=f"The {name} is hidden.",
    )


def price_query(name: str, value: str, targets: tuple[int, ...]) -> Query:
    """ "What does the tea cost?" """
    return Query(
        kind="price",
        question=f"What does the {name} cost?",
        template=f"The {name} costs {{}}.",
        words=(value,),
        domains=("amount",),
        targets=(targets,),
        hidden_words=("hidden",),
        hidden_template=f"The {name} costs hidden.",
    )


def record_query(values: tuple[str, str], targets: tuple[int, int]) -> Query:
    """ "Read the date and the total." """
    return Query(
        kind="record",
        question="Read the date and the total.",
        template='{{"date": "{}", "total": "{}"}}',
        words=values,
        domains=("date", "amount"),
        targets=((targets[0],), (targets[1],)),
        hidden_words=("hidden", "hidden"),
        hidden_template='{{"date": "hidden", "total": "hidden"}}',
    )


@dataclass(frozen=True, eq=False)
class DocumentScene(Posed):
    """A document, a question, and the answer that the document decides.

    `image` is RGB. `boxes` are, by name (``"date"``, ``"total"``, ``"tea"``, …), where each value of the page is
    printed and `labels` where its label is, (left, top, right, bottom) in pixels; `names` are those that the answer
    holds. `mask` is ``(H, W)`` bool, True in the boxes of the values that the answer holds; `visual_spans` are their
    ``(start, stop)`` character positions in `answer`, and `word_masks` the mask of each.
    """

    image: Image.Image = field(repr=False)
    question: str
    answer: str
    kind: str
    names: tuple[str, ...]
    boxes: dict[str, tuple[float, float, float, float]] = field(repr=False)
    labels: dict[str, tuple[float, float, float, float]] = field(repr=False)
    mask: np.ndarray = field(repr=False)
    visual_spans: tuple[tuple[int, int], ...]
    word_masks: tuple[np.ndarray, ...] = field(repr=False)
    page: Page = field(repr=False)
    split: str
    seed: int
    index: int


def documents(
    n: int,
    *,
    seed: int = 0,
    split: str = "eval",
    kinds: Sequence[str] | None = None,
    side: int = 480,
    start: int = 0,
) -> list[DocumentScene]:
    """Draw `n` documents; number ``index`` is asked a question of kind ``kinds[index % len(kinds)]``.

    `split` is ``"train"`` (whose seed 0 the document model was trained on), ``"tune"`` or ``"eval"``; they share no
    document. `kinds` defaults to `DOCUMENT_KINDS`. `side` is the width and height in pixels. `start` is the index of
    the first document.

    Raises:
        ValueError: an unknown split or kind, a negative number of documents, or a side under 96 pixels.
    """
    asked = dealt("documents", n, start, kinds=kinds, known=DOCUMENT_KINDS, split=split, size=(side, side), least=96)
    return [_document(split, seed, index, kind, side) for index, kind in asked]


def _document(split: str, seed: int, index: int, kind: str, side: int) -> DocumentScene:
    rng = document_rng(split, seed, index)
    page = draw_page(rng)
    options = [query for query in page.queries() if query.kind == kind]
    query = options[int(rng.integers(len(options)))]
    boxes = {text.name: _in_pixels(text, side) for text in page.texts if not text.is_label}
    names = tuple(page.texts[target].name for (target,) in query.targets)
    word_masks = tuple(_mask_of(boxes[name], side) for name in names)
    return DocumentScene(
        image=page.render(side),
        question=query.question,
        answer=query.answer,
        kind=kind,
        names=names,
        boxes=boxes,
        labels={text.name: _in_pixels(text, side) for text in page.texts if text.is_label},
        mask=sum(word_masks[1:], word_masks[0]),
        visual_spans=query.spans,
        word_masks=word_masks,
        page=page,
        split=split,
        seed=seed,
        index=index,
    )


def _in_pixels(text: Printed, side: int) -> tuple[float, float, float, float]:
    left, top, right, bottom = text.box
    return (left * side, top * side, right * side, bottom * side)


def _mask_of(box: tuple[float, float, float, float], side: int) -> np.ndarray:
    """The pixels whose centre is in a box, ``(side, side)`` bool."""
    import numpy as np

    centres = np.arange(side) + 0.5
    across = (box[0] <= centres) & (centres <= box[2])
    down = (box[1] <= centres) & (centres <= box[3])
    return np.asarray(down[:, None] & across[None])


def document_rng(split: str, seed: int, index: int) -> np.random.Generator:
    """The generator that a document is drawn from."""
    return rng_of(3, split, seed, index)


@lru_cache(maxsize=4096)
def width_of(text: str) -> float:
    """Width of a text in font sizes."""
    return float(_font(200).getlength(text)) / 200


@lru_cache(maxsize=8)
def _font(size: float) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


# ------------------------------------------------------------------------------------------------------------- drawing


def draw_page(rng: np.random.Generator) -> Page:
    """Draw a page at random."""
    layout: Literal["receipt", "table", "form"] = ("receipt", "table", "form")[int(rng.integers(3))]
    goods = [str(name) for name in rng.permutation(GOODS)[: 2 if layout == "form" else int(rng.integers(2, 4))]]
    values = {"date": f"{rng.integers(1, 29):02}.{rng.integers(1, 13):02}", **_prices(rng, goods)}
    place = {"receipt": _receipt, "table": _table, "form": _form}[layout]
    texts, rules = place(rng, goods, values)
    paper = tuple(int(v) for v in 255 - rng.integers(0, 22, 3))
    ink = tuple(int(v) for v in rng.integers(0, 80, 3))
    return Page(layout, tuple(texts), tuple(rules), paper, ink, int(rng.integers(2**31)))  # type: ignore[arg-type]


def _prices(rng: np.random.Generator, goods: Sequence[str]) -> dict[str, str]:
    """A total below 10.00, parted among the goods."""
    import numpy as np

    total = int(rng.integers(300, 1000))
    cuts = np.sort(rng.choice(np.arange(20, total - 20), len(goods) - 1, replace=False))
    parts = np.diff([0, *cuts, total])
    return {name: f"{cents / 100:.2f}" for name, cents in zip([*goods, "total"], [*parts, total], strict=True)}


_Placed = tuple[list[Printed], list[tuple[float, float, float, float]]]


def _receipt(rng: np.random.Generator, goods: Sequence[str], values: dict[str, str]) -> _Placed:
    """Labels on the left, values flush right, the total after the goods below a rule."""
    rows = [*goods, "total"]
    rows = ["date", *rows] if rng.random() < 0.5 else [*rows, "date"]
    size, tops, (left, right) = _lines(rng, rows, values, least=0.115, gap=0.05)
    texts = []
    for name, y in zip(rows, tops, strict=True):
        texts.append(Printed(name.upper(), name, True, left, y, size))
        texts.append(Printed(values[name], name, False, right - width_of(values[name]) * size, y, size))
    above = tops[rows.index("total")] - _CAPITAL * size - 0.45 * (tops[1] - tops[0] - _CAPITAL * size)
    return texts, [(left, above, right, above)]


def _table(rng: np.random.Generator, goods: Sequence[str], values: dict[str, str]) -> _Placed:
    """Ruled rows in any order, the values on either side."""
    rows = [str(name) for name in rng.permutation([*goods, "total", "date"])]
    size, tops, (left, right) = _lines(rng, rows, values, least=0.11, gap=0.08)
    labels, figures = (max(width_of(text) * size for text in of) for of in
                       ([name.upper() for name in rows], [values[name] for name in rows]))  # fmt: skip
    first = rng.random() < 0.5  # the values stand first
    middle = (left + (figures if first else labels) + right - (labels if first else figures)) / 2
    texts = []
    for name, y in zip(rows, tops, strict=True):
        start = right - labels if first else left
        texts.append(Printed(name.upper(), name, True, start, y, size))
        texts.append(Printed(values[name], name, False, left if first else right - figures, y, size))
    pitch, lift = tops[1] - tops[0], (tops[1] - tops[0] - _CAPITAL * size) / 2
    lines = [y + lift for y in [tops[0] - pitch, *tops]]
    out = 0.02
    rules = [(left - out, y, right + out, y) for y in lines]
    rules += [(x, lines[0], x, lines[-1]) for x in (left - out, middle, right + out)]
    return texts, rules


def _form(rng: np.random.Generator, goods: Sequence[str], values: dict[str, str]) -> _Placed:
    """Two by two cells in any order, the label above the value."""
    names = [str(name) for name in rng.permutation([*goods, "total", "date"])]
    size = float(rng.uniform(0.105, 0.125))
    width, height = 0.44, float(rng.uniform(0.34, 0.42))
    left = float(rng.uniform(_EDGE, 1 - _EDGE - 2 * width))
    top = float(rng.uniform(_EDGE, 1 - _EDGE - 2 * height))
    texts = []
    rules = [(left, top + k * height, left + 2 * width, top + k * height) for k in range(3)]
    rules += [(left + k * width, top, left + k * width, top + 2 * height) for k in range(3)]
    for number, name in enumerate(names):
        x, y = left + (number % 2) * width + 0.025, top + (number // 2) * height
        room = width - 0.05 - width_of(values[name]) * size
        texts.append(Printed(name.upper(), name, True, x, y + 0.44 * height, size))
        texts.append(Printed(values[name], name, False, x + float(rng.uniform(0, room)), y + 0.87 * height, size))
    return texts, rules


def _lines(
    rng: np.random.Generator, rows: Sequence[str], values: dict[str, str], *, least: float, gap: float
) -> tuple[float, list[float], tuple[float, float]]:
    """Font size, baselines, and left and right edge of rows that hold a label and a value each."""
    labels = max(width_of(name.upper()) for name in rows)
    figures = max(width_of(values[name]) for name in rows)
    free = 1 - 2 * _EDGE
    size = float(rng.uniform(least, min(0.14, (free - gap) / (labels + figures))))
    pitch = float(rng.uniform(1.12 * size, min(0.21, (free - _CAPITAL * size) / (len(rows) - 1))))
    top = float(rng.uniform(_EDGE, 1 - _EDGE - _CAPITAL * size - pitch * (len(rows) - 1)))
    width = float(rng.uniform((labels + figures) * size + gap, free))
    left = float(rng.uniform(_EDGE, 1 - _EDGE - width))
    return size, [top + _CAPITAL * size + k * pitch for k in range(len(rows))], (left, left + width)
