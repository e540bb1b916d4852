"""Tokens of an answer and of a prompt, as servers give them."""

from __future__ import annotations

import pytest

from lvlm_probe.errors import ReplayError
from lvlm_probe.serving.messages import aligned, one_placeholder_each
from lvlm_probe.serving.roads import Untrue, log_prob_in
from lvlm_probe.words import group_words


@pytest.mark.quick
@pytest.mark.parametrize(
    ("texts", "answer", "pieces", "special"),
    [
        (["A", " cat", "."], "A cat.", ["A", " cat", "."], [0, 0, 0]),
        (["A", " cat", ""], "A cat", ["A", " cat", ""], [0, 0, 1]),
        (["A", " cat", "</s>"], "A cat", ["A", " cat", "</s>"], [0, 0, 1]),
        ([" A", " cat"], "A cat", ["A", " cat"], [0, 0]),
        (["I", " ", "\ufffd", "\ufffd", "!"], "I 🙂!", ["I", " ", "", "🙂", "!"], [0, 0, 0, 0, 0]),
        (["\ufffd", "\ufffd", ""], "é", ["", "é", ""], [0, 0, 1]),
        (["so", "\ufffd", "\ufffd"], "soé", ["so", "", "é"], [0, 0, 0]),
        (["<think>", "A"], "A", ["<think>", "A"], [1, 0]),
    ],
)
def test_pieces_make_up_the_answer(texts: list[str], answer: str, pieces: list[str], special: list[int]) -> None:
    found, flags, whole = aligned(texts, answer, stopped=True)
    assert whole and found == pieces and flags == [bool(flag) for flag in special]
    assert "".join(piece for piece, flag in zip(found, flags, strict=True) if not flag) == answer
    group_words(found, flags)


@pytest.mark.parametrize("texts", [["A", " dog"], ["A"], [], ["A", " cat", " sat"]])
def test_tokens_that_do_not_make_up_the_answer_are_told(texts: list[str]) -> None:
    _, flags, whole = aligned(texts, "A cat sat on", stopped=True)
    assert not whole and not any(flags)


@pytest.mark.parametrize(
    ("ids", "images", "short"),
    [
        ([1, 7, 7, 7, 2], 1, [1, 7, 2]),
        ([7, 7, 2, 7, 7, 3], 2, [7, 2, 7, 3]),
        ([1, 7, 7, 7, 7, 2], 2, [1, 7, 7, 2]),  # side by side
        ([1, 7, 7, 9, 7, 7, 9, 2], 1, [1, 7, 9, 2]),  # rows, with a separator after each
        ([1, 7, 7, 3, 7, 7, 4, 7, 7], 2, None),
        ([1, 2, 3], 1, None),
        ([], 1, None),
    ],
)
def test_an_images_tokens_become_one(ids: list[int], images: int, short: list[int] | None) -> None:
    assert one_placeholder_each(ids, images) == short


@pytest.mark.parametrize("value", [None, True, "-1", float("nan"), 0.7, -2.98e30, float("-inf"), [1]])
def test_what_is_no_log_probability_is_refused(value: object) -> None:
    with pytest.raises(Untrue):
        log_prob_in(value, "token 0")
    assert issubclass(Untrue, ReplayError)


def test_log_probabilities_are_taken_as_they_are() -> None:
    assert log_prob_in(-1.5, "it") == -1.5 and log_prob_in(1e-4, "it") == 0.0 and log_prob_in(-9999.0, "it") == -9999.0
