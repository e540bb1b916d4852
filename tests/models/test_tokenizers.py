"""Pieces, special tokens, the end of an answer."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerFast

from lvlm_probe.models.tokenizers import Stops, display_pieces, special_flags, stops_of, tokenizer_of
from lvlm_probe.words import group_words


@pytest.mark.quick
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


def test_tokens_that_end_a_character_and_begin_the_next_one():
    """As byte-level vocabularies have them in scripts of three bytes a letter: no token in a row ends a character."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    text = "แมวสองตัว🙂 ok"
    shown = "".join(
        raw for raw, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    )
    cut = [shown[:2], *(shown[at : at + 3] for at in range(2, len(shown), 3))]  # at bytes 2, 5, 8, ... of the letters
    raw = Tokenizer(models.BPE({piece: i for i, piece in enumerate(dict.fromkeys([*letters, *cut]))}, []))
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    ids = tokenizer.convert_tokens_to_ids(cut)
    assert tokenizer.decode(ids) == text
    pieces = display_pieces(tokenizer, ids)
    assert "".join(pieces) == text and pieces[:4] == ["", "แ", "ม", "ว"]
    assert "".join(display_pieces(tokenizer, ids[:6])) == tokenizer.decode(ids[:6])  # cut off in a character


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


def test_tokens_added_as_special_are_special_and_other_added_ones_are_words():
    tokenizer = copy.deepcopy(tiny_models.build_processor("llava").tokenizer)
    tokenizer.add_tokens([AddedToken("<|eot_id|>", special=True), AddedToken("<loc_12>", special=False)])
    ids = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<loc_12>"])
    assert ids[0] not in tokenizer.all_special_ids, "it would be one anyway"
    assert special_flags(tokenizer, ids) == [True, False]


@pytest.mark.parametrize("joins", [True, False])
def test_bytes_that_a_decoder_spells_are_no_words(joins):
    """A SentencePiece vocabulary; its decoder joins bytes to characters, or does not know how."""
    pieces = ["<unk>", "▁red", "<0xE6>", "<0xBC>", "<0xA2>", "<0x0A>"]
    raw = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), *([decoders.ByteFallback()] if joins else []), decoders.Fuse()]
    raw.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    ids = [1, 2, 3, 4, 5, 1]
    special = special_flags(tokenizer, ids)
    words = [word.text for word in group_words(display_pieces(tokenizer, ids), special)]
    assert words == (["red", "漢", "red"] if joins else ["red", "red"])


class Model(torch.nn.Module):
    """The two configurations that generate() looks at."""

    def __init__(self, eos=None, **settings):
        super().__init__()
        self.config = SimpleNamespace(eos_token_id=eos)
        self.generation_config = GenerationConfig(**settings)


def test_what_ends_an_answer_is_read_as_generate_reads_it():
    assert stops_of(Model(eos=2), {}, 5).eos == {2}
    assert stops_of(Model(eos=4, eos_token_id=[2, 3]), {}, 5).eos == {2, 3}
    assert stops_of(Model(eos=4), {"eos_token_id": torch.tensor([7])}, 5).eos == {7}
    assert stops_of(Model(), {}, 5).eos == frozenset()
    off = stops_of(Model(eos=2, eos_token_id=2), {"eos_token_id": None}, 5)  # given as None: there is none
    assert off.eos == frozenset() and off.pad is None
    assert stops_of(Model(eos_token_id=[9, 2]), {}, 5).pad == 9  # the first of them, as in generate()
    assert stops_of(Model(), {"max_new_tokens": 4}, 5).limit == 4
    assert stops_of(Model(), {"max_length": 9}, 5).limit == 4
    given = GenerationConfig(max_new_tokens=3, stop_strings="x")
    assert stops_of(Model(), {"generation_config": given}, 5).limit == 3
    assert stops_of(Model(), {"generation_config": given}, 5).strings == ("x",)


def test_where_an_answer_ends():
    stops = Stops(frozenset({2}), 0)
    assert stops.answer_length([5, 6, 2, 0, 0]) == 3
    assert stops.answer_length([5, 6, 7]) == 3
    assert stops.answer_length([2]) == 1
    assert stops.answer_length([]) == 0
    assert Stops(frozenset({2}), 2).answer_length([5, 6, 2, 2]) == 3
    assert Stops(frozenset({2}), 0, ("x",)).answer_length([5, 6, 0, 0]) == 2  # stopped by a string, then filled
    assert Stops(frozenset({2}), 2, ("x",)).answer_length([5, 6, 2, 2]) == 2  # which 2 was said cannot be told
    assert Stops(frozenset(), 0).answer_length([5, 0, 0]) == 3  # without an end no row ends early, so 0 is a word


def test_every_stop_is_told_as_it_was():
    stops = Stops(frozenset({2}), 0, (".",), True, 4, "max_new_tokens", 1.5)
    assert stops.told([5, 2], "a</s>") is None
    assert "the stop string '.'" in stops.told([5, 6], "a.")
    assert "4 tokens (max_new_tokens)" in stops.told([5, 6, 7, 8], "a")
    told = stops.told([5], "a")
    assert "max_time=1.5" in told and "stopping criterion" in told and "max_new_tokens" not in told
    assert "not known" in Stops(frozenset({2}), 0).told([5], "a")
