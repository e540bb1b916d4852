"""Short synthetic clips with questions, full-sentence answers and ground truth in space and time.

A *film* is two or three of the scenes' coloured shapes, each with what it does in every frame: one moves, appears,
vanishes or changes its color, two come and go one after the other, the others stand still. `film_queries` lists what
can be asked about it; a `ClipScene` is one film, drawn, with one question. The three rules of `lvlm_probe.demo.scene`
hold, and one more: no frame alone tells the answer of a ``direction`` or an ``order``.

The truth of a question is the object that decides it, in the frames that do:

=============  ======================================  ====================================================
kind           question                                truth
=============  ======================================  ====================================================
``direction``  Which way does the star move?           the star, from where it starts to where it stops
``appearance`` What appears? / What vanishes?          what appears, or vanishes, as long as it is there
``colour``     What color is the star at first? / at   the star, before its color changes / after that
               last?
``order``      What comes first? / What comes last?    both objects that come and go, as long as they are there
=============  ======================================  ====================================================

That something is *not* there has no pixels, so the frames before it appears are no part of the truth.

Clip ``index`` of ``(split, seed)`` is drawn from a seed sequence of its own, as scenes are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lvlm_probe.demo.drawing import REACH, render_frames, shade
from lvlm_probe.demo.questions import COLOURS, SHAPES, WAYS, Item, Layout, Query
from lvlm_probe.demo.scene import Posed, dealt, rng_of

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

CLIP_KINDS: tuple[str, ...] = ("direction", "appearance", "colour", "order")
"""Every kind of question, in the order in which `clips` deals them."""

FRAMES = 8

_RADIUS = (0.115, 0.155)
_GAP = 0.03  # smallest distance between the reaches of two objects, at any time, as a fraction of the shorter side
_WAY = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_DISTANCE = (0.34, 0.60)  # how far an object moves, as a fraction of the shorter side


@dataclass(frozen=True)
class Track:
    """One object over time: what each frame shows of it, ``None`` where it is not there."""

    items: tuple[Item | None, ...]

    @property
    def shown(self) -> tuple[int, ...]:
        """The frames in which it is there."""
        return tuple(frame for frame, item in enumerate(self.items) if item is not None)

    @property
    def any(self) -> Item:
        """It, as the first frame that has it shows it."""
        return next(item for item in self.items if item is not None)

    @property
    def comes(self) -> str:
        """``"always"`` there, ``"appears"``, ``"vanishes"``, or ``"briefly"`` there."""
        if len(self.shown) == len(self.items):
            return "always"
        first, last = self.items[0] is not None, self.items[-1] is not None
        return {(False, True): "appears", (True, False): "vanishes"}.get((first, last), "briefly")

    @property
    def moves(self) -> tuple[int, ...]:
        """The frames from where it starts to move to where it stops."""
        places = [(item.x, item.y) if item else None for item in self.items]
        changed = [k for k in self.shown[1:] if places[k - 1] is not None and places[k] != places[k - 1]]
        return tuple(range(changed[0] - 1, changed[-1] + 1)) if changed else ()

    @property
    def way(self) -> str:
        """One of ``WAYS``, or ``"nowhere"``."""
        first, last = self.items[self.shown[0]], self.items[self.shown[-1]]
        assert first is not None
        assert last is not None
        across, down = last.x - first.x, last.y - first.y
        if across == down == 0:
            return "nowhere"
        if abs(across) > abs(down):
            return "right" if across > 0 else "left"
        return "down" if down > 0 else "up"


@dataclass(frozen=True)
class Film:
    """Objects over time, without their pixels. `texture` seeds the ground."""

    tracks: tuple[Track, ...]
    texture: int

    @property
    def frames(self) -> int:
        return len(self.tracks[0].items)

    def layout(self, frame: int) -> Layout:
        """What a frame shows."""
        return Layout(tuple(item for track in self.tracks if (item := track.items[frame])), self.texture)

    def render(self, size: tuple[int, int]) -> tuple[list[Image.Image], np.ndarray]:
        """Draw it.

        Returns the frames and, ``(t, H, W)`` int8, the number of the track that covers a pixel, or -1.
        """
        import numpy as np

        images: list[Image.Image] = []
        covers = []
        drawn = render_frames([self.layout(frame) for frame in range(self.frames)], size)
        for frame, (image, labels) in enumerate(drawn):
            there = [number for number, track in enumerate(self.tracks) if track.items[frame]]
            images.append(image)
            covers.append(np.asarray([*there, -1], dtype=np.int8)[labels])  # -1, no object, is the last
        return images, np.stack(covers)

    def mirrored(self) -> Film:
        """The film as a left-right flip of its frames shows it."""
        flipped = ((item and replace(item, x=1.0 - item.x, angle=-item.angle) for item in t.items) for t in self.tracks)
        return replace(self, tracks=tuple(Track(tuple(items)) for items in flipped))

    def reversed(self) -> Film:
        """The film played backwards."""
        return replace(self, tracks=tuple(Track(track.items[::-1]) for track in self.tracks))

    def frozen(self, frame: int) -> Film:
        """One frame all the time."""
        there = [track.items[frame] for track in self.tracks if track.items[frame]]
        return replace(self, tracks=tuple(Track((item,) * self.frames) for item in there))


@dataclass(frozen=True)
class ClipQuery(Query):
    """One question about a film; `targets` are numbers of tracks.

    Attributes:
        frames: track → the frames in which it decides the answer.
    """

    frames: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ClipScene(Posed):
    """A clip, a question, and the answer that the clip decides.

    `frames` are RGB; `mask` is ``(t, H, W)`` bool, True on the objects that the answer needs in the frames in which it
    needs them; `visual_spans` are the ``(start, stop)`` character positions in `answer` of the words that only the clip
    can tell.
    """

    frames: list[Image.Image] = field(repr=False)
    question: str
    answer: str
    kind: str
    mask: np.ndarray = field(repr=False)
    visual_spans: tuple[tuple[int, int], ...]
    film: Film = field(repr=False)
    split: str
    seed: int
    index: int

    @property
    def moments(self) -> np.ndarray:
        """``(t,)`` bool, the frames that the answer needs."""
        import numpy as np

        return np.asarray(self.mask.any((1, 2)))

    @property
    def pixels(self) -> np.ndarray:
        """The frames as one array, ``(t, H, W, 3)`` uint8."""
        import numpy as np

        return np.stack([np.asarray(frame) for frame in self.frames])

    @property
    def shown(self) -> dict[str, Any]:
        """The clip, as a part of a chat message."""
        return {"type": "video", "video": self.pixels}


def clips(
    n: int,
    *,
    seed: int = 0,
    split: str = "eval",
    kinds: Sequence[str] | None = None,
    size: tuple[int, int] = (84, 84),
    start: int = 0,
) -> list[ClipScene]:
    """Draw `n` clips of eight frames; clip ``index`` asks a question of kind ``kinds[index % len(kinds)]``.

    `split` is ``"train"`` (whose seed 0 the video model was trained on), ``"tune"`` or ``"eval"``; they share no clip.
    `kinds` defaults to `CLIP_KINDS`. `size` is ``(width, height)`` in pixels; the objects stay in the central square,
    scaled by the shorter side. `start` is the index of the first clip.

    Raises:
        ValueError: an unknown split or kind, a negative number of clips, or frames under 32 pixels.
    """
    asked = dealt("clips", n, start, kinds=kinds, known=CLIP_KINDS, split=split, size=size)
    return [_clip(split, seed, index, kind, size) for index, kind in asked]


def _clip(split: str, seed: int, index: int, kind: str, size: tuple[int, int]) -> ClipScene:
    rng = clip_rng(split, seed, index)
    film = draw_film(rng, kind=kind)
    options = [query for query in film_queries(film) if query.kind == kind and query.words != ("nowhere",)]
    if kind == "colour":  # of what does not change there is nothing to tell apart
        options = [query for query in options if len(query.frames[query.targets[0][0]]) < film.frames]
    query = options[int(rng.integers(len(options)))]
    images, labels = film.render(size)
    return ClipScene(
        frames=images,
        question=query.question,
        answer=query.answer,
        kind=kind,
        mask=truth(query, labels),
        visual_spans=query.spans,
        film=film,
        split=split,
        seed=seed,
        index=index,
    )


def truth(query: ClipQuery, labels: np.ndarray) -> np.ndarray:
    """Where and when the answer is decided, ``(t, H, W)`` bool, from the label maps of ``Film.render``."""
    import numpy as np

    mask = np.zeros(labels.shape, dtype=bool)
    for track, frames in query.frames.items():
        mask[list(frames)] |= labels[list(frames)] == track
    return mask


def clip_rng(split: str, seed: int, index: int) -> np.random.Generator:
    """The generator that a clip is drawn from."""
    return rng_of(2, split, seed, index)


def draw_film(rng: np.random.Generator, *, kind: str, objects: tuple[int, int] = (2, 3)) -> Film:
    """A film of which a question of a kind can be asked; its objects never touch each other."""
    count = int(rng.integers(objects[0], objects[1] + 1))
    if kind == "order":
        roles = ["earlier", "later", "still"][: max(2, count)]
    else:
        wanted = {"direction": "mover", "appearance": str(rng.choice(("appearer", "vanisher"))), "colour": "changer"}
        others = [role for role in ("mover", "appearer", "vanisher", "changer", "still") if role != wanted[kind]]
        roles = [wanted[kind], *(str(role) for role in rng.permutation(others)[: count - 1])]
    shapes = [str(shape) for shape in rng.permutation(SHAPES)[: len(roles)]]
    colours = [str(colour) for colour in rng.choice(COLOURS, len(roles))]
    routes = _routes(rng, roles)
    brief = _moments(rng)
    tracks = []
    for role, shape, colour, ((start, stop), radius) in zip(roles, shapes, colours, routes, strict=True):
        item = Item(shape, colour, *start, radius, float(rng.uniform(-0.22, 0.22)), shade(rng, colour))
        tracks.append(Track(_acted(rng, role, item, stop, brief)))
    order = rng.permutation(len(tracks))
    return Film(tuple(tracks[int(number)] for number in order), int(rng.integers(2**31)))


_Place = tuple[float, float]


def _routes(rng: np.random.Generator, roles: Sequence[str]) -> list[tuple[tuple[_Place, _Place], float]]:
    """For each object where it starts and stops, and its radius; no two come near each other on the way."""
    while True:
        found: list[tuple[tuple[_Place, _Place], float]] = []
        for _ in range(80):
            radius = float(rng.uniform(*_RADIUS))
            low = radius * REACH + 0.012
            start = tuple(float(v) for v in rng.uniform(low, 1.0 - low, 2))
            stop = start
            if roles[len(found)] == "mover":
                across, down = _WAY[WAYS[int(rng.integers(4))]]
                far = float(rng.uniform(*_DISTANCE))
                stop = (start[0] + across * far, start[1] + down * far)
            inside = all(low <= value <= 1.0 - low for value in stop)
            route = ((start[0], start[1]), (stop[0], stop[1]))
            if inside and all(_apart(route, other) > (radius + r) * REACH + _GAP for other, r in found):
                found.append((route, radius))
            if len(found) == len(roles):
                return found


def _apart(first: tuple[_Place, _Place], second: tuple[_Place, _Place]) -> float:
    """Distance between two routes, at most one of which is longer than a point."""
    longer, point = (first, second) if math.dist(*first) > 0 else (second, first)
    (ax, ay), (bx, by) = longer
    px, py = point[0]
    squared = (bx - ax) ** 2 + (by - ay) ** 2
    along = 0.0 if squared == 0 else min(1.0, max(0.0, ((px - ax) * (bx - ax) + (py - ay) * (by - ay)) / squared))
    return math.hypot(px - ax - along * (bx - ax), py - ay - along * (by - ay))


def _moments(rng: np.random.Generator) -> tuple[range, range]:
    """When the earlier and the later of two objects are there, two or three frames each."""
    first, second = (int(v) for v in rng.integers(2, 4, 2))
    start = int(rng.integers(0, FRAMES - first - second + 1))
    then = int(rng.integers(start + first, FRAMES - second + 1))
    return range(start, start + first), range(then, then + second)


def _acted(
    rng: np.random.Generator, role: str, item: Item, stop: _Place, brief: tuple[range, range]
) -> tuple[Item | None, ...]:
    """What an object does in each frame."""
    if role in ("earlier", "later"):
        there = brief[role == "later"]
        return tuple(item if frame in there else None for frame in range(FRAMES))
    if role == "appearer":
        since = int(rng.integers(2, FRAMES - 2))
        return tuple(item if frame >= since else None for frame in range(FRAMES))
    if role == "vanisher":
        until = int(rng.integers(3, FRAMES - 1))
        return tuple(item if frame < until else None for frame in range(FRAMES))
    if role == "changer":
        since = int(rng.integers(2, FRAMES - 1))
        colour = str(rng.choice([c for c in COLOURS if c != item.colour]))
        after = replace(item, colour=colour, rgb=shade(rng, colour))
        return tuple(after if frame >= since else item for frame in range(FRAMES))
    if role == "mover":
        steps = int(rng.integers(3, FRAMES))
        begin = int(rng.integers(0, FRAMES - steps))
        done = [min(1.0, max(0.0, (frame - begin) / steps)) for frame in range(FRAMES)]
        return tuple(replace(item, x=item.x + d * (stop[0] - item.x), y=item.y + d * (stop[1] - item.y)) for d in done)
    return (item,) * FRAMES


def direction_query(shape: str, way: str, targets: tuple[int, ...], frames: Mapping[int, tuple[int, ...]]) -> ClipQuery:
    """ "Which way does the star move?" """
    return ClipQuery(
        kind="direction",
        question=f"Which way does the {shape} move?",
        template=f"The {shape} moves {{}}.",
        words=(way,),
        domains=("way",),
        targets=(targets,),
        hidden_words=("somewhere",),
        hidden_template=f"The {shape} moves somewhere.",
        frames=frames,
    )


def colour_query(
    shape: str, end: str, colour: str, targets: tuple[int, ...], frames: Mapping[int, tuple[int, ...]]
) -> ClipQuery:
    """ "What color is the star at first?"; `end` is ``"first"`` or ``"last"``."""
    return ClipQuery(
        kind="colour",
        question=f"What color is the {shape} at {end}?",
        template=f"The {shape} is {{}} at {end}.",
        words=(colour,),
        domains=("colour",),
        targets=(targets,),
        hidden_words=("hidden",),
        hidden_template=f"The {shape} is hidden at {end}.",
        frames=frames,
    )


def appearance_query(
    verb: str, item: tuple[str, str], targets: tuple[int, ...], frames: Mapping[int, tuple[int, ...]]
) -> ClipQuery:
    """ "What appears?"; `verb` is ``"appears"`` or ``"vanishes"``, `item` color and shape."""
    return ClipQuery(
        kind="appearance",
        question=f"What {verb}?",
        template=f"A {{}} {{}} {verb}.",
        words=item,
        domains=("colour", "shape"),
        targets=(targets, targets),
        hidden_words=("hidden", "object"),
        hidden_template=f"A hidden object {verb}.",
        frames=frames,
    )


def order_query(
    end: str, item: tuple[str, str], targets: tuple[int, ...], frames: Mapping[int, tuple[int, ...]]
) -> ClipQuery:
    """ "What comes first?"; `end` is ``"first"`` or ``"last"``, `item` color and shape."""
    return ClipQuery(
        kind="order",
        question=f"What comes {end}?",
        template=f"{end.capitalize()} comes a {{}} {{}}.",
        words=item,
        domains=("colour", "shape"),
        targets=(targets, targets),
        hidden_words=("hidden", "object"),
        hidden_template=f"{end.capitalize()} comes a hidden object.",
        frames=frames,
    )


def film_queries(film: Film) -> list[ClipQuery]:
    """Every question that a film answers without ambiguity, in a fixed order."""
    found: list[ClipQuery] = []
    coming: dict[str, list[int]] = {}
    for number, track in enumerate(film.tracks):
        coming.setdefault(track.comes, []).append(number)
    for number in coming.get("always", ()):
        track = film.tracks[number]
        found.append(direction_query(track.any.shape, track.way, (number,), {number: track.moves or track.shown}))
        for end, item in (("first", track.items[0]), ("last", track.items[-1])):
            assert item is not None
            alike = tuple(k for k in track.shown if (it := track.items[k]) and it.colour == item.colour)
            found.append(colour_query(item.shape, end, item.colour, (number,), {number: alike}))
    for verb in ("appears", "vanishes"):
        if len(coming.get(verb, ())) == 1 and "briefly" not in coming:
            (number,) = coming[verb]
            track = film.tracks[number]
            named = (track.any.colour, track.any.shape)
            found.append(appearance_query(verb, named, (number,), {number: track.shown}))
    return found + order_queries(film)


def order_queries(film: Film) -> list[ClipQuery]:
    """Of a film in which two objects come and go, and nothing else does."""
    gone = [number for number, track in enumerate(film.tracks) if track.comes != "always"]
    if len(gone) != 2:
        return []
    earlier, later = sorted(gone, key=lambda number: film.tracks[number].shown)
    if film.tracks[earlier].shown[-1] >= film.tracks[later].shown[0]:
        return []
    frames = {number: film.tracks[number].shown for number in gone}
    items = {"first": film.tracks[earlier].any, "last": film.tracks[later].any}
    return [order_query(end, (item.colour, item.shape), tuple(gone), frames) for end, item in items.items()]
