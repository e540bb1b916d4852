from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm_probe.words import Word, distinct_texts, group_words


def texts(pieces: list[str], special: list[bool] | None = None) -> list[str]:
    return [word.text for word in group_words(pieces, special or [False] * len(pieces))]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["The", " square", " is", " red", "."], ["The", "square", "is", "red", "."]),
        ([" A", " cro", "iss", "ant"], ["A", "croissant"]),
        (["The ", "square ", "is"], ["The", "square", "is"]),
        (["don", "'", "t", " go"], ["don't", "go"]),
        (["don", "'t", " go"], ["don't", "go"]),
        (["It", "’s"], ["It’s"]),
        (["a", " well", "-", "known", " one"], ["a", "well-known", "one"]),
        ([" 3", ".", "5", " m", "."], ["3.5", "m", "."]),
        (["1", ",", "0", "0", "0", ",", " yes"], ["1,000", ",", "yes"]),
        (["at", " 12", ":", "30", ":"], ["at", "12:30", ":"]),
        (["yes", ",", "no"], ["yes", ",", "no"]),
        (["red", ".", "The"], ["red", ".", "The"]),
        (["red.", " The"], ["red.", "The"]),
        ([" ", "3", " cats"], ["3", "cats"]),
        (["a", "\n\n", "b"], ["a", "b"]),
        (["wait", ".", ".", "."], ["wait", "..."]),
        (["really", "?", "!"], ["really", "?!"]),
        (["图", "片", "很", "好", "。"], ["图", "片", "很", "好", "。"]),
        (["图片", "很"], ["图片", "很"]),
        (["红色", "car"], ["红色", "car"]),
        (["ねこ", "です"], ["ねこ", "です"]),
        (["か", "\u3099", "き"], ["か\u3099", "き"]),
        (["漢", "\ufe00", "b3"], ["漢\ufe00", "b3"]),
        (["안녕", "하", "세요"], ["안녕하세요"]),
        (["हि", "न्", "दी"], ["हिन्दी"]),
        (["cafe", "\u0301", "s"], ["cafe\u0301s"]),
        (["hi", "", "", "🙂", "!"], ["hi", "🙂!"]),
        (["snake", "_", "case"], ["snake_case"]),
        (["'", "red", "'"], ["'", "red", "'"]),
        (["-", "5"], ["-", "5"]),
        ([], []),
        (["", ""], [""]),
        ([" ", "\n"], []),
        (["red", " \ufffd", " car", "\ufffd\ufffd"], ["red", "car"]),
        (["\u200d", " red", " \u200b", "\x07", " car"], ["red", "car"]),
        (["👩", "\u200d", "🚀"], ["👩\u200d🚀"]),
    ],
)
def test_grouping(pieces: list[str], expected: list[str]) -> None:
    assert texts(pieces) == [text for text in expected if text]


def test_spans_are_token_spans() -> None:
    assert group_words([" A", " cro", "iss", "ant", "."], [False] * 5) == [
        Word("A", 0, 1),
        Word("croissant", 1, 4),
        Word(".", 4, 5),
    ]


def test_byte_pieces_go_with_the_character_they_complete() -> None:
    assert group_words([" so", "", "", "🙂", " ok"], [False] * 5) == [
        Word("so", 0, 1),
        Word("🙂", 1, 4),
        Word("ok", 4, 5),
    ]
    assert group_words([" caf", "", "é"], [False] * 3) == [Word("café", 0, 3)]
    assert group_words([" so", "", ""], [False] * 3) == [Word("so", 0, 3)]


def test_special_tokens_are_never_in_a_word_and_separate() -> None:
    pieces = ["<s>", "red", "<pad>", "dish", "</s>"]
    assert group_words(pieces, [True, False, True, False, True]) == [Word("red", 1, 2), Word("dish", 3, 4)]
    assert group_words(["red", "", "</s>"], [False, True, True]) == [Word("red", 0, 1)]


def test_whitespace_belongs_to_no_word() -> None:
    assert group_words(["a", " ", "b"], [False] * 3) == [Word("a", 0, 1), Word("b", 2, 3)]


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 pieces but 1 special"):
        group_words(["a", "b"], [False])


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", " b", "'", "-", ".", " ", "", "3", "图", "🙂", "\u0301", "</s>"]), st.booleans()
        )
    )
)
def test_words_partition_what_can_be_seen(tokens: list[tuple[str, bool]]) -> None:
    pieces = [piece for piece, _ in tokens]
    special = [flag for _, flag in tokens]
    words = group_words(pieces, special)
    covered = [index for word in words for index in range(word.start, word.stop)]
    assert covered == sorted(set(covered)), "words overlap or are out of order"
    for index, (piece, flag) in enumerate(tokens):
        if flag:
            assert index not in covered
        elif piece.strip():
            assert index in covered
    for word in words:
        assert word.text == "".join(pieces[word.start : word.stop]).strip()


@pytest.mark.quick
def test_equal_words_are_told_apart_by_their_number() -> None:
    said = group_words(["A", " cat", " and", " a", " tom", " cat", ",", " Cat", ",", "图", "图"], [False] * 11)
    assert distinct_texts(said) == [
        *("A", "cat", "and", "a (2nd)", "tom", "cat (2nd)", ",", "Cat (3rd)", ", (2nd)", "图", "图 (2nd)")
    ]
    numbers = distinct_texts([Word("x", 0, 0)] * 113)
    assert [numbers[place] for place in (3, 10, 11, 12, 20, 21, 110, 111)] == [
        f"x ({number})" for number in ("4th", "11th", "12th", "13th", "21st", "22nd", "111th", "112th")
    ]
