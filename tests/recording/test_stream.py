"""Streams: the answer word by word, the trace as without one, and an end at any moment."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import pickle
import queue
import threading
import warnings

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor

import lvlm_probe as probe
from lvlm_probe.attention import collection
from lvlm_probe.models.prompts import chat_inputs, placed
from lvlm_probe.models.tokenizers import display_pieces
from lvlm_probe.recording.recorder import GenerationRecorder
from lvlm_probe.recording.stream import Feed, Stream
from lvlm_probe.trace.records import FIELDS
from lvlm_probe.words import group_words


@pytest.fixture(scope="module")
def attached():
    """A model, its inputs with an image known to the probe, and the probe; the answer is "The cross is yellow."."""
    model, processor = probe.demo.load()
    scene = probe.demo.scenes(1)[0]
    with probe.attach(model, processor) as p:
        yield p, placed(chat_inputs(processor, [scene.image], scene.question), model, processor)


class AtStep(LogitsProcessor):
    """Calls something in the middle of generate(), in its thread: before token number ``step`` is chosen."""

    def __init__(self, prompt: torch.Tensor, step: int, act) -> None:
        self.length, self.act = prompt.shape[1] + step, act

    def __call__(self, ids, scores):
        if ids.shape[1] == self.length:
            self.act()
        return scores


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lvlm_probe stream"]


def same(one: probe.Trace, other: probe.Trace) -> None:
    """Every field of two traces, and what was recorded inside the model."""
    for name in set(FIELDS) - {"trace_id"}:
        a, b = getattr(one, name), getattr(other, name)
        assert type(a) is type(b) and (np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b), name
    assert one.points == other.points
    for name in one.points:
        assert torch.equal(one.point(name).values, other.point(name).values)


@pytest.mark.quick
@pytest.mark.parametrize(("by", "options"), [("word", {}), ("token", {"do_sample": True, "temperature": 3.0})])
def test_the_answer_and_its_trace_are_those_without_a_stream(attached, tmp_path, by, options):
    p, inputs = attached
    torch.manual_seed(3)
    with p.record(tmp_path / "plain") as recording:
        p.model.generate(**inputs, max_new_tokens=12, **options)
    (plain,) = recording.traces
    torch.manual_seed(3)
    stream = p.stream(tmp_path / "live", **inputs, max_new_tokens=12, by=by, **options)
    words = list(stream)
    same(stream.trace, plain)
    assert not threads() and stream.trace.path.parent == tmp_path / "live"
    expected = plain.words if by == "word" else [(step, step + 1) for step in range(len(plain.tokens))]
    assert [(w.text, w.start, w.stop) if by == "word" else (w.start, w.stop) for w in words] == [
        (w.text, w.start, w.stop) if by == "word" else w for w in expected
    ]
    assert "".join(str(word) for word in words if not word.special).strip() == plain.answer.strip()
    for before, after in zip(words, stream.words, strict=True):
        of_it = slice(before.start, before.stop)
        assert before.llr is None and after.llr == pytest.approx(float(plain.llr[of_it].sum()))
        assert before.log_prob == pytest.approx(float(plain.log_probs[of_it].sum()), abs=1e-6)
        assert before.token_ids == after.token_ids == tuple(plain.token_ids[of_it])


def test_words_go_into_queues_files_and_json(attached):
    p, inputs = attached
    stream = p.stream(**inputs, max_new_tokens=12)
    for word in (*stream, *stream.words):
        for other in (pickle.loads(pickle.dumps(word)), copy.deepcopy(word)):
            assert other == word and np.array_equal(other.attention, word.attention)
        assert json.loads(json.dumps(dataclasses.asdict(word)))["log_prob"] == word.log_prob


def test_words_come_with_their_attention_while_the_model_generates(attached, monkeypatch):
    """The model stands still before its sixth token while words are looked at, once in settled rows and once not."""
    p, inputs = attached
    for most in (2, 256):
        monkeypatch.setattr(collection, "_MOST_WAITING", most)
        looked = threading.Event()
        gate = AtStep(inputs["input_ids"], 5, looked.wait)
        with p.stream(**inputs, max_new_tokens=12, logits_processor=[gate]) as stream:
            words = [next(stream) for _ in range(3)]
            assert [word.text for word in words] == ["The", "cross", "is"]
            rows = [word.attention for word in words]
            with pytest.raises(probe.ProbeError, match="is being generated"):
                _ = stream.trace
            assert stream.words == tuple(words)
            looked.set()
            assert "".join(map(str, stream)) == " yellow."
        values = stream.trace.attention.values
        for word, row in zip(words, rows, strict=True):
            kept = values[word.start : word.stop].mean((0, 2))
            np.testing.assert_allclose(row, kept, atol=2**-11 * float(kept.max()))  # rows are kept in half precision
            assert np.array_equal(stream.words[0].attention, values[:1].mean((0, 2)))


def test_closed_early_the_generation_stops_and_the_trace_says_so(attached, tmp_path):
    p, inputs = attached

    def stand_still() -> None:
        there.set()
        stream._feed.stop.wait()

    there = threading.Event()
    gate = AtStep(inputs["input_ids"], 3, stand_still)
    with p.record(tmp_path) as recording:
        stream = p.stream(**inputs, max_new_tokens=12, logits_processor=[gate])
        assert next(stream).text == "The"
        there.wait()
        stream.close()
    (trace,) = recording.traces
    assert not threads() and trace == stream.trace and list(stream) == []
    assert trace.status == "stopped" and len(trace.tokens) == 4
    assert trace.notes == ["the answer was stopped after 4 tokens by the reader of its stream"]
    assert trace.llr is not None and trace.attention is not None
    assert [word.text for word in stream.words] == ["The", "cross", "is", "yel"]
    stream.close()


class Interrupted(queue.SimpleQueue):
    """Where the reader waits when Ctrl-C is pressed."""

    def get(self):
        raise KeyboardInterrupt


def test_a_stream_that_is_dropped_or_interrupted_ends(attached, tmp_path):
    p, inputs = attached
    for end in ("dropped", "Ctrl-C"):
        stream = p.stream(tmp_path / end, **inputs, max_new_tokens=200, min_new_tokens=200)
        word = next(stream)
        (thread,) = threads()
        if end == "dropped":
            del stream
            gc.collect()
            thread.join()
        else:
            stream._feed.tokens = Interrupted()
            with pytest.raises(KeyboardInterrupt):
                list(stream)
        assert not threads() and word.text == "The"
        (trace,) = probe.open_store(tmp_path / end)
        assert trace.status == "stopped" and len(trace.tokens) < 200


def test_what_generate_raises_comes_out_of_the_loop(attached):
    p, inputs = attached

    def fail() -> None:
        raise LookupError("in the middle")

    stream = p.stream(**inputs, max_new_tokens=12, logits_processor=[AtStep(inputs["input_ids"], 4, fail)])
    words = []
    with pytest.raises(LookupError, match="in the middle"):
        words.extend(stream)
    assert [word.text for word in words] == ["The", "cross", "is", "yel"] and stream.words == tuple(words)
    assert not threads()
    with pytest.raises(probe.ProbeError, match="nothing was recorded"):
        _ = stream.trace
    assert "".join(map(str, p.stream(**inputs, max_new_tokens=12))) == "The cross is yellow.", "the probe still works"


def test_a_fault_of_ours_costs_log_p_and_not_the_answer(attached, monkeypatch):
    p, inputs = attached

    def broken(*_):
        raise RuntimeError("of ours")

    monkeypatch.setattr(GenerationRecorder, "chosen", broken)
    stream = p.stream(**inputs, max_new_tokens=12)
    said = list(stream)
    assert "".join(map(str, stream.words)) == "The cross is yellow." == stream.trace.answer
    assert all(word.log_prob is None for word in said) and all(word.log_prob is not None for word in stream.words)
    assert not np.isnan(stream.trace.log_probs).any()


def test_tokens_that_come_several_at_a_time(attached, tmp_path):
    """Which passes they come from is known at the end: until then they have no log P."""
    p, inputs = attached
    more = {"max_new_tokens": 12, "prompt_lookup_num_tokens": 2, "do_sample": False}
    with p.record(tmp_path) as recording:
        p.model.generate(**inputs, **more)
    stream = p.stream(**inputs, **more, by="token")
    said = list(stream)
    same(stream.trace, recording.traces[0])
    assert [token for word in said for token in word.token_ids] == stream.trace.token_ids.tolist()
    assert [word.text for word in said] == stream.trace.tokens and stream.trace.log_probs_source == "teacher_forced"
    assert None in [word.log_prob for word in said]
    for word, value in zip(said, stream.trace.log_probs, strict=True):
        assert word.log_prob is None or word.log_prob == pytest.approx(float(value), abs=1e-5)
    assert all(word.log_prob is not None for word in stream.words)


def test_what_was_needed_for_the_call_is_let_go(attached):
    p, inputs = attached
    stream = p.stream(**inputs, max_new_tokens=3)
    words = list(stream)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is GenerationRecorder]
    rows = stream.trace.attention.values
    del stream
    gc.collect()
    assert np.array_equal(words[0].attention, rows[:1].mean((0, 2))), "a word keeps the trace that it is of"


def test_what_another_thread_generates_is_not_in_the_stream(attached, tmp_path):
    p, inputs = attached
    other = probe.demo.scenes(2)[1]
    gone_on = threading.Event()
    gate = AtStep(inputs["input_ids"], 2, gone_on.wait)
    with p.stream(tmp_path, **inputs, max_new_tokens=12, logits_processor=[gate]) as stream:
        given = placed(chat_inputs(p.processor, [other.image], other.question), p.model, p.processor)
        p.model.generate(**given, max_new_tokens=12)
        second = p.stream(tmp_path, **given, max_new_tokens=12)
        told = "".join(map(str, second))
        gone_on.set()
        assert "".join(map(str, stream)) == "The cross is yellow."
    assert sorted(trace.answer for trace in probe.open_store(tmp_path)) == sorted(["The cross is yellow.", told])


def test_settings_of_the_thread_that_asks_go_with_it(attached, tmp_path):
    p, inputs = attached
    with torch.autocast("cpu", torch.bfloat16):
        with p.record(tmp_path) as recording:
            p.model.generate(**inputs, max_new_tokens=12)
        stream = p.stream(**inputs, max_new_tokens=12)
        list(stream)
    assert "autocast to bfloat16" in stream.trace.notes[0]
    same(stream.trace, recording.traces[0])


def test_what_has_no_stream_is_refused(attached):
    p, inputs = attached
    twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
    for arguments, words in [
        ({**twice}, "2 are asked for"),
        ({**inputs, "num_beams": 2}, "beam search"),
        ({**inputs, "num_return_sequences": 3, "do_sample": True}, "3 are asked for"),
        ({**inputs, "by": "letter"}, "by='letter'"),
    ]:
        with pytest.raises(probe.ProbeError, match=words):
            p.stream(**arguments)
    with p.masked(torch.ones(8, 8)), pytest.raises(probe.ProbeError, match="masked"):
        p.stream(**inputs)
    assert not threads()


@pytest.mark.parametrize("name", ["qwen2_vl", "mllama"])
def test_families(name, tmp_path):
    """Also with layers of cross-attention; ``test_generation_kinds`` has encoder-decoders."""
    model, processor = tiny_models.build(name)
    with warnings.catch_warnings(), probe.attach(model, processor) as p:
        warnings.simplefilter("ignore")
        given = tiny_models.inputs(name, model, processor, [tiny_models.picture()], "What is in the image?")
        with p.record(tmp_path) as recording:
            model.generate(**given, max_new_tokens=5, do_sample=False)
        stream = p.stream(**given, max_new_tokens=5, do_sample=False, by="token")
        said = list(stream)
    same(stream.trace, recording.traces[0])
    assert [token for word in said for token in word.token_ids] == stream.trace.token_ids.tolist()
    np.testing.assert_allclose([word.log_prob for word in said], stream.trace.log_probs, atol=1e-6)


# ------------------------------------------------------------------------------------------------- tokens become words


class Pieces:
    """A tokenizer whose tokens are texts, or single bytes."""

    all_special_ids = (0,)

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def decode(self, ids, **_):
        return b"".join(self.pieces[token] for token in ids).decode(errors="replace")


TEXTS = st.lists(
    st.sampled_from(
        ["a", "b3", "3", ".", ",", "'", " ", "\n", " a", "e\u0301", "\u0301", "漢", "🙂", "\u200d", "-", "🙂!", "</s>"]
    )
)


@settings(max_examples=300)
@given(TEXTS, st.booleans())
@example(["漢", "\u0301", "b3"], False)
def test_words_are_those_of_the_whole_answer(texts, cut):
    """However texts are cut into tokens, a word is given only when nothing behind it can change it."""
    pieces = [b"</s>"]
    for text in texts:
        raw = text.encode()
        pieces += [bytes([each]) for each in raw] if cut and len(raw) > 2 else [raw]
    ids = [0 if piece == b"</s>" else number + 1 for number, piece in enumerate(pieces[1:])]

    def answer(feed: Feed) -> None:
        for token in ids:
            feed.tokens.put((token, -1.0))
        feed.tokens.put(None)

    tokenizer = Pieces(pieces)
    said = list(Stream(answer, tokenizer, "word", None))
    whole = group_words(display_pieces(tokenizer, ids), [token == 0 for token in ids])
    assert [(w.text, w.start, w.stop) for w in said] == [(w.text, w.start, w.stop) for w in whole]
    assert [word.log_prob for word in said] == [-float(word.stop - word.start) for word in said]
