"""Synthetic scenes with questions, full-sentence answers and ground-truth masks.

A *layout* is a few coloured shapes in the unit square; `render` draws it at any size with anti-aliased edges on a
softly textured background; `queries` lists what can be asked about it. A `Scene` is one layout with one question.

Three rules make the scenes useful for explanation:

* The wording of an answer is a function of the question alone; only the words in its *slots* come from the image.
* Every slot knows the objects that decide it, so each visual word has a ground-truth mask of its own.
* Everything is drawn in the central square of the image, which is what a resize-and-centre-crop processor keeps.

Scene ``index`` of ``(split, seed)`` is drawn from ``SeedSequence([split number, seed, index])``: it is deterministic,
does not depend on how many scenes are asked for, and no two splits share a scene. Hard scenes have split numbers of
their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lvlm_probe._moved import names_of
from lvlm_probe.demo import hard as hard_scenes
from lvlm_probe.demo.drawing import REACH, render, shade
from lvlm_probe.demo.questions import COLOURS, NUMBERS, SHAPES, Item, Layout, Query, queries

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

__getattr__ = names_of(__name__)

KINDS: tuple[str, ...] = ("colour", "shape", "count", "where", "pair", "cell")
"""Every kind of question, in the order in which `scenes` deals them."""

HARD_KINDS: tuple[str, ...] = (*KINDS, "which")
"""The same for hard scenes."""

SPLITS: dict[str, int] = {"train": 0, "tune": 1, "eval": 2}
"""Split name to the number that starts its seed sequence; of hard scenes and of clips see `rng_of`."""

RADIUS: tuple[float, float] = (0.088, 0.150)
"""Smallest and largest object radius, as a fraction of the image's shorter side."""

_GAP = 0.022  # smallest distance between two outlines, as a fraction of the shorter side


class Posed:
    """A question about what is shown, its answer, and where in the answer the words are that decide it."""

    image: Image.Image
    question: str
    answer: str
    visual_spans: tuple[tuple[int, int], ...]

    @property
    def visual_words(self) -> tuple[str, ...]:
        """The words at `visual_spans`."""
        return tuple(self.answer[start:stop] for start, stop in self.visual_spans)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The question as chat messages for ``processor.apply_chat_template``."""
        return [{"role": "user", "content": [self.shown, {"type": "text", "text": self.question}]}]

    @property
    def shown(self) -> dict[str, Any]:
        """What is shown, as a part of a chat message."""
        return {"type": "image", "image": self.image}


@dataclass(frozen=True, eq=False)
class Scene(Posed):
    """An image, a question, and the answer that the image decides.

    `image` is RGB; `mask` is ``(H, W)`` bool, True on the objects that the answer needs; `visual_spans` are the
    ``(start, stop)`` character positions in `answer` of the words that only the image can tell, and `word_masks` are
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


def scenes(
    n: int,
    *,
    seed: int = 0,
    split: str = "eval",
    kinds: Sequence[str] | None = None,
    size: tuple[int, int] = (336, 336),
    start: int = 0,
    hard: bool = False,
) -> list[Scene]:
    """Draw `n` scenes; scene ``index`` asks a question of kind ``kinds[index % len(kinds)]``.

    `split` is ``"train"`` (whose seed 0 the demo model was trained on), ``"tune"`` or ``"eval"``; they share no scene.
    `kinds` defaults to `KINDS`. `size` is ``(width, height)`` in pixels; the objects stay in the central square, scaled
    by the shorter side. `start` is the index of the first scene. `hard` draws the scenes of `lvlm_probe.demo.hard`
    instead, which the demo model was not trained on, with one kind more (`HARD_KINDS`).

    Raises:
        ValueError: an unknown split or kind, a negative number of scenes, or an image under 32 pixels.
    """
    known = HARD_KINDS if hard else KINDS
    asked = dealt("scenes", n, start, kinds=kinds, known=known, split=split, size=size)
    return [_scene(split, seed, index, kind, size, hard) for index, kind in asked]


def dealt(
    what: str,
    n: int,
    start: int,
    *,
    kinds: Sequence[str] | None,
    known: Sequence[str],
    split: str,
    size: tuple[int, int],
    least: int = 32,
) -> list[tuple[int, str]]:
    """Number and kind of `n` scenes, clips or documents, as `what` calls them, from number `start` on.

    Raises:
        ValueError: they cannot be drawn; see `scenes`.
    """
    kinds = known if kinds is None else tuple(kinds)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    if unknown := [kind for kind in kinds if kind not in known] or not kinds:
        raise ValueError(f"unknown kinds {unknown!r}; there are {', '.join(known)}")
    if n < 0 or start < 0:
        raise ValueError(f"cannot draw {n} {what} from index {start}")
    if min(size) < least:
        raise ValueError(
            f"{what} of {size[0]}x{size[1]} pixels are too small to read; the shorter side must be >= {least}"
        )
    return [(index, kinds[index % len(kinds)]) for index in range(start, start + n)]


def _scene(split: str, seed: int, index: int, kind: str, size: tuple[int, int], hard: bool) -> Scene:
    draw_question = hard_scenes.draw_question if hard else _draw_question
    layout, query = draw_question(scene_rng(split, seed, index, hard=hard), kind)
    image, labels = render(layout, size)
    word_masks = tuple(_mask_of(labels, targets) for targets in query.targets)
    mask = _mask_of(labels, tuple(t for targets in query.targets for t in targets))
    return Scene(
        image=image,
        question=query.question,
        answer=query.answer,
        kind=kind,
        mask=mask,
        visual_spans=query.spans,
        word_masks=word_masks,
        layout=layout,
        split=split,
        seed=seed,
        index=index,
    )


def _draw_question(rng: np.random.Generator, kind: str) -> tuple[Layout, Query]:
    while True:
        group = int(rng.integers(1, 5)) if kind == "count" else None
        layout = draw_layout(rng, group=group)
        options = [q for q in queries(layout) if q.kind == kind]
        if group is not None:
            options = [q for q in options if q.words[0] == NUMBERS[group]]
        if options:
            return layout, options[int(rng.integers(len(options)))]


def _mask_of(labels: np.ndarray, targets: tuple[int, ...]) -> np.ndarray:
    import numpy as np

    return np.isin(labels, targets)


def scene_rng(split: str, seed: int, index: int, *, hard: bool = False) -> np.random.Generator:
    """The generator that a scene is drawn from."""
    return rng_of(1 if hard else 0, split, seed, index)


def rng_of(series: int, split: str, seed: int, index: int) -> np.random.Generator:
    """The generator of one scene, clip or document: series 0 are plain scenes, 1 hard ones, 2 clips, 3 documents, each
    with split numbers of its own."""
    import numpy as np

    return np.random.default_rng(np.random.SeedSequence([SPLITS[split] + series * len(SPLITS), seed, index]))


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
