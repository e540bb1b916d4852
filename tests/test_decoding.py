"""Pieces, special tokens, the end of an answer."""

from __future__ import annotations

import tiny_models
import torch

from lvlm_probe.decoding import answer_length, display_pieces, eos_token_ids, special_flags, tokenizer_of


def test_pieces_join_to_the_decoded_text(demo):
    for tokenizer in (tiny_models.build_processor("llava").tokenizer, demo[1].tokenizer):
        text = "The red star is in the top left."
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = display_pieces(tokenizer, ids)
        assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_is_shown_by_the_last():
    tokenizer = tiny_models.build_processor("llava").tokenizer
    ids = tokenizer("aé漢b", add_special_tokens=False)["input_ids"]
    pieces = display_pieces(tokenizer, ids)
    assert "".join(pieces) == "aé漢b"
    assert "�" not in "".join(pieces) and "" in pieces


def test_lone_bytes_are_shown_where_they_are_and_cost_no_more_than_their_number():
    tokenizer = tiny_models.build_processor("llava").tokenizer
    lone = tokenizer("漢", add_special_tokens=False)["input_ids"][:1]
    word = tokenizer("漢 red", add_special_tokens=False)["input_ids"]
    decoded = 0

    class Counting:
        def decode(self, ids, **settings):
            nonlocal decoded
            decoded += len(ids)
            return tokenizer.decode(ids, **settings)

    pieces = display_pieces(Counting(), lone * 500 + word)
    assert "".join(pieces) == tokenizer.decode(lone * 500 + word)
    assert decoded < 20 * len(pieces)
    assert pieces[100] and pieces[-1].endswith("red"), "each shows itself, not all of them with the next word"


def test_without_a_tokenizer_ids_are_shown():
    assert display_pieces(None, [5, 7]) == ["<5>", "<7>"]
    assert tokenizer_of(object()) is None


def test_special_flags():
    tokenizer = tiny_models.build_processor("llava").tokenizer
    assert special_flags(tokenizer, [tokenizer.eos_token_id, 100]) == [True, False]
    assert special_flags(None, [3, 4], also={4}) == [False, True]


def test_eos_ids_from_the_first_that_names_any():
    class Config:
        def __init__(self, value):
            self.eos_token_id = value

    assert eos_token_ids(Config(None), Config(2)) == {2}
    assert eos_token_ids(Config([2, 3]), Config(4)) == {2, 3}
    assert eos_token_ids(Config(torch.tensor([7])), Config(4)) == {7}
    assert eos_token_ids(Config(None)) == frozenset()


def test_where_an_answer_ends():
    eos = frozenset({2})
    assert answer_length([5, 6, 2, 0, 0], eos=eos, pad=0, custom_stop=False) == 3
    assert answer_length([5, 6, 7], eos=eos, pad=0, custom_stop=False) == 3
    assert answer_length([5, 6, 2, 2], eos=eos, pad=2, custom_stop=False) == 3
    assert (
        answer_length([5, 6, 0, 0], eos=eos, pad=0, custom_stop=True) == 2
    )  # stopped by a string, filled with padding
    assert answer_length([5, 6, 2, 2], eos=eos, pad=2, custom_stop=True) == 2  # which 2 was said cannot be told
    assert answer_length([2], eos=eos, pad=0, custom_stop=False) == 1
    assert answer_length([], eos=eos, pad=0, custom_stop=False) == 0
