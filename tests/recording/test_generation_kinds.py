"""Models that generate in a way of their own: encoder-decoder ones, and those whose ``generate()`` runs an inner model.

Truth is the logits that ``generate()`` returned without a probe, or a forward pass written out here.
"""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "families"), str(Path(__file__).parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from zoo import build, load_members  # noqa: E402

import lvlm_probe as probe  # noqa: E402
from lvlm_probe.models.inputs import is_separate  # noqa: E402
from lvlm_probe.models.tokenizers import decoder_prompt  # noqa: E402
from lvlm_probe.recording.log_probs import StepLogProbs, answer_in  # noqa: E402
from lvlm_probe.recording.row_inputs import columns_of  # noqa: E402

load_members()
KINDS = ("florence2", "t5gemma2", "blip-2", "instructblip", "kosmos-2", "idefics")
ENCODER_DECODER = ("florence2", "t5gemma2")


def _recorded(name, directory, **settings):
    built = build(name, "pil")
    picture = built.picture()
    plain = built.generate(built.inputs([picture]))
    attached = probe.attach(built.model, built.processor)
    with attached.record(directory, llr=False) as recording:
        seen = built.generate(built.inputs([picture]), **settings)
    attached.detach()
    assert not recording.faults, recording.faults
    return built, picture, plain, seen, recording.traces[0]


@pytest.mark.parametrize("name", KINDS)
def test_log_probs_come_from_the_logits_of_the_call_itself(name, tmp_path):
    built, _, plain, _, trace = _recorded(name, tmp_path)
    assert list(trace.token_ids) == plain.sequences[0, -4:].tolist()
    scores = torch.cat(list(plain.logits)).log_softmax(-1)
    truth = scores.gather(-1, plain.sequences[0, -4:, None])[:, 0]
    assert torch.allclose(torch.as_tensor(trace.log_probs.copy()), truth, atol=1e-5)
    assert trace.log_probs_source == "generation"
    assert torch.allclose(torch.as_tensor(trace.top_log_probs.copy()), scores.max(-1).values, atol=1e-5)
    ids, log_probs = probe.replay(trace, built.model, built.processor).likeliest
    assert torch.allclose(log_probs, scores.max(-1).values, atol=1e-4) and ids.shape == (4,)
    assert len(trace.top_tokens) == 4


@pytest.mark.parametrize("name", ["florence2", "blip-2", "kosmos-2"])
def test_a_stream_shows_the_tokens_of_the_trace_as_they_are_said(name, tmp_path):
    """Also where ``generate()`` begins with embeddings, or with a decoder's own prompt."""
    built, _, _, _, trace = _recorded(name, tmp_path)
    with probe.attach(built.model, built.processor) as attached:
        given = {**built.inputs([built.picture()]), **built.member.answer}
        stream = attached.stream(
            tmp_path, **given, by="token", max_new_tokens=4, min_new_tokens=4, do_sample=False, record={"llr": False}
        )
        said = list(stream)
    assert [token for word in said for token in word.token_ids] == trace.token_ids.tolist()
    assert np.allclose([word.log_prob for word in said], trace.log_probs, atol=1e-6)
    assert np.array_equal(stream.trace.log_probs, trace.log_probs)


@pytest.mark.parametrize("name", KINDS)
def test_several_masks_at_once_are_the_masks_one_by_one(name, tmp_path):
    built, _, _, _, trace = _recorded(name, tmp_path)
    replay = probe.replay(trace, built.model, built.processor)
    masks = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0))
    together = replay.log_probs(masks)
    apart_ = torch.cat([replay.log_probs(mask[None]) for mask in masks])
    assert torch.allclose(together, apart_, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-3  # the picture matters


@pytest.mark.parametrize("name", KINDS)
def test_a_call_under_a_mask_is_what_a_replay_makes_of_it(name, tmp_path):
    """Also where the processor returns an axis more than its image processor."""
    built, picture, _, _, trace = _recorded(name, tmp_path)
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    with probe.attach(built.model, built.processor) as attached:
        inputs = built.inputs([picture])
        with attached.masked(mask):
            masked = built.generate(inputs)
    said = masked.logits[0].log_softmax(-1)[0, int(trace.token_ids[0])]
    mine = probe.replay(trace, built.model, built.processor).log_probs(mask)[0, 0]
    assert torch.allclose(mine, said, atol=1e-4)
    assert abs(float(said) - trace.log_probs[0]) > 1e-3  # the picture matters


def test_passes_over_guessed_tokens_that_end_as_the_answer_goes_on(tmp_path):
    """A pass over a said token and two guesses of which none is right, and whose last is the token said there."""
    built = build("idefics3", "pil")
    picture = built.picture(seed=1)
    lengths = []
    handle = built.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    attached = probe.attach(built.model, built.processor)
    inputs = built.inputs([picture], "How many red shapes are there in this picture?")
    with attached.record(tmp_path, llr=False, boxes=False) as recording:
        output = built.generate(inputs, 5, prompt_lookup_num_tokens=3)
    handle.remove()
    (trace,) = recording.traces
    assert lengths[1:5] == [1, 1, 3, 1]  # as many passes as tokens
    assert np.allclose(trace.log_probs, _by_one_pass(built, inputs, output), atol=1e-4)
    assert trace.log_probs_source == "teacher_forced" and trace.attention is None


def test_guesses_behind_the_prompt_in_the_first_pass(tmp_path):
    """The last position of that pass is a refused guess's, and each later pass is over the newest token."""
    built = build("gemma3", "pil")
    lengths = []
    handle = built.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    attached = probe.attach(built.model, built.processor)
    inputs = built.inputs([built.picture(seed=5)])
    with attached.record(tmp_path, llr=False, boxes=False) as recording:
        output = built.generate(inputs, 4, prompt_lookup_num_tokens=2)
    handle.remove()
    (trace,) = recording.traces
    assert lengths[:4] == [inputs["input_ids"].shape[1] + 2, 1, 1, 1]
    assert np.allclose(trace.log_probs, _by_one_pass(built, inputs, output), atol=1e-4)
    assert trace.log_probs_source == "teacher_forced" and trace.attention is None


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", ["blip-2", "llava"])
def test_a_logits_processor_that_asks_the_model_too(name, tokens, tmp_path):
    """Contrastive decoding runs the model on another image after each step; those logits are none of the answer."""
    built = build(name, "pil")
    inputs, other = built.inputs([built.picture()]), built.inputs([built.picture(seed=5)])

    def contrasted(_ids, scores):
        with torch.no_grad():
            return scores - 0.5 * built.model(**other).logits[:, -1]

    attached = probe.attach(built.model, built.processor)
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "logits_processor": [contrasted]}
    options = {"record": {"llr": False, "boxes": False}, "by": "token", "do_sample": False}
    said = list(attached.stream(**inputs, **settings, **options))
    with attached.record(tmp_path, llr=False, boxes=False) as recording:
        output = built.generate(inputs, tokens, logits_processor=[contrasted])
    (trace,) = recording.traces
    assert np.allclose(trace.log_probs, _by_one_pass(built, inputs, output), atol=1e-4)
    shown = [(word.log_prob, value) for word, value in zip(said, trace.log_probs, strict=True)]
    assert all(early is None or abs(early - value) < 1e-4 for early, value in shown)
    assert trace.log_probs_source == "teacher_forced" and trace.attention is None


