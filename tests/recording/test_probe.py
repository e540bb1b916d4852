"""attach, record, masked, detach: nothing the user gets may change, and what is recorded must be right."""

from __future__ import annotations

import gc
import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from transformers import TextStreamer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lvlm_probe as probe
from lvlm_probe.hooks import Shadow
from lvlm_probe.images import ImagePath
from lvlm_probe.recording.probe import Attachment
from lvlm_probe.recording.recorder import GenerationRecorder


def pictures(count: int, *, seed: int = 0, size: tuple[int, int] = (90, 60)) -> list[Image.Image]:
    """Smooth random pictures, so that different regions say different things."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (count, 6, 9, 3), dtype=np.uint8)
    return [Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC) for cells in small]


@pytest.fixture
def llava():
    return tiny_models.build("llava")


def ask(model, processor, images=None, question="What is in the picture?", name="llava"):
    return tiny_models.inputs(name, model, processor, images or pictures(1), question)


def batch(model, processor):
    """Two prompts of different lengths, padded on the left."""
    images = pictures(2)
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in ("What?", "How many red shapes are there in this picture?")
    ]
    processor.tokenizer.padding_side = "left"
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


def generate(model, inputs, **kwargs):
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, **kwargs})


def recorded(model, processor, make_inputs, tmp_path, record=None, **kwargs):
    """Plain and recorded generation, compared to the last bit; gives the recording."""
    expected = generate(model, make_inputs(model, processor), **kwargs)
    state = torch.random.get_rng_state()
    with probe.attach(model, processor) as p:
        inputs = make_inputs(model, processor)
        with p.record(tmp_path, **(record or {})) as recording:
            found = generate(model, inputs, **kwargs)
    assert torch.equal(torch.random.get_rng_state(), state)
    both = [output if isinstance(output, torch.Tensor) else output.sequences for output in (expected, found)]
    assert torch.equal(*both)
    return recording


def largest_difference(trace, model, processor):
    return probe.verify(trace, model, processor).largest_difference


def test_the_question_is_the_users_turn_or_there_is_none(llava, tmp_path):
    """Without ``question=``: by the chat template; a prompt that does not follow it is a prompt and no question."""
    model, processor = llava

    def raw(model, processor):
        return processor(text="<image>\nDescribe this", images=pictures(1), return_tensors="pt")

    (asked,) = recorded(model, processor, ask, tmp_path / "asked").traces
    (bare,) = recorded(model, processor, raw, tmp_path / "bare").traces
    (named,) = recorded(model, processor, raw, tmp_path / "named", {"question": "What is it?"}).traces
    assert asked.question == "What is in the picture?" and "USER" not in asked.describe()
    assert bare.question is None and named.question == "What is it?"
    assert "Describe this" in bare.describe() and "\nquestion" not in bare.describe()
    assert "Prompt: " in bare._repr_html_() and "Describe this" in bare._repr_html_()
    replayed = probe.replay(bare, model, processor)
    assert replayed.reworded("What?").prompt_length < replayed.prompt_length, "all of the prompt is what is replaced"


# ---------------------------------------------------------------------------------------------------- generation modes


def test_greedy(llava, tmp_path):
    model, processor = llava
    recording = recorded(model, processor, ask, tmp_path)
    (trace,) = recording.traces
    assert trace.status == "complete" and trace.log_probs_source == "generation" and not recording.faults
    assert "".join(trace.tokens) == processor.tokenizer.decode(trace.token_ids)
    assert trace.image.size == (90, 60)
    assert largest_difference(trace, model, processor) <= 1e-4


def test_sampling(llava, tmp_path):
    model, processor = llava
    recording = recorded(
        model, processor, ask, tmp_path, do_sample=True, temperature=1.7, top_k=20, num_return_sequences=3
    )
    assert [trace.batch_row for trace in recording.traces] == [0, 1, 2]
    for trace in recording.traces:
        assert largest_difference(trace, model, processor) <= 1e-4


def test_left_padded_batch(llava, tmp_path):
    model, processor = llava
    traces = recorded(model, processor, batch, tmp_path).traces
    assert [len(trace.input_ids) for trace in traces] == sorted(len(trace.input_ids) for trace in traces)
    assert len(traces[0].input_ids) < len(traces[1].input_ids)
    for trace, image in zip(traces, pictures(2), strict=True):
        assert np.array_equal(np.asarray(trace.image), np.asarray(image))
        assert largest_difference(trace, model, processor) <= 1e-4
        assert trace.attention.values.shape[0] == len(trace.token_ids)


def test_a_row_of_a_batch_is_what_it_is_alone(llava, tmp_path):
    model, processor = llava
    together = recorded(model, processor, batch, tmp_path / "together").traces[1]
    alone = recorded(
        model,
        processor,
        lambda m, p: ask(m, p, [pictures(2)[1]], "How many red shapes are there in this picture?"),
        tmp_path / "alone",
    ).traces[0]
    assert np.array_equal(together.token_ids, alone.token_ids)
    np.testing.assert_allclose(together.log_probs, alone.log_probs, atol=1e-4)
    np.testing.assert_allclose(together.attention.values, alone.attention.values, atol=2e-3)
    np.testing.assert_allclose(together.llr, alone.llr, atol=1e-4)


def test_a_row_without_a_picture_is_left_out(llava, tmp_path):
    """Two pictures, two rows, and both pictures belong to the first."""
    model, processor = llava

    def make_inputs(model, processor):
        content = [[{"type": "image"}] * count + [{"type": "text", "text": "What?"}] for count in (2, 0)]
        texts = [
            processor.apply_chat_template([{"role": "user", "content": item}], add_generation_prompt=True)
            for item in content
        ]
        processor.tokenizer.padding_side = "left"
        return processor(text=texts, images=pictures(2), padding=True, return_tensors="pt")

    recording = recorded(model, processor, make_inputs, tmp_path)
    (trace,) = recording.traces
    assert trace.batch_row == 0 and len(trace.images) == 2 and not recording.faults
    assert largest_difference(trace, model, processor) <= 1e-4


def test_passes_that_are_not_one_per_token_give_no_attention(llava, tmp_path):
    """An extra pass between two tokens, as guidance makes: rows read off it would belong to no token."""
    model, processor = llava

    def once_more(input_ids, scores):
        with torch.no_grad():
            model(input_ids=input_ids[:, -3:])
        return scores

    (trace,) = recorded(model, processor, ask, tmp_path, logits_processor=[once_more]).traces
    assert trace.attention is None and trace.log_probs_source == "teacher_forced"
    assert any("one pass per answer token" in note for note in trace.notes)


def test_a_decoder_that_runs_all_its_layers_twice_gives_no_attention(llava, tmp_path):
    model, processor = llava
    tiny_models.loop(model, [0, 1, 2])
    (trace,) = recorded(model, processor, ask, tmp_path).traces
    assert trace.attention is None and trace.log_probs_source == "generation" and trace.llr is not None
    assert any("one pass per answer token" in note for note in trace.notes)


def test_streamer_sees_the_same_text(llava, tmp_path):
    model, processor = llava

    class Kept(TextStreamer):
        def __init__(self):
            super().__init__(processor.tokenizer)
            self.text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    streams = [Kept(), Kept()]
    generate(model, ask(model, processor), streamer=streams[0])
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        generate(model, ask(model, processor), streamer=streams[1])
    assert streams[0].text == streams[1].text != ""
    assert len(recording.traces) == 1


def test_cut_answer_is_noted(llava, tmp_path):
    model, processor = llava
    (trace,) = recorded(model, processor, ask, tmp_path, max_new_tokens=3).traces
    assert len(trace.token_ids) == 3
    assert any("cut after 3 tokens" in note for note in trace.notes)


def test_stop_strings(llava, tmp_path):
    model, processor = llava
    whole = generate(model, ask(model, processor))
    prompt = ask(model, processor)["input_ids"].shape[1]
    stop = processor.tokenizer.decode(whole[0, prompt + 2 : prompt + 3])
    (trace,) = recorded(model, processor, ask, tmp_path, stop_strings=[stop], tokenizer=processor.tokenizer).traces
    assert 1 <= len(trace.token_ids) <= 3
    assert largest_difference(trace, model, processor) <= 1e-4


def test_stop_at_end_of_sequence(llava, tmp_path):
    """A token that the model says anyway is declared the end; it belongs to the answer and is special."""
    model, processor = llava
    whole = generate(model, ask(model, processor))
    prompt = ask(model, processor)["input_ids"].shape[1]
    end = int(whole[0, prompt + 2])
    (trace,) = recorded(model, processor, ask, tmp_path, eos_token_id=end).traces
    assert trace.token_ids[-1] == end and bool(trace.special[-1]) and end not in trace.token_ids[:-1]
    assert largest_difference(trace, model, processor) <= 1e-4


def test_several_images_in_one_prompt(llava, tmp_path):
    model, processor = llava
    (trace,) = recorded(model, processor, lambda m, p: ask(m, p, pictures(3)), tmp_path).traces
    assert len(trace.images) == 3
    assert sorted(set(trace.layout.image_index.tolist())) == [0, 1, 2]
    assert largest_difference(trace, model, processor) <= 1e-4


def test_a_change_of_the_working_directory_moves_no_trace(llava, tmp_path, monkeypatch):
    model, processor = llava
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with probe.attach(model, processor) as p, p.record("run") as recording:
        inputs = ask(model, processor)
        monkeypatch.chdir(tmp_path / "elsewhere")
        generate(model, inputs)
    assert [path.parent for path in recording.paths] == [tmp_path / "run"]
    assert not list((tmp_path / "elsewhere").iterdir())
    with pytest.raises(probe.ProbeError, match="directory for traces is named by its path; got an empty text"):
        probe.attach(model, processor).record("")


@pytest.mark.parametrize("name", ["record", "masked"])
def test_a_block_that_is_not_entered_is_told_once(llava, tmp_path, name):
    model, processor = llava
    with probe.attach(model, processor) as p:
        inputs, given = ask(model, processor), {"record": tmp_path / "run", "masked": torch.zeros(4, 4)}[name]
        plain = generate(model, inputs)
        block = getattr(p, name)(given)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with ThreadPoolExecutor(1) as other:  # which has made none
                assert torch.equal(other.submit(generate, model, inputs).result(), plain)
        with pytest.warns(probe.ProbeWarning, match=rf"{name}\(…\) was called and does nothing yet") as said:
            assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), plain)
        assert [warning.filename for warning in said] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(**inputs, max_new_tokens=6, do_sample=False)
            with block:
                model.generate(**inputs, max_new_tokens=6, do_sample=False)
            model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert len(list(tmp_path.rglob("*.h5"))) == (name == "record")


def test_several_calls_make_several_traces(llava, tmp_path):
    model, processor = llava
    with probe.attach(model, processor) as p:
        prepared = [ask(model, processor, pictures(1, seed=seed)) for seed in range(3)]
        with p.record(tmp_path) as recording:
            for inputs in prepared:
                generate(model, inputs)
    store = probe.open_store(tmp_path)
    assert len(store) == 3 == len(recording.paths)
    for seed, trace in enumerate(store):
        assert np.array_equal(np.asarray(trace.image), np.asarray(pictures(1, seed=seed)[0]))


def test_beam_search_is_replayed(llava, tmp_path):
    model, processor = llava
    (trace,) = recorded(model, processor, ask, tmp_path, num_beams=3).traces
    assert trace.log_probs_source == "teacher_forced" and trace.attention is None
    assert any("beam search" in note for note in trace.notes)
    assert np.isfinite(trace.log_probs).all()


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["inference", "autocast"],
)
def test_inside_the_users_own_contexts(llava, tmp_path, context):
    model, processor = llava
    inputs = ask(model, processor)
    with context():
        expected = generate(model, inputs)
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        inputs = ask(model, processor)
        with context():
            found = generate(model, inputs)
    (trace,) = recording.traces
    assert torch.equal(expected, found) and trace.status == "complete" and trace.attention is not None


@pytest.mark.parametrize("extra", [{"return_dict_in_generate": True, "output_logits": True}, {"use_cache": False}])
def test_other_ways_to_call(llava, tmp_path, extra):
    model, processor = llava
    (trace,) = recorded(model, processor, ask, tmp_path, **extra).traces
    assert trace.log_probs_source == "generation"
    assert largest_difference(trace, model, processor) <= 1e-4


def test_recorded_log_probs_are_those_of_the_logits(llava, tmp_path):
    model, processor = llava
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        out = generate(model, ask(model, processor), return_dict_in_generate=True, output_logits=True)
    trace = recording.traces[0]
    expected = [
        float(step[0].double().log_softmax(-1)[token]) for step, token in zip(out.logits, trace.token_ids, strict=True)
    ]
    np.testing.assert_allclose(trace.log_probs, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("heads", ["mean", "all"])
def test_recorded_attention_is_the_models(name, attn, heads, tmp_path):
    """Against eager `output_attentions` over prompt and answer in one pass."""
    model, processor = tiny_models.build(name, attn_implementation=attn)
    with probe.attach(model, processor) as p, p.record(tmp_path, heads=heads) as recording:
        inputs = ask(model, processor, name=name)
        out = generate(model, inputs)
    trace = recording.traces[0]
    reference, _ = tiny_models.build(name, attn_implementation="eager")
    inputs = {
        key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    if name == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (out == reference.config.image_token_id).int()
    with torch.no_grad():
        full = reference(input_ids=out, **inputs, output_attentions=True)
    maps = torch.stack(full.attentions)[:, 0]  # layer, head, query, key
    first = len(trace.input_ids) - 1
    rows = maps[:, :, first : first + len(trace.token_ids)][..., trace.layout.image_positions.copy()].permute(
        2, 0, 1, 3
    )
    expected = rows.mean(2, keepdim=True) if heads == "mean" else rows
    np.testing.assert_allclose(trace.attention.values, expected.numpy(), atol=5e-4)  # kept in half precision
    np.testing.assert_allclose(trace.attention.text_mass, 1 - expected.sum(-1).numpy(), atol=5e-4)


def test_logits_processors_do_not_change_what_is_recorded(llava, tmp_path):
    """log P(a_t) is the model's own, not what sampling tricks make of it."""
    model, processor = llava
    plain = recorded(model, processor, ask, tmp_path / "a").traces[0]
    bent = recorded(
        model, processor, ask, tmp_path / "b", do_sample=True, temperature=0.01, repetition_penalty=1.0
    ).traces[0]
    same = np.flatnonzero(np.cumprod(plain.token_ids == bent.token_ids))
    assert len(same)
    np.testing.assert_allclose(plain.log_probs[same], bent.log_probs[same], atol=1e-5)


