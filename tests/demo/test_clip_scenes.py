"""The demo's clips: drawn by their number, answered by their pixels, with the truth where and when it is."""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from lvlm_probe import demo
from lvlm_probe.demo import clip_scene as scenery
from lvlm_probe.demo.questions import WAYS


@pytest.fixture(scope="module")
def drawn() -> list[demo.ClipScene]:
    return demo.clips(40, split="tune")


def of_kind(drawn: Sequence[demo.ClipScene], kind: str) -> list[demo.ClipScene]:
    return [clip for clip in drawn if clip.kind == kind]


def same(first: demo.ClipScene, second: demo.ClipScene) -> bool:
    return first.question == second.question and bool((first.pixels == second.pixels).all())


def test_a_clip_depends_on_its_number_alone(drawn: list[demo.ClipScene]) -> None:
    assert all(same(again, drawn[3 + k]) for k, again in enumerate(demo.clips(2, split="tune", start=3)))
    others = [
        demo.clips(1, **{"split": "tune", **other})[0] for other in ({"split": "eval"}, {"seed": 1}, {"start": 4})
    ]
    assert not any(same(drawn[0], other) for other in others)


def test_every_kind_comes_in_turn(drawn: list[demo.ClipScene]) -> None:
    assert [clip.kind for clip in drawn[:4]] == list(demo.CLIP_KINDS)
    assert {word for clip in of_kind(demo.clips(60, split="tune", kinds=["direction"]), "direction")
            for word in clip.visual_words} == set(WAYS)  # fmt: skip


def test_words_are_where_they_are_said_to_be(drawn: list[demo.ClipScene]) -> None:
    for clip in drawn:
        assert clip.visual_words and all(word.isalpha() for word in clip.visual_words)
        assert len(clip.visual_words) == (1 if clip.kind in ("direction", "colour") else 2)
        assert clip.mask.shape == (8, 84, 84)
        assert clip.mask.any()
        assert np.array_equal(clip.moments, [frame.any() for frame in clip.mask])


def centre(mask: np.ndarray) -> np.ndarray:
    """(col, row) of the middle of a frame's mask."""
    return np.argwhere(mask).mean(0)[::-1]


def test_what_moves_goes_where_the_answer_says(drawn: list[demo.ClipScene]) -> None:
    towards = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    for clip in of_kind(drawn, "direction"):
        moments = np.flatnonzero(clip.moments)
        steps = [centre(clip.mask[b]) - centre(clip.mask[a]) for a, b in itertools.pairwise(moments)]
        assert len(steps) >= 3
        assert all(step @ towards[clip.visual_words[0]] > 3 for step in steps)  # pixels, from each frame to the next
        assert all(abs(step @ towards[clip.visual_words[0]][::-1]) < 1.5 for step in steps)


def named_colour(pixels: np.ndarray) -> str:
    """The color whose hue is nearest to the pixels' mean."""
    hues = {"red": 0.99, "yellow": 0.138, "green": 0.345, "cyan": 0.502, "blue": 0.617, "purple": 0.775}
    hue = colorsys.rgb_to_hsv(*(pixels.mean(0) / 255))[0]
    return min(hues, key=lambda name: abs((hue - hues[name] + 0.5) % 1 - 0.5))


def test_the_truth_has_the_colour_of_the_answer_and_nothing_else_of_the_object_has(drawn: list[demo.ClipScene]) -> None:
    for clip in of_kind(drawn, "colour"):
        place = clip.mask.any(0)
        for frame, needed in enumerate(clip.moments):
            assert (named_colour(clip.pixels[frame][place]) == clip.visual_words[0]) == bool(needed)
        assert clip.moments[0] == clip.question.endswith("first?")


def test_what_appears_was_not_there_before(drawn: list[demo.ClipScene]) -> None:
    for clip in of_kind(drawn, "appearance"):
        there = clip.moments
        assert list(there) == sorted(there, reverse="vanishes" in clip.question)
        assert 0 < there.sum() < 8
        place = clip.mask.any(0)
        with_it, without = clip.pixels[there][0][place], clip.pixels[~there][0][place]
        assert named_colour(with_it) == clip.visual_words[0]
        assert np.abs(with_it.astype(int) - without.astype(int)).mean() > 15


def test_an_order_needs_both_objects_and_reverses_when_played_backwards(drawn: list[demo.ClipScene]) -> None:
    for clip in of_kind(drawn, "order"):
        first, last = (np.flatnonzero(clip.moments)[k] for k in (0, -1))
        wanted = first if "first" in clip.question else last
        assert named_colour(clip.pixels[wanted][clip.mask[wanted]]) == clip.visual_words[0]
        assert not (clip.mask[first] & clip.mask[last]).any()
        ways = [
            {q.question: q.words for q in scenery.order_queries(film)} for film in (clip.film, clip.film.reversed())
        ]
        forth, back = ways
        assert (forth["What comes first?"], forth["What comes last?"]) == (
            back["What comes last?"],
            back["What comes first?"],
        )


def test_a_flip_turns_left_into_right_and_playing_backwards_turns_every_way(drawn: list[demo.ClipScene]) -> None:
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for clip in of_kind(drawn, "direction"):
        (way,) = clip.visual_words

        def said(film: scenery.Film, question: str = clip.question) -> str:
            return next(query.words[0] for query in scenery.film_queries(film) if query.question == question)

        assert said(clip.film) == way
        assert said(clip.film.mirrored()) == (opposite[way] if way in ("left", "right") else way)
        assert said(clip.film.reversed()) == opposite[way]


def test_no_frame_alone_has_a_direction_or_an_order(drawn: list[demo.ClipScene]) -> None:
    for clip in drawn:
        for frame in range(8):
            asked = scenery.film_queries(clip.film.frozen(frame))
            assert {query.kind for query in asked} <= {"direction", "colour"}
            assert all(query.words == ("nowhere",) for query in asked if query.kind == "direction")


def test_nothing_hides_what_the_answer_needs(drawn: list[demo.ClipScene]) -> None:
    for clip in drawn:
        areas = [int(frame.sum()) for frame in clip.mask if frame.any()]
        if clip.kind != "order":  # one object: as large in every frame, to an outline's pixels
            assert max(areas) - min(areas) < 0.12 * max(areas)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"split": "test"}, "unknown split 'test'"),
        ({"kinds": ["count"]}, r"unknown kinds \['count'\]; there are direction"),
        ({"size": (20, 90)}, "too small"),
        ({"start": -1}, "cannot draw"),
    ],
)
def test_what_cannot_be_drawn_is_said(asked: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.clips(1, **asked)  # type: ignore[arg-type]