def _by_one_pass(built, inputs, output):
    """log P of an answer from one pass over it, as no probe computes it, ``(step,)``."""
    ids, start = output.sequences, inputs["input_ids"].shape[1]
    own = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = built.model(**own, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0, start - 1 : -1].log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0].numpy()


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_an_encoder_decoder_answer_is_forced_through_the_decoder(name, tmp_path):
    built, picture, plain, _, trace = _recorded(name, tmp_path)
    sequence = plain.sequences
    with torch.no_grad():
        logits = built.model(**built.inputs([picture]), decoder_input_ids=sequence[:, :-1], use_cache=False).logits
    truth = logits.log_softmax(-1).gather(-1, sequence[:, 1:, None])[0, :, 0]
    replay = probe.replay(trace, built.model, built.processor)
    assert torch.allclose(replay.original_log_probs, truth, atol=1e-4)
    assert replay.input_ids.tolist() == built.inputs([picture])["input_ids"][0].tolist()
    rows = trace.attention  # of the decoder on the encoder's states at the image tokens
    assert rows.values.shape[-1] == len(trace.layout.image_positions) > 0
    assert np.allclose(rows.values.sum(-1) + rows.text_mass, 1, atol=5e-3)
    assert 0 < rows.values.sum(-1).mean() < 1
    with pytest.raises(probe.errors.ExplainError, match="through its encoder"):
        replay.capture(attention=["decoder"])


@pytest.mark.quick
def test_a_beginning_of_the_answer_that_the_user_gave_is_no_part_of_it(tmp_path):
    built = build("florence2", "pil")
    inputs = built.inputs([built.picture()])
    words = torch.tensor([[built.model.generation_config.decoder_start_token_id, 40, 41]])
    attached = probe.attach(built.model, built.processor)
    with attached.record(tmp_path, llr=False) as recording:
        output = built.generate(inputs, decoder_input_ids=words)
    trace = recording.traces[0]
    assert list(trace.token_ids) == output.sequences[0, 3:].tolist()
    again = probe.replay(trace, built.model, built.processor).original_log_probs
    assert torch.allclose(again, torch.as_tensor(trace.log_probs.copy()), atol=1e-4)


def test_beams_of_an_encoder_decoder_model_are_scored_by_one_pass(tmp_path):
    built, picture, _, seen, trace = _recorded("florence2", tmp_path, num_beams=2)
    assert trace.log_probs_source == "teacher_forced"
    ids = seen.sequences
    with torch.no_grad():
        logits = built.model(**built.inputs([picture]), decoder_input_ids=ids[:, :-1], use_cache=False).logits
    truth = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0][: len(trace.tokens)]
    assert torch.allclose(torch.as_tensor(trace.log_probs.copy()), truth, atol=1e-4)