def test_text_only_prompt_warns_once_and_goes_on(llava, tmp_path):
    model, processor = llava
    inputs = processor(text=["What is a picture?"], return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        with pytest.warns(probe.ProbeWarning, match="no image"):
            found = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with warnings.catch_warnings(record=True) as again:
            warnings.simplefilter("always")
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert not [warning for warning in again if issubclass(warning.category, probe.ProbeWarning)]
    assert torch.equal(expected, found)
    assert recording.paths == [] and list(tmp_path.iterdir()) == []
    (reason,) = recording.passed_over  # once, however many calls there are
    assert "no image" in reason


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_whole_grey_levels_are_told_to_be_no_inputs_for_masks(name, tmp_path):
    """What processors give when told neither to rescale nor to normalise, and models take."""
    model, processor = tiny_models.build(name)

    def untouched():
        text = ask(model, processor, name=name)
        given = processor.image_processor(pictures(1), return_tensors="pt", do_rescale=False, do_normalize=False)
        return {**text, "pixel_values": given["pixel_values"]}

    assert untouched()["pixel_values"].dtype == torch.uint8
    expected = model.generate(**untouched(), max_new_tokens=4, do_sample=False)
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        with pytest.warns(probe.ProbeWarning, match=r"pixel_values .* whole grey levels .* do_rescale=False"):
            found = model.generate(**untouched(), max_new_tokens=4, do_sample=False)
    assert torch.equal(expected, found) and not recording.paths and len(recording.passed_over) == 1


# --------------------------------------------------------------------------------------------- where pictures come from


def test_images_argument_serves_inputs_made_before_attach(llava, tmp_path):
    model, processor = llava
    inputs = ask(model, processor)
    with probe.attach(model, processor) as p, p.record(tmp_path, images=pictures(1)) as recording:
        generate(model, inputs)
    trace = recording.traces[0]
    assert trace.image.size == (90, 60)
    assert largest_difference(trace, model, processor) <= 1e-4


def test_without_pictures_masks_live_in_pixel_space(llava, tmp_path):
    model, processor = llava
    inputs = ask(model, processor)
    with probe.attach(model) as p, p.record(tmp_path) as recording:
        generate(model, inputs)
    trace = recording.traces[0]
    assert any("pixel-input space" in note for note in trace.notes)
    replay = probe.replay(trace, model)
    assert replay.image_sizes == [(56, 56)]
    half = torch.ones(1, 4, 4)
    half[:, :, 2:] = 0
    assert not torch.allclose(replay.log_probs(half), replay.log_probs(torch.ones(1, 4, 4)))


def test_image_processor_alone_is_enough_for_masks(llava, tmp_path):
    model, processor = llava
    with probe.attach(model, processor.image_processor) as p, p.record(tmp_path) as recording:
        generate(model, ask(model, processor))
    trace = recording.traces[0]
    assert trace.image.size == (90, 60)
    assert trace.tokens[0] == f"<{trace.token_ids[0]}>"


def test_wrong_picture_is_refused(llava, tmp_path):
    model, processor = llava
    inputs = ask(model, processor)
    with probe.attach(model, processor) as p, p.record(tmp_path, images=pictures(1, seed=5)) as recording:
        with pytest.warns(probe.ProbeWarning, match="not the ones"):
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
    (trace,) = recording.traces
    assert not trace.images and any("images=" in note for note in trace.notes)


# ------------------------------------------------------------------------------------------------------------- lifetime


def snapshot(model, processor):
    generate(model, ask(model, processor))  # transformers keeps things of its own on a model that has generated
    return (
        dict(ALL_ATTENTION_FUNCTIONS),
        {
            path: (dict(m._forward_hooks), dict(m._forward_pre_hooks), sorted(vars(m)))
            for path, m in model.named_modules()
        },
        sorted(vars(processor.image_processor)),
        {path: m.config for path, m in model.named_modules() if hasattr(m, "config")},
    )


def same(before, after):
    return before[:3] == after[:3] and all(after[3][path] is config for path, config in before[3].items())


def test_detach_leaves_nothing(llava, tmp_path):
    model, processor = llava
    recorded(model, processor, ask, tmp_path)  # our attention function is registered once for the process
    before = snapshot(model, processor)
    p = probe.attach(model, processor)
    with p.record(tmp_path):
        generate(model, ask(model, processor))
    p.detach()
    p.detach()
    assert same(before, snapshot(model, processor))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_pickles_after_detach(name, tmp_path):
    model, processor = tiny_models.build(name)
    with probe.attach(model, processor) as p, p.record(tmp_path):
        if name != "llava":  # a LLaVA that has generated holds a hook of transformers' own, which does not pickle
            generate(model, ask(model, processor, name=name))
    pickle.loads(pickle.dumps(model))


def test_garbage_collection_detaches(llava):
    model, processor = llava
    before = snapshot(model, processor)
    p = probe.attach(model, processor)
    assert not same(before, snapshot(model, processor))
    del p
    gc.collect()
    assert same(before, snapshot(model, processor))


def test_exception_in_generate_leaves_nothing_but_the_probe(llava, tmp_path):
    model, processor = llava
    before = snapshot(model, processor)

    class Stop(Exception):
        pass

    def explode(input_ids, scores, **kwargs):
        raise Stop

    with pytest.raises(Stop), probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        generate(model, ask(model, processor), stopping_criteria=[explode])
    assert recording.paths == []
    assert same(before, snapshot(model, processor))


def test_attach_twice_is_an_error_and_two_models_are_not(llava, tmp_path):
    model, processor = llava
    other, _ = tiny_models.build("llava")
    with probe.attach(model, processor) as p:
        with pytest.raises(probe.errors.AttachError, match="already"):
            probe.attach(model, processor)
        with probe.attach(other, processor) as q, p.record(tmp_path / "p") as first, q.record(tmp_path / "q") as second:
            generate(model, ask(model, processor))
            generate(other, ask(other, processor))
            generate(model, ask(model, processor))
        assert (len(first.paths), len(second.paths)) == (2, 1)
    probe.attach(model, processor).detach()


def test_compiles_after_detach(llava, tmp_path):
    model, processor = llava
    inputs = ask(model, processor)
    with torch.no_grad():
        expected = model(**inputs).logits
    with probe.attach(model, processor) as p, p.record(tmp_path):
        generate(model, inputs)
    compiled = torch.compile(model.model.vision_tower, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(inputs["pixel_values"])
        assert torch.equal(model(**inputs).logits, expected)


def test_compiled_wrapper_is_refused_with_the_way_out(llava):
    with pytest.raises(probe.errors.AttachError, match="before compiling"):
        probe.attach(torch.compile(llava[0], backend="eager"))


def test_a_wrapper_that_does_not_generate_names_what_does(llava):
    with pytest.raises(probe.errors.AttachError, match=r"DataParallel wraps .* attach its `\.module`"):
        probe.attach(torch.nn.DataParallel(llava[0]))


def test_what_is_no_vision_language_model_is_refused():
    with pytest.raises(probe.errors.AttachError, match="not a Hugging Face generative model"):
        probe.attach(torch.nn.Linear(2, 2))
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    with pytest.raises(probe.errors.AttachError, match="text-only"):
        probe.attach(LlamaForCausalLM(config))


def test_an_attached_processor_says_and_saves_what_it_is(llava, tmp_path):
    model, processor = llava
    said, settings = repr(processor), processor.image_processor.to_dict()
    processor.save_pretrained(tmp_path / "before")
    with probe.attach(model, processor) as p, p.record(tmp_path / "traces"):
        assert repr(processor) == said
        assert processor.image_processor.to_dict() == settings
        processor.save_pretrained(tmp_path / "attached")
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "attached" / file.name).read_bytes() == file.read_bytes()


def test_a_tokenizer_is_no_processor(llava):
    model, processor = llava
    with pytest.warns(probe.errors.ProbeWarning, match="sees no images.*give the model's processor"):
        probe.attach(model, processor.tokenizer).detach()
    probe.attach(model, processor.image_processor).detach()
    probe.attach(model).detach()


def test_a_recording_that_meets_no_generate_says_so(llava, tmp_path):
    model, processor = llava
    with probe.attach(model, processor) as p:
        with pytest.warns(probe.ProbeWarning, match="nothing was recorded: no generate") as said:
            with p.record(tmp_path):
                pass
        assert said[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error", probe.ProbeWarning)
            with p.record(tmp_path):
                generate(model, ask(model, processor))
            with pytest.raises(KeyError), p.record(tmp_path):
                raise KeyError  # what is wrong is told by the error


def test_recording_needs_a_directory(llava, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with probe.attach(*llava) as p, pytest.raises(probe.ProbeError, match="directory"):
        p.record(file)
    with pytest.raises(probe.errors.AttachError, match="detached"), p.record(tmp_path):
        pass


def test_training_state_and_generation_state_are_left_alone(tmp_path):
    model, processor = tiny_models.build("qwen2_5_vl")
    inputs = ask(model, processor, name="qwen2_5_vl")
    generate(model, inputs)
    deltas = model.model.rope_deltas.clone()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        generate(model, ask(model, processor, name="qwen2_5_vl"))
    assert torch.equal(model.model.rope_deltas, deltas)
    probe.replay(recording.traces[0], model, processor).log_probs(torch.full((1, 4, 4), 0.5))
    assert torch.equal(model.model.rope_deltas, deltas)
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


# --------------------------------------------------------------------------------------------------------------- faults


FAULTS = {
    "begin": (GenerationRecorder, "begin"),
    "finish": (GenerationRecorder, "finish"),
    "log_probs": ("lvlm_probe.recording.log_probs.StepLogProbs", "__call__"),
    "complete": (GenerationRecorder, "complete"),
    "attention": ("lvlm_probe.attention.RowTap", "_read"),
    "collect": ("lvlm_probe.attention.RowTap", "collect"),
    "watch": ("lvlm_probe.recording.processor_watch.ProcessorWatch", "add"),
    "describe": (Attachment, "describe_model"),
    "write": ("lvlm_probe.recording.probe", "write"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_any_hook_leaves_the_output_alone(llava, tmp_path, monkeypatch, fault):
    model, processor = llava
    before = snapshot(model, processor)
    expected = generate(model, ask(model, processor))
    owner, name = FAULTS[fault]

    def broken(*args, **kwargs):
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(
            f"{owner}.{name}" if isinstance(owner, str) else owner, *([] if isinstance(owner, str) else [name]), broken
        )
        with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
            with pytest.warns(probe.ProbeWarning) as caught:
                torch.manual_seed(7)
                found = model.generate(**ask(model, processor), max_new_tokens=6, do_sample=False)
            with warnings.catch_warnings(record=True) as repeated:
                warnings.simplefilter("always")
                torch.manual_seed(7)
                again = model.generate(**ask(model, processor), max_new_tokens=6, do_sample=False)
        with probe.attach(model, processor) as p, p.record(tmp_path / "strict"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # as under `python -W error`
                torch.manual_seed(7)
                strict = model.generate(**ask(model, processor), max_new_tokens=6, do_sample=False)
    assert torch.equal(strict, expected)
    assert not [warning for warning in repeated if issubclass(warning.category, probe.ProbeWarning)]
    assert torch.equal(found, expected) and torch.equal(again, expected)
    assert len([warning for warning in caught if issubclass(warning.category, probe.ProbeWarning)]) == 1
    assert any("injected" in sentence for sentence in recording.faults)
    assert same(before, snapshot(model, processor))
    if fault in ("log_probs", "complete", "attention", "collect"):
        for trace in recording.traces:
            assert trace.status == "error" and "injected" in trace.error
            if fault != "complete":
                assert largest_difference(trace, model, processor) <= 1e-4
    elif fault == "watch":
        assert any("could not be watched" in note for note in recording.traces[0].notes)
    elif fault == "describe":  # costs the description, not the answer
        assert recording.traces[0].status == "complete" and not recording.traces[0].model.get("fingerprint")
        assert largest_difference(recording.traces[0], model, processor) <= 1e-4
    else:
        assert recording.paths == []


@pytest.mark.parametrize("presses", [1, 2])
def test_interrupted_while_it_is_detached_it_is_detached_all_the_same(llava, monkeypatch, presses):
    model, processor = llava
    real, left = Shadow.remove, [KeyboardInterrupt()] * presses

    def interrupted(self):
        if left:
            raise left.pop()
        real(self)

    monkeypatch.setattr(Shadow, "remove", interrupted)
    with pytest.raises(KeyboardInterrupt), probe.attach(model, processor) as p:
        pass
    p.detach()  # for who presses again in what the first one led to
    assert "generate" not in vars(model)
    probe.attach(model, processor).detach()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])  # as a handler of SIGTERM raises it
@pytest.mark.parametrize("where", ["the baseline pass", "the description", "the file"])
def test_interrupt_behind_the_answer_keeps_it(llava, tmp_path, monkeypatch, where, error):
    model, processor = llava
    owner, name = {
        "the baseline pass": (GenerationRecorder, "complete"),
        "the description": (Attachment, "describe_model"),
        "the file": (sys.modules[Attachment.__module__], "write"),
    }[where]
    plain, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(name)
        if len(calls) == 1:
            raise error
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording, pytest.raises(error):
        generate(model, ask(model, processor))
    (trace,) = recording.traces
    assert trace.status == "complete" and trace.model["fingerprint"] and not list(tmp_path.glob("*.part"))
    assert (trace.llr is None) is (where == "the baseline pass")
    assert largest_difference(trace, model, processor) <= 1e-4


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.4, 0.6, 0.8, 0.95])
def test_interrupt_while_the_answer_is_taken_down_keeps_it(llava, tmp_path, monkeypatch, share):
    model, processor = llava
    plain, total, package = GenerationRecorder.finish, [], str(Path(probe.__file__).parent)

    def counted(stop, self, output):
        """``finish``, interrupted as its call number ``stop`` of a function of the package begins."""
        left = [stop]

        def watch(frame, event, _):
            if event == "call" and frame.f_code.co_filename.startswith(package):
                left[0] -= 1
                if left[0] == -1:
                    raise KeyboardInterrupt

        sys.setprofile(watch)
        try:
            return plain(self, output)
        finally:
            sys.setprofile(None)
            total.append(stop - left[0])

    inputs = ask(model, processor)
    with probe.attach(model, processor) as p:
        monkeypatch.setattr(GenerationRecorder, "finish", lambda *args: counted(10**9, *args))
        with p.record(tmp_path / "plain") as whole:
            generate(model, inputs)
        stops = iter([int(share * total[0]), 10**9])
        monkeypatch.setattr(GenerationRecorder, "finish", lambda *args: counted(next(stops), *args))
        with p.record(tmp_path / "interrupted") as recording, pytest.raises(KeyboardInterrupt):
            generate(model, inputs)
    (expected,), (trace,) = whole.traces, recording.traces
    assert trace.status == "complete" and trace.tokens == expected.tokens and next(stops, None) is None
    assert np.array_equal(trace.log_probs, expected.log_probs) and np.array_equal(trace.llr, expected.llr)
    lost = [note for note in trace.notes if "an interrupt came" in note]
    assert (trace.attention is None) is bool(lost) and len(set(trace.notes)) == len(trace.notes)
    if not lost:
        assert np.array_equal(trace.attention.values, expected.attention.values)
    assert "forward" not in vars(model) and not model._forward_hooks


# --------------------------------------------------------------------------------------------------------------- points


def test_encoder_and_merger_outputs_when_asked(llava, tmp_path):
    model, processor = llava
    with probe.attach(model, processor) as p, p.record(tmp_path, points=("encoder", "merger")) as recording:
        inputs = ask(model, processor)
        generate(model, inputs)
    trace = recording.traces[0]
    with torch.no_grad():
        kept = {}
        handle = model.model.multi_modal_projector.register_forward_hook(lambda m, a, o: kept.update(o=o))
        model(**inputs)
        handle.remove()
    np.testing.assert_allclose(
        np.asarray(trace.point("model.multi_modal_projector.output").values), kept["o"].numpy(), atol=1e-5
    )
    assert "model.vision_tower.output" in trace.points


def test_boxes_can_be_left_out(llava, tmp_path):
    model, processor = llava
    (trace,) = recorded(model, processor, ask, tmp_path, record={"boxes": False}).traces
    assert trace.layout.patch_box is None and trace.attention is not None


@pytest.mark.quick
def test_a_point_that_is_gone_is_a_note_and_not_a_crash(llava, tmp_path):
    model, processor = llava
    model.further = torch.nn.Identity()
    with probe.attach(model, processor) as p, p.record(tmp_path, points=("further",)) as recording:
        del model.further
        with pytest.warns(probe.ProbeWarning, match="no module matches .further."):
            model.generate(**ask(model, processor), max_new_tokens=2, do_sample=False)
    assert recording.paths == []


# --------------------------------------------------------------------------------------------------------------- masked


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_masked_forward_is_differentiable_and_restores(name):
    model, processor = tiny_models.build(name)
    with probe.attach(model, processor) as p:
        inputs = ask(model, processor, name=name)
        with torch.no_grad():
            plain = model(**inputs).logits
            with p.masked(torch.ones(5, 5)):
                assert torch.equal(model(**inputs).logits, plain)
        mask = torch.full((5, 5), 0.5, requires_grad=True)
        with p.masked(mask):
            model(**inputs).logits[0, -1].log_softmax(-1)[3].backward()
        assert mask.grad.abs().max() > 0
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, plain)


def test_masked_generate_sees_what_a_composite_picture_shows(llava):
    """Masking by hand (paste the baseline into the picture, run the processor) gives the same answer."""
    model, processor = llava
    image = pictures(1)[0]
    grey = Image.new("RGB", image.size, (10, 200, 30))
    mask = torch.ones(2, 2)
    mask[:, 1] = 0
    by_hand = image.copy()
    by_hand.paste(grey.crop((45, 0, 90, 60)), (45, 0))
    with probe.attach(model, processor) as p:
        inputs = ask(model, processor, [image])
        wide = torch.nn.functional.interpolate(mask[None, None], size=(60, 90), mode="nearest")[0, 0]
        with p.masked(wide, baseline=grey, mode="exact"):
            masked = generate(model, inputs)
    assert torch.equal(masked, generate(model, ask(model, processor, [by_hand])))


@pytest.mark.quick
def test_a_replay_inside_masked_is_not_masked(llava, tmp_path):
    model, processor = llava
    with probe.attach(model, processor) as p:
        with p.record(tmp_path) as recording:
            inputs = ask(model, processor)
            generate(model, inputs)
        replay = probe.replay(recording.traces[0], model, processor)
        with p.masked(torch.zeros(4, 4)), torch.no_grad():
            assert not torch.equal(model(**inputs).logits[0, -1], model.forward(**inputs).logits[0, -1])
            assert torch.equal(replay.log_probs(None)[0], replay.log_probs(torch.ones(1, 4, 4))[0])
            np.testing.assert_allclose(replay.original_log_probs, recording.traces[0].log_probs, atol=1e-4)


def test_masked_generation_is_not_recorded(llava, tmp_path):
    model, processor = llava
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        inputs = ask(model, processor)
        with p.masked(torch.zeros(4, 4)), pytest.warns(probe.ProbeWarning, match="masked"):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert recording.paths == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": "median"}, "heads is 'mean' or 'all'; got 'median'"),
        ({"baseline": "grey"}, "no baseline 'grey'; choose one of blur"),
        ({"baseline": ["blur", 3]}, "no baseline 3"),
        ({"points": "encodr"}, "no module matches 'encodr'"),
        ({"points": ("hidden", "encodr")}, "no module matches 'encodr'"),
        ({"meta": ["a"]}, "meta is a mapping"),
    ],
)
def test_options_that_are_none_are_said_before_there_is_an_answer(llava, tmp_path, options, said):
    model, processor = llava
    with probe.attach(model, processor) as p:
        with pytest.raises(probe.ProbeError, match=said):
            p.record(tmp_path, **options)
        with pytest.raises(probe.ProbeError, match=said):
            p.stream(tmp_path, record=options, **ask(model, processor))
        for verb in (p.record, p.stream):
            with pytest.raises(probe.ProbeError, match=r"path; got a BatchFeature \(inputs of the model go by name"):
                verb(ask(model, processor))


