"""Selection of tokens: Eq. 6 against hand-computed values, words and spans, options, and the reasons for an empty K."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from toy_replay import ToyReplay

from lvlm_probe.errors import SelectionError
from lvlm_probe.selection import STOP_WORDS, TokenSelection, select_tokens, word_llr

TOKENS = [" The", " cro", "issant", " is", " red", ",", " not", " covered", ".", "</s>"]
SPECIAL = [False] * 9 + [True]
ORIGINAL = [0.9, 0.8, 0.99, 0.99, 0.7, 0.99, 0.6, 0.9, 0.99, 0.999]
BASE = [0.3, 0.1, 0.98, 0.9, 0.01, 0.99, 0.5, 0.2, 0.9, 0.001]


@pytest.fixture
def replay() -> ToyReplay:
    weights = torch.full((len(TOKENS), 4, 4), 1 / 16)
    return ToyReplay(weights, original=ORIGINAL, base=BASE, tokens=TOKENS, special=SPECIAL)


@pytest.mark.quick
def test_llr_is_the_difference_of_log_probabilities(replay: ToyReplay) -> None:
    selection = select_tokens(replay)
    by_hand = [math.log(p) - math.log(q) for p, q in zip(ORIGINAL, BASE, strict=True)]
    assert selection.llr == pytest.approx(by_hand, abs=1e-6)
    # ln(.9/.3)=1.099, ln(.8/.1)=2.079, ln(.7/.01)=4.248, ln(.9/.2)=1.504 exceed 1; </s> (6.9) is special.
    assert selection.indices == (0, 1, 4, 7)
    assert selection.rule == "llr"
    assert selection.skipped == {9: "special token '</s>'"}
    assert list(selection) == [0, 1, 4, 7]
    assert len(selection) == 4


def test_threshold_is_exclusive(replay: ToyReplay) -> None:
    exact = float(replay.llr[1])
    assert 1 not in select_tokens(replay, alpha=exact)
    assert 1 in select_tokens(replay, alpha=exact - 1e-6)
    assert select_tokens(replay, alpha=2.0).indices == (1, 4)


def test_joint_takes_all_but_special_tokens(replay: ToyReplay) -> None:
    selection = select_tokens(replay, rule="joint")
    assert selection.indices == tuple(range(9))
    assert 9 in selection.skipped


def test_skip_first_and_stop_words_say_why(replay: ToyReplay) -> None:
    selection = select_tokens(replay, skip_first=True)
    assert selection.indices == (1, 4, 7)
    assert selection.skipped[0] == "first token of the answer"
    by_text = select_tokens(replay, stop_words=True)
    assert by_text.indices == (1, 4, 7)
    assert by_text.skipped[0] == "stop word 'The'"
    own = select_tokens(replay, stop_words={"Croissant", "RED"})
    assert own.indices == (0, 7)
    assert own.skipped[1] == "stop word 'croissant'"
    assert select_tokens(replay, stop_words=None).indices == (0, 1, 4, 7)
    assert "red" not in STOP_WORDS


@pytest.mark.parametrize(
    ("words", "indices"),
    [
        ("red", (4,)),
        ("RED", (4,)),
        ("croissant", (1, 2)),
        ("the croissant", (0, 1, 2)),
        ("is  red", (3, 4)),
        (["red", "covered"], (4, 7)),
        ("red, not", (4, 5, 6)),
        (".", (8,)),
    ],
)
def test_words_become_tokens(replay: ToyReplay, words: str | list[str], indices: tuple[int, ...]) -> None:
    selection = select_tokens(replay, words=words)
    assert selection.indices == indices
    assert selection.rule == "words"


def test_every_occurrence_of_a_word_and_no_part_of_a_longer_one() -> None:
    tokens = ["red", " and", " covered", " in", " red", "dish", " red."]
    replay = ToyReplay(torch.full((7, 2, 2), 0.25), original=[0.9] * 7, base=[0.1] * 7, tokens=tokens)
    assert select_tokens(replay, words="red").indices == (0, 6)


@pytest.mark.parametrize(
    ("tokens", "phrase", "indices"),
    [
        (["3", ".", "5", " or", " 3"], "3", (4,)),  # another number
        (["1", ",", "000", " at", " 12", ":", "30", " 30"], "30", (7,)),
        (["From", " -", "5", " to", " 5"], "5", (4,)),  # the number itself before one below zero
        (["−", "5", " or", " 5"], "5", (3,)),
        ([" −", "5"], "-5", (0, 1)),
        ([" -", "5"], "5", (1,)),
        (["10", "-", "5"], "5", (2,)),
        ([" well", "-", "known", " well"], "well", (3,)),  # the word itself before a part of another
        ([" well", "-", "known"], "known", (2,)),
        (["the cat", "\u2019s"], "cat", (0,)),
        (["cafe", "\u0301", " cafe"], "cafe", (2,)),  # an accent that is a character of its own
        ([" कि", "ताब", " क"], "क", (2,)),
        (["👍", "🏽", " 👍"], "👍", (2,)),
        (["👨", "\u200d", "👩", " 👩"], "👩", (3,)),
        (["caf\u00e9"], "cafe\u0301", (0,)),  # one text, written in two ways
        (["don", "\u2019t"], "don't", (0, 1)),
        (["❤"], "❤\ufe0f", (0,)),
        (["red", "中", "文"], "red", (0,)),
        (["Wait", "...", " what"], ".", (1,)),
        (["\U00020000\U00020001"], "\U00020001", (0,)),
        (["", "", "猫", "", " 犬", "。"], "猫", (0, 1, 2)),  # the bytes that begin a character are a part of it
        (["", "", "猫", "", " 犬", "。"], "犬", (3, 4)),
        (["It", " is", "", "", "🙂", "!"], "is", (1,)),
        (["❤", "\ufe0f", " is"], "❤", (0, 1)),
        (["❤", "\ufe0f", " is"], "is", (2,)),
    ],
)
def test_a_phrase_stands_where_a_reader_sees_it(tokens: list[str], phrase: str, indices: tuple[int, ...]) -> None:
    replay = ToyReplay(
        torch.full((len(tokens), 2, 2), 0.25), original=[0.9] * len(tokens), base=[0.1] * len(tokens), tokens=tokens
    )
    assert select_tokens(replay, words=phrase).indices == indices


def test_no_phrase_reaches_into_a_number_or_across_a_special_token() -> None:
    tokens, special = ["3", ".", "5", " re", "<x>", "d"], [False] * 4 + [True, False]
    replay = ToyReplay(torch.full((6, 2, 2), 0.25), original=[0.9] * 6, base=[0.1] * 6, tokens=tokens, special=special)
    assert [word.text for word in replay.words] == ["3.5", "re", "d"]
    for phrase in ("5", "red"):
        with pytest.raises(SelectionError, match="is not in the answer"):
            select_tokens(replay, words=phrase)
    assert select_tokens(replay, words="re d").indices == (3, 5)
    for number in ("1\u2019000", "1'000", "٣٫٥"):  # as Swiss and Arabic texts write them
        replay = ToyReplay(torch.full((1, 2, 2), 0.25), original=[0.9], base=[0.1], tokens=[number])
        with pytest.raises(SelectionError, match="is not in the answer"):
            select_tokens(replay, words=number[0])


def test_unspaced_scripts_match_inside_a_run() -> None:
    tokens = ["一只", "红", "色的", "猫"]
    replay = ToyReplay(torch.full((4, 2, 2), 0.25), original=[0.9] * 4, base=[0.1] * 4, tokens=tokens)
    assert select_tokens(replay, words="红色").indices == (1, 2)


@pytest.mark.parametrize("sign", ["\ufe0f", " ", ""])
def test_a_sign_that_shows_nothing_is_no_phrase(replay: ToyReplay, sign: str) -> None:
    with pytest.raises(SelectionError, match="is not in the answer"):
        select_tokens(replay, words=sign)


def test_absent_word_lists_the_answers_words(replay: ToyReplay) -> None:
    with pytest.raises(SelectionError, match=r"'blue' is not in the answer.*'croissant'.*'red'") as caught:
        select_tokens(replay, words=["red", "blue"])
    assert isinstance(caught.value, ValueError)
    with pytest.raises(SelectionError):
        select_tokens(replay, words="  ")
    with pytest.raises(SelectionError):
        select_tokens(replay, words="</s>")


def test_span(replay: ToyReplay) -> None:
    assert select_tokens(replay, span=(3, 6)).indices == (3, 4, 5)
    clipped = select_tokens(replay, span=(8, 10))
    assert clipped.indices == (8,)
    assert clipped.skipped == {9: "special token '</s>'"}
    for bad in [(4, 4), (-1, 2), (5, 3), (0, 11), (1, 2, 3), "ab"]:
        with pytest.raises(SelectionError, match="span"):
            select_tokens(replay, span=bad)
    with pytest.raises(SelectionError, match="not both"):
        select_tokens(replay, words="red", span=(0, 1))
    with pytest.raises(SelectionError, match="unknown rule"):
        select_tokens(replay, rule="keywords")


def test_empty_selection_is_a_result_with_a_reason(replay: ToyReplay) -> None:
    selection = select_tokens(replay, alpha=5.0)
    assert not selection
    # The special token's ratio of 6.9 is the largest of all and must neither join K nor be named.
    assert selection.reason == "no token gains more than 5 nats from the image; the largest is 'red' with 4.2"
    blank = ToyReplay(
        torch.ones(4, 1, 1),
        original=[0.5] * 4,
        base=[0.4, 0.25, 0.24, 0.2],
        tokens=[" red", "\n", "\ufffd", "</s>"],
        special=[False, False, False, True],
    )
    assert str(select_tokens(blank).reason).endswith("the largest is 'red' with 0.22"), "the others are no words"
    only_special = select_tokens(replay, span=(9, 10))
    assert only_special.reason == "only special tokens are in the span"
    skipped = select_tokens(replay, alpha=1.0, stop_words={"the", "croissant", "red", "covered"})
    assert not skipped
    assert "every token that qualified is skipped" in str(skipped.reason)
    lone = ToyReplay(torch.ones(1, 1, 1), tokens=["</s>"], special=[True])
    assert select_tokens(lone, rule="joint").reason == "the answer has no tokens besides special ones"


def test_not_a_number_never_joins(replay: ToyReplay) -> None:
    replay.base_probability = torch.full_like(replay.base_probability, float("nan"))
    selection = select_tokens(replay)
    assert not selection
    assert "not finite" in str(selection.reason)


def test_trace_without_ratios() -> None:
    class Deferred:
        tokens = ("red", "</s>")
        special = np.array([False, True])
        llr = None
        words = ToyReplay(torch.ones(2, 1, 1), original=[0.9] * 2, base=[0.1] * 2, tokens=tokens).words

    with pytest.raises(SelectionError, match="llr=False"):
        select_tokens(Deferred())
    assert select_tokens(Deferred(), rule="joint").indices == (0,)
    assert select_tokens(Deferred(), words="red").llr == ()


def test_word_ratio_is_the_sum_over_its_tokens(replay: ToyReplay) -> None:
    by_word = dict(zip([word.text for word in replay.words], word_llr(replay.words, replay.llr.numpy()), strict=True))
    assert by_word["croissant"] == pytest.approx(math.log(0.8 / 0.1) + math.log(0.99 / 0.98), abs=1e-5)


def test_text_and_round_trip(replay: ToyReplay) -> None:
    selection = select_tokens(replay, words=["the croissant", "red"])
    assert selection.text == "The croissant … red"
    assert select_tokens(replay, span=(1, 2)).text == "croissant"  # a part of a word is shown as the word
    assert select_tokens(replay, words=["red", "not"]).text == "red … not"
    assert TokenSelection.from_dict(selection.to_dict()) == selection
    with pytest.raises(SelectionError, match="not a stored"):
        TokenSelection.from_dict({"indices": [3], "tokens": ["a"]})