@pytest.mark.parametrize("name", ["florence2", "instructblip", "idefics"])
def test_traces_are_copied_and_pickled(name, tmp_path):
    built, _, _, _, trace = _recorded(name, tmp_path)
    for twin in (copy.deepcopy(trace), pickle.loads(pickle.dumps(trace))):
        replay = probe.replay(twin, built.model, built.processor)
        truth = torch.as_tensor(trace.log_probs.copy())
        assert torch.allclose(replay.original_log_probs, truth, atol=1e-4)


def test_another_question_is_refused_where_a_second_text_would_stay_the_old_one(tmp_path):
    built, _, _, _, trace = _recorded("instructblip", tmp_path)
    with pytest.raises(probe.errors.ReplayError, match="qformer_input_ids"):
        probe.replay(trace, built.model, built.processor).reworded("What is it?")


def test_image_columns_of_kosmos_are_those_of_its_position_mask(tmp_path):
    built, picture, _, _, trace = _recorded("kosmos-2", tmp_path)
    mask = built.inputs([picture])["image_embeds_position_mask"]
    assert trace.layout.image_positions.tolist() == torch.as_tensor(mask)[0].nonzero()[:, 0].tolist()
    assert trace.attention is not None and trace.attention.values.shape[-1] == int(torch.as_tensor(mask).sum())


@pytest.mark.parametrize(("kind", "why"), [("pi0", "robot"), ("mistral4", "text-only")])
def test_a_family_that_cannot_work_is_refused_by_one_sentence(kind, why):
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(model_type=kind)
    with pytest.raises(probe.errors.AttachError, match=why):
        probe.attach(model)


def test_an_answer_returned_alone_is_told_from_an_edited_prompt():
    start, answer = torch.tensor([[5, 6, 7]]), torch.tensor([[1, 2]])

    def watched():
        reader = StepLogProbs()
        for fed in (None, torch.tensor([[1]])):  # the first pass is given embeddings
            reader(torch.nn.Identity(), (), {"input_ids": fed}, SimpleNamespace(logits=torch.zeros(1, 1, 4)))
        return reader

    found = answer_in(answer, start, [watched()], alone=True)
    assert found is not None and found[0].tolist() == [[1, 2]]
    assert found[1] is not None and torch.allclose(found[1].log_probs, torch.full((1, 2), -torch.tensor(4.0).log()))
    assert answer_in(torch.tensor([[5, 7, 1, 2]]), start, [watched()], alone=True) is None
    assert answer_in(answer, start, [watched()], alone=False) is None
    continued = answer_in(torch.cat([start, answer], 1), start, [watched()], alone=False)
    assert continued is not None and continued[0].tolist() == [[1, 2]] and continued[1] is not None


def test_where_the_decoder_begins():
    ids = torch.zeros(2, 3, dtype=torch.long)

    def begun(given, start, encoder="vit"):
        model = SimpleNamespace(config=SimpleNamespace(encoder=SimpleNamespace(model_type=encoder)))
        return decoder_prompt(model, given, lambda name, default=None: start, ids).tolist()

    assert begun(None, [9]) == [[9], [9]]
    assert begun(torch.tensor([[4], [5]]), 9) == [[9, 4], [9, 5]]
    assert begun(torch.tensor([[9, 4], [9, 5]]), 9) == [[9, 4], [9, 5]]
    assert begun(torch.tensor([[4], [5]]), 9, "donut-swin") == [[4], [5]]
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        begun(None, None)


def test_columns_and_streams():
    places = torch.tensor([[False, True, True, False], [False, False, True, False]])
    columns, valid = columns_of(places)
    assert columns[0].tolist() == [1, 2] and columns[1, 0] == 2 and valid.tolist() == [[True, True], [True, False]]
    names = {"input_ids": 0, "attention_mask": 0, "qformer_input_ids": 0, "qformer_attention_mask": 0}
    assert [is_separate(name, names) for name in names] == [False, False, True, True]


def test_why_tokens_have_no_place_is_found_out_once(tmp_path):
    """Behind a Q-Former no token has a place; the encoder is not run again at every answer to find that."""
    built = build("blip-2", "pil")
    calls: list[int] = []
    hook = built.model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    with probe.attach(built.model, built.processor) as p, p.record(tmp_path) as recording:
        runs = []
        for _ in range(2):
            inputs = built.inputs([built.picture()])
            calls.clear()
            built.generate(inputs)
            runs.append(len(calls))
    hook.remove()
    reasons = [[note for note in trace.notes if "no boxes" in note] for trace in recording.traces]
    assert reasons[0] == reasons[1] and "through attention alone" in reasons[0][0]
    assert runs[1] < runs[0]