def test_one_point_may_be_given_as_a_text(llava, tmp_path):
    model, processor = llava
    with probe.attach(model, processor) as p:
        with p.record(tmp_path, points="merger", llr=False, boxes=False) as recording:
            generate(model, ask(model, processor))
    assert "model.multi_modal_projector.output" in recording.traces[0].points


def test_masks_that_do_not_fit(llava):
    model, processor = llava
    with probe.attach(model, processor) as p:
        inputs = ask(model, processor, pictures(2))
        with pytest.raises(probe.errors.MaskError, match=r"\(2, row, col\)"), p.masked(torch.ones(3, 4, 4)):
            model(**inputs)
        with pytest.raises(probe.errors.MaskError), p.masked([[1.0]]):
            pass
        with pytest.raises(probe.errors.ImageError, match="no pixel inputs"), p.masked(torch.ones(4, 4)):
            model(input_ids=inputs["input_ids"][:, :3])


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_pictures_of_other_modes_are_kept_as_the_processor_saw_them(llava, tmp_path, mode):
    model, processor = llava
    picture = pictures(1)[0].convert(mode)
    if mode == "RGBA":
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        inputs = ask(model, processor, [picture])
        generate(model, inputs)
    trace = recording.traces[0]
    replay = probe.replay(trace, model, processor)
    assert torch.equal(replay.path.inputs["pixel_values"], inputs["pixel_values"])
    assert largest_difference(trace, model, processor) <= 1e-4


def test_our_own_processor_calls_do_not_push_out_the_users(llava, tmp_path):
    model, processor = llava
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        prepared = ask(model, processor)
        generate(model, ask(model, processor, pictures(1, seed=4)))
        for size in ((70, 40), (71, 40), (72, 40)):  # each traces a geometry of its own
            ImagePath.from_processor(processor.image_processor, pictures(1, size=size)).apply(torch.ones(1, 2, 2))
        generate(model, prepared)
    assert np.array_equal(np.asarray(recording.traces[1].image), np.asarray(pictures(1)[0]))
