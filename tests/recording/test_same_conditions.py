"""Which model, which processor, which conditions: what a trace compares was made alike."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from torch import nn
from transformers import DynamicCache, StaticCache

import lvlm_probe as probe
from lvlm_probe.models.fingerprint import describe_model, fingerprint, same_fingerprint
from lvlm_probe.recording.conditions import offloads_its_cache, other_conditions, without_image
from lvlm_probe.recording.log_probs import StepLogProbs


@pytest.fixture
def llava():
    return tiny_models.build("llava")


def ask(llava, images=None, question="What is in the picture?", name="llava"):
    model, processor = llava
    return tiny_models.inputs(name, model, processor, images or [tiny_models.picture(90, 60)], question)


def record(llava, tmp_path, inputs=None, *, images=None, **settings):
    """The traces of one call; inputs are made while attached unless given."""
    model, processor = llava
    with probe.attach(model, processor) as p, p.record(tmp_path, images=images) as recording:
        given = ask(llava) if inputs is None else inputs() if callable(inputs) else inputs
        model.generate(**{**given, "max_new_tokens": 4, "do_sample": False, **settings})
    return recording.traces


# ------------------------------------------------------------------------------------------------------- images= given


def edited(picture, box, colour):
    other = picture.copy()
    other.paste(colour, box)
    return other


@pytest.mark.parametrize("box", [(40, 20, 60, 40), (40, 20, 50, 30), (0, 0, 90, 60), (44, 28, 48, 32)])
@pytest.mark.parametrize("colour", [(30, 60, 220), (128, 128, 128), (255, 255, 0)])
def test_an_edited_picture_is_refused_however_small_the_edit(llava, tmp_path, box, colour):
    picture = Image.new("RGB", (90, 60), (200, 40, 40))
    inputs = ask(llava, [picture])
    with pytest.warns(probe.ProbeWarning, match="not the ones the pixel inputs were made from"):
        (trace,) = record(llava, tmp_path, inputs, images=[edited(picture, box, colour)])
    assert not trace.images and trace.status == "complete"


@pytest.mark.parametrize("turned", [(200, 40, 40), (60, 170, 40)])
def test_an_even_recolouring_is_refused_and_two_levels_are_not(llava, tmp_path, turned):
    inputs = ask(llava, [Image.new("RGB", (90, 60), (200, 42, 39))])
    given = [Image.new("RGB", (90, 60), turned)]
    if turned == (200, 40, 40):  # as far as another backend rounds
        (trace,) = record(llava, tmp_path, inputs, images=given)
        assert np.array_equal(np.asarray(trace.image), np.asarray(given[0]))
        assert not any("not the ones" in note for note in trace.notes)
        return
    with pytest.warns(probe.ProbeWarning, match="not the ones"):
        (trace,) = record(llava, tmp_path, inputs, images=given)
    assert not trace.images


@pytest.mark.parametrize("resample", [Image.Resampling.LANCZOS, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_resampling_and_another_dtype_are_admitted(llava, tmp_path, resample, dtype):
    model, processor = llava
    picture = tiny_models.picture(200, 140)
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    picture.paste(Image.fromarray(noise).resize((80, 80), Image.Resampling.NEAREST), (60, 30))
    inputs = ask(llava, [picture])
    inputs["pixel_values"] = processor.image_processor(images=[picture], resample=resample, return_tensors="pt")[
        "pixel_values"
    ].to(dtype)
    model.to(dtype)
    (trace,) = record((model, processor), tmp_path, inputs, images=[picture])
    assert np.array_equal(np.asarray(trace.image), np.asarray(picture))


class Plain:
    """An image processor of somebody's own, with settings but without a name of its kind among them."""

    model_input_names = ("pixel_values",)

    def __init__(self, inner):
        self.inner = inner

    def preprocess(self, images, return_tensors=None, **kwargs):
        return {"pixel_values": self.inner(images=images, return_tensors=return_tensors, **kwargs)["pixel_values"]}

    def __call__(self, images, **kwargs):
        return self.preprocess(images, **kwargs)

    def to_dict(self):
        return {"mean": list(self.inner.image_mean)}


def test_pictures_for_an_image_processor_of_ones_own_that_was_called_before(llava, tmp_path):
    model, processor = llava
    own, picture = Plain(processor.image_processor), tiny_models.picture(90, 60)
    inputs = ask(llava, [picture])
    with probe.attach(model, own) as p, p.record(tmp_path, images=[picture]) as recording:
        model.generate(**inputs, max_new_tokens=2)
    (trace,) = recording.traces
    assert np.array_equal(np.asarray(trace.image), np.asarray(picture))
    assert probe.replay(trace, model, own).image_sizes == [(90, 60)]


class Unfinished:
    """An image processor whose outputs the processor around it works on before the model is fed them, as Fuyu's."""

    model_input_names = ("images",)

    def __init__(self, inner):
        self.inner = inner

    def preprocess(self, images, return_tensors=None, **kwargs):
        return {"images": self.inner(images=images, return_tensors=return_tensors, **kwargs)["pixel_values"]}

    def __call__(self, images, **kwargs):
        return self.preprocess(images, **kwargs)


def test_an_image_processor_that_makes_other_inputs_than_the_model_is_fed(llava, tmp_path):
    model, processor = llava
    alone, inputs, picture = Unfinished(processor.image_processor), ask(llava), tiny_models.picture(90, 60)
    for number, given in enumerate(([picture], None)):
        with pytest.warns(probe.ProbeWarning, match="whole processor"):
            with probe.attach(model, alone) as p, p.record(tmp_path / str(number), images=given) as recording:
                alone(images=[picture], return_tensors="pt")
                model.generate(**inputs, max_new_tokens=2)
        (trace,) = recording.traces
        assert not trace.images and not recording.faults
    with probe.attach(model, alone) as p, p.masked(torch.ones(4, 4), images=[picture]):
        with pytest.raises(probe.errors.ImageError, match="whole processor"):
            model(**inputs)
    (trace,) = record(llava, tmp_path / "whole")
    with pytest.raises(probe.errors.ModelMismatch, match="whole processor"):
        probe.replay(trace, model, alone)


def test_a_second_pixel_input_that_a_mask_would_not_reach(llava, tmp_path):
    model, _ = llava
    with pytest.warns(probe.ProbeWarning, match="also fed pixel_values_high"):
        with probe.attach(*llava) as p, p.record(tmp_path, llr=False, boxes=False, attention=False) as recording:
            inputs = {**ask(llava), "pixel_values_high": torch.rand(1, 3, 8, 8)}
            model.prepare_inputs_for_generation = lambda *args, **kwargs: {
                name: value
                for name, value in type(model).prepare_inputs_for_generation(model, *args, **kwargs).items()
                if name != "pixel_values_high"
            }
            model._validate_model_kwargs = lambda kwargs: None
            model.generate(**inputs, max_new_tokens=2)
    assert not recording.traces[0].images
    del model.prepare_inputs_for_generation, model._validate_model_kwargs


def test_an_image_processor_that_returns_a_bare_tensor_keeps_its_trace(tmp_path):
    sys.path[:0] = [str(Path(__file__).parents[1] / "families")]
    from zoo import build, load_members

    load_members()
    made = build("idefics", "pil")
    picture = made.picture()
    inputs = made.inputs([picture])
    with (
        probe.attach(made.model, made.processor.image_processor) as p,
        p.record(tmp_path, images=[picture]) as recording,
    ):
        made.generate(inputs)
    (trace,) = recording.traces
    assert not recording.faults and len(trace.images) == 1
    replay = probe.replay(trace, made.model, made.processor.image_processor)
    assert float((replay.log_probs(torch.zeros(1, 4, 4)) - replay.log_probs(torch.ones(1, 4, 4))).abs().max()) > 1e-3


# ------------------------------------------------------------------------------------------------------------- masked


def test_masked_refuses_a_picture_that_is_not_known(llava):
    model, processor = llava
    before, picture = ask(llava, [tiny_models.picture(180, 60)]), tiny_models.picture(180, 60)
    mask = torch.ones(6, 18)
    mask[:, :4] = 0  # the left of a wide picture, which the centre crop never shows
    with torch.no_grad(), probe.attach(model, processor) as p:
        whole = model(**before).logits
        with (
            pytest.warns(DeprecationWarning, match="called 'image' now"),
            p.masked(mask, space="picture"),
            pytest.raises(probe.errors.ImageError, match=r"made nothing since attach.*images=\[image\].*pixels"),
        ):
            model(**before)
        with p.masked(mask, images=[picture]):
            assert torch.equal(model(**before).logits, whole)
        with p.masked(mask, space="pixels"):
            assert not torch.equal(model(**before).logits, whole)
        after = ask(llava, [picture])
        twice = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in after.items()}
        both = model(**twice).logits
        with p.masked(mask):
            assert torch.equal(model(**after).logits, whole)
            assert torch.equal(model(**twice).logits, both)
            after["pixel_values"].mul_(0.5)  # the same tensor, and another picture
            with pytest.raises(probe.errors.ImageError, match="changed"):
                model(**after)
        with (
            p.masked(mask, images=[edited(picture, (80, 20, 100, 40), (9, 9, 250))]),
            pytest.raises(probe.errors.ImageError),
        ):
            model(**before)
    with (
        probe.attach(model) as p,
        p.masked(mask),
        pytest.raises(probe.errors.ImageError, match="no processor was attached"),
    ):
        model(**before)


# ---------------------------------------------------------------------------------------------------- which model it is


def test_adapters_and_weights_of_each_call(llava, tmp_path):
    peft = pytest.importorskip("peft")
    base, processor = llava
    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(base, peft.LoraConfig(**settings), adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(**settings, lora_alpha=32))
    with probe.attach(model, processor) as p, p.record(tmp_path, llr=False, boxes=False) as recording:

        def say():
            model.generate(**ask((model, processor)), max_new_tokens=2, do_sample=False)

        for name in ("a", "b"):
            model.set_adapter(name)
            say()
        with model.disable_adapter():
            say()
        base.lm_head.weight.data.add_(0.01)  # a change that leaves no count on the parameter
        say()
        with torch.no_grad():
            base.lm_head.weight.mul_(1.5)
        say()
        base.set_attn_implementation("eager")
        say()
    traces = recording.traces
    assert [trace.model["adapter"] or "" for trace in traces] == ["a", "b", "", "b", "b", "b"]
    assert len({trace.model["fingerprint"] for trace in traces}) == 5
    assert [trace.model["attn_implementation"] for trace in traces[-2:]] == ["sdpa", "eager"]
    with pytest.raises(probe.errors.ModelMismatch):
        probe.replay(traces[3], model, processor)
    assert probe.verify(traces[5], model, processor).within(1e-4)


class Packed(nn.Module):
    """A linear layer whose weights are buffers, as in GPTQ and AWQ checkpoints."""

    def __init__(self, layer):
        super().__init__()
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (layer.weight / scale).round().to(torch.int8))
        self.register_buffer("scales", scale.detach())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x):
        weight = self.qweight.to(x.dtype) * self.scales.to(x.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def pack(module, only=""):
    for path, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and only in path and path:
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, Packed(layer))


def test_weights_in_buffers_count_and_what_is_recomputed_does_not(llava):
    model, _ = llava
    plain = fingerprint(model)
    assert len(plain) == 64 and same_fingerprint(model, plain)[0]
    assert plain == fingerprint(model, buffers=False)  # of a model without stored buffers: the value it always had
    pack(model.model.language_model, "q_proj")
    packed, older = fingerprint(model), fingerprint(model, buffers=False)
    assert packed.startswith("2:") and same_fingerprint(model, packed)[0]
    assert same_fingerprint(model, older)[0]  # a trace of before
    layer = next(m for m in model.modules() if isinstance(m, Packed))
    layer.cache.add_(1)
    assert fingerprint(model) == packed
    layer.qweight[0, 0] += 1
    assert fingerprint(model) != packed and fingerprint(model, buffers=False) == older


def test_attention_whose_weights_are_buffers_is_silenced_for_the_boxes(llava, tmp_path):
    model, _ = llava
    (before,) = record(llava, tmp_path / "plain")
    pack(model.model.vision_tower)
    (after,) = record(llava, tmp_path / "packed")
    assert np.allclose(after.layout.patch_box, before.layout.patch_box, atol=1)


class Wrapped(torch.Tensor):
    """A weight that knows a few functions, as quantised and distributed tensors do; its storage holds nothing."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def dequantize(self):
        if self.inner is None:
            raise NotImplementedError("dequantize")
        return self.inner.clone()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith(("aten.detach", "aten.alias")):
            return Wrapped(args[0].inner)
        if not name.startswith(("aten.t.", "aten.mm", "aten.addmm", "aten.transpose", "aten.matmul")):
            raise NotImplementedError(name)
        plain = [arg.inner if isinstance(arg, Wrapped) else arg for arg in args]
        return Wrapped(function(*plain)) if name.startswith(("aten.t.", "aten.transpose")) else function(*plain)


def wrap(layer):
    layer.weight = nn.Parameter(Wrapped(layer.weight.detach()), requires_grad=False)


def test_a_weight_that_cannot_be_indexed_keeps_the_trace(llava, tmp_path):
    model, _ = llava
    plain = fingerprint(model)
    layer = model.model.language_model.layers[0].mlp.up_proj
    wrap(layer)
    assert fingerprint(model) == plain  # by what it dequantises to
    with warnings.catch_warnings():
        warnings.simplefilter("error", probe.ProbeWarning)
        (trace,) = record(llava, tmp_path)
    assert trace.status == "complete" and trace.model["fingerprint"] == plain and trace.llr is not None
    layer.weight = nn.Parameter(Wrapped(layer.weight.inner + 1), requires_grad=False)
    assert fingerprint(model) != plain
    monkey = layer.weight.inner
    layer.weight.inner = None
    layer.weight = nn.Parameter(Wrapped(monkey), requires_grad=False)
    assert describe_model(model)["fingerprint"] == fingerprint(model)


# ----------------------------------------------------------------------------------------------- processor's settings


def test_a_replay_uses_the_recorded_settings(llava, tmp_path):
    model, processor = llava
    (trace,) = record(llava, tmp_path)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.image_processor.resample = Image.Resampling.NEAREST
    replay = probe.replay(trace, model, processor)
    with pytest.warns(probe.ProbeWarning, match=r"settings it was recorded with.*image_mean"):
        assert replay.path.report is not None
    assert torch.equal(replay.original_log_probs, probe.replay(trace, *tiny_models.build("llava")).original_log_probs)
    assert processor.image_processor.image_mean == [0.1, 0.2, 0.3]


def test_boxes_follow_the_processors_settings(llava, tmp_path):
    model, processor = llava
    with probe.attach(model, processor) as p, p.record(tmp_path, llr=False) as recording:
        for size in (56, 80):
            processor.image_processor.size = {"shortest_edge": size}
            model.generate(**ask(llava), max_new_tokens=2)
    first, second = (trace.layout.patch_box for trace in recording.traces)
    assert (first[0, 2] - first[0, 0]) > 1.3 * (second[0, 2] - second[0, 0])
    with probe.attach(*llava) as p, p.record(tmp_path / "alone", llr=False) as recording:
        model.generate(**ask(llava), max_new_tokens=2)
    assert np.array_equal(recording.traces[0].layout.patch_box, second)


def test_settings_are_those_of_the_call_and_its_device_is_not_kept(llava, tmp_path):
    _, processor = llava

    def prepared():
        made = processor(images=[tiny_models.picture(90, 60)], text=["<image>What?"], return_tensors="pt", device="cpu")
        processor.image_processor.image_std = [9.0, 9.0, 9.0]  # for the next call
        return made

    (trace,) = record(llava, tmp_path, prepared)
    assert "device" not in trace.processor_call["kwargs"]
    assert trace.processor_call["config"]["image_std"] != [9.0, 9.0, 9.0]
    assert probe.verify(trace, *tiny_models.build("llava")).within(1e-4)


# ----------------------------------------------------------------------------------------------------- same conditions


def padded(llava, side, *, mask):
    _, processor = llava
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in ("What?", "How many red shapes are there in this picture?")
    ]
    made = processor(
        text=texts,
        images=[tiny_models.picture(seed=k) for k in (0, 1)],
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )
    if not mask:
        made.pop("attention_mask")
    return made


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_enters_neither_side_of_the_ratio(llava, tmp_path, side, mask):
    traces = record(llava, tmp_path, lambda: padded(llava, side, mask=mask))
    for trace in traces:
        assert "<pad>" not in trace.prompt
        replay = probe.replay(trace, *llava)
        assert np.allclose(trace.llr, replay.llr.numpy(), atol=1e-4)
        assert np.allclose(trace.log_probs, replay.original_log_probs.numpy(), atol=1e-4)
    told = [any("padded on the right" in note and "rows" in note for note in trace.notes) for trace in traces]
    assert told == [side == "right", False]
    assert [trace.log_probs_source for trace in traces] == ["teacher_forced" if flag else "generation" for flag in told]


def training(model):
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    return model.train()


CONDITIONS = {
    "training mode": (training, {}),
    "autocast to bfloat16": (lambda model: torch.autocast("cpu", torch.bfloat16), {}),
    "position_ids": (lambda model: None, {"position_ids": "shifted"}),
}


@pytest.mark.parametrize("told", CONDITIONS)
def test_other_conditions_than_a_replays_are_told_and_left_out(llava, tmp_path, told):
    change, extra = CONDITIONS[told]
    model, _ = llava
    around = change(model)

    def inputs():
        made = ask(llava)
        if extra:
            made["position_ids"] = torch.arange(made["input_ids"].shape[1])[None] + 3
        return made

    torch.manual_seed(0)
    if isinstance(around, torch.autocast):
        with around:
            (trace,) = record(llava, tmp_path, inputs)
    else:
        (trace,) = record(llava, tmp_path, inputs)
    assert model.training == (told == "training mode")
    model.eval()
    assert trace.log_probs_source == "teacher_forced" and any(told in note for note in trace.notes)
    assert np.allclose(trace.llr, probe.replay(trace, *llava).llr.numpy(), atol=1e-4)


@pytest.mark.parametrize(("options", "told"), [({"vision_feature_layer": -1}, True), ({"use_cache": False}, False)])
def test_an_option_of_the_models_own_call_is_another_condition(llava, tmp_path, options, told):
    """It reaches the model beside the tensors, and no replay; settings of ``generate()`` are none."""
    (trace,) = record(llava, tmp_path, **options)
    assert any("vision_feature_layer=-1 was given" in note for note in trace.notes) == told
    assert trace.log_probs_source == ("teacher_forced" if told else "generation")
    assert np.allclose(trace.llr, probe.replay(trace, *llava).llr.numpy(), atol=1e-4)


@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("made", [True, False])
def test_a_cache_of_fixed_size_is_another_condition_where_it_moves_log_probabilities(llava, tmp_path, moves, made):
    """As it does in Gemma 4, unified, whose image tokens see each other; elsewhere the call's own are kept."""
    model, _ = llava

    def other_keys(_module, _args, kwargs):
        if moves and type(kwargs.get("past_key_values")).__name__ == "StaticCache":
            kwargs["inputs_embeds"] = 1.5 * kwargs["inputs_embeds"]
        return _args, kwargs

    handle = model.model.language_model.register_forward_pre_hook(other_keys, with_kwargs=True)
    cache = {"past_key_values": StaticCache(model.config, max_cache_len=512)} if made else {}
    (trace,) = record(llava, tmp_path, **(cache or {"cache_implementation": "static"}))
    handle.remove()
    assert np.allclose(trace.llr, probe.replay(trace, *llava).llr.numpy(), atol=1e-4)
    assert any("the cache was " in note for note in trace.notes) == moves
    assert trace.log_probs_source == ("teacher_forced" if moves else "generation")


def test_embeddings_in_the_place_of_the_prompt_are_not_recorded(tmp_path):
    """Beside token ids, which some families take them with, a replay would mix both."""
    llava = tiny_models.build("qwen2_vl")
    model, processor = llava
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording, pytest.warns(probe.ProbeWarning):
        made = ask((model, processor), name="qwen2_vl")
        embedded = model.get_input_embeddings()(made["input_ids"])
        model.generate(**made, inputs_embeds=embedded, max_new_tokens=2)
    assert not recording.paths and "inputs_embeds" in recording.passed_over[0]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_part_that_is_left_in_training_mode_counts_if_it_computes_otherwise(llava, tmp_path, dropout):
    model, _ = llava
    for module in model.model.vision_tower.train().modules():
        if hasattr(module, "dropout"):
            module.dropout = dropout
    (trace,) = record(llava, tmp_path)
    assert trace.log_probs_source == ("teacher_forced" if dropout else "generation")


def test_gradient_checkpointing_in_training(llava, tmp_path):
    model, _ = llava
    model.gradient_checkpointing_enable()
    model.train()
    (trace,) = record(llava, tmp_path)
    model.eval()
    assert trace.log_probs_source == "teacher_forced"
    assert np.allclose(trace.llr, probe.replay(trace, *llava).llr.numpy(), atol=1e-4)


def test_the_usual_positions_are_no_other_condition(llava, tmp_path):
    def inputs():
        made = ask(llava)
        made["position_ids"] = torch.arange(made["input_ids"].shape[1])[None]
        return made

    (trace,) = record(llava, tmp_path, inputs)
    assert trace.log_probs_source == "generation"


def test_logits_that_are_written_over_by_the_next_step():
    """As a model does that runs as a CUDA graph: every step's logits stand in one buffer."""

    class Output:
        logits = torch.zeros(1, 1, 5)

    reader, steps = StepLogProbs(), torch.randn(3, 5)
    tokens = torch.tensor([[1, 4, 2]])
    for step in range(3):
        Output.logits.copy_(steps[step])
        fed = torch.tensor([[0]]) if step == 0 else tokens[:, step - 1 : step]
        reader(nn.Identity(), (), {"input_ids": fed}, Output)
    Output.logits.zero_()
    wanted = steps.log_softmax(-1).gather(-1, tokens[0, :, None])[:, 0]
    assert torch.allclose(reader.result(tokens)[0], wanted)


# --------------------------------------------------------------------------------------------------------------- words


def test_an_end_token_that_is_switched_off(llava, tmp_path):
    model, _ = llava
    width = ask(llava)["input_ids"].shape[1]
    said = model.generate(**ask(llava), max_new_tokens=8, do_sample=False, eos_token_id=None)[0, width:]
    model.generation_config.eos_token_id = int(said[3])
    (trace,) = record(llava, tmp_path, max_new_tokens=8, eos_token_id=None)
    assert trace.token_ids.tolist() == said.tolist()
    (cut,) = record(llava, tmp_path / "on", max_new_tokens=8)
    assert len(cut.token_ids) == said.tolist().index(int(said[3])) + 1


def test_every_stop_is_told_as_it_was(llava, tmp_path):
    _, processor = llava
    width = ask(llava)["input_ids"].shape[1]
    settings = {
        "max_new_tokens": {},
        "max_length": {"max_new_tokens": None, "max_length": width + 3},
        "max_time": {"max_time": 1e-9},
        "stopping criterion": {"stopping_criteria": [lambda ids, scores: torch.ones(len(ids), dtype=torch.bool)]},
    }
    for number, (told, given) in enumerate(settings.items()):
        (trace,) = record(llava, tmp_path / str(number), eos_token_id=None, **given)
        assert [note for note in trace.notes if told in note], (told, trace.notes)
    (trace,) = record(llava, tmp_path / "plain", max_new_tokens=6)
    piece = trace.tokens[2]
    (trace,) = record(llava, tmp_path / "s", max_new_tokens=6, stop_strings=[piece], tokenizer=processor.tokenizer)
    assert any("stop string" in note for note in trace.notes) and len(trace.token_ids) <= 3


def test_a_second_turn_on_a_cache(llava, tmp_path):
    model, processor = llava
    cache = DynamicCache(config=model.config.get_text_config())
    with probe.attach(model, processor) as p, p.record(tmp_path, llr=False, boxes=False) as recording:
        out = model.generate(**ask(llava), max_new_tokens=3, do_sample=False, past_key_values=cache)
        more = torch.cat([out, processor.tokenizer("USER: Where?", return_tensors="pt")["input_ids"]], 1)
        with pytest.warns(probe.ProbeWarning, match="16 image tokens stand for images that only the cache holds"):
            model.generate(
                input_ids=more, attention_mask=torch.ones_like(more), past_key_values=cache, max_new_tokens=3
            )
    assert len(recording.paths) == 1


def test_a_cache_of_another_prompt_is_no_side_of_a_ratio(llava, tmp_path):
    """generate() takes a cache's word for what stands before; a replay reads the prompt itself."""
    model, processor = llava
    inputs = ask(llava)
    first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:, :first] + 7, past_key_values=cache)
    with probe.attach(model, processor) as p, p.record(tmp_path, images=[tiny_models.picture(90, 60)]) as recording:
        model.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False)
    (trace,) = recording.traces
    assert trace.log_probs_source == "teacher_forced"
    assert any(f"a key-value cache was given that held {first} positions" in note for note in trace.notes)
    replay = probe.replay(trace, model, processor)
    np.testing.assert_allclose(np.asarray(trace.llr), replay.llr.numpy(), atol=1e-4)
    assert "encoder_outputs were given" in other_conditions(model, inputs, {"encoder_outputs": (torch.zeros(1),)})


def test_a_second_turn_on_a_cache_with_an_image_of_its_own(llava, tmp_path):
    """The pixel inputs are those of the second image alone; what stands before the first one may be in a cache."""
    model, processor = llava
    two = ask(llava, [tiny_models.picture(seed=seed) for seed in (0, 1)])
    second, ids = two["pixel_values"][1:], two["input_ids"]
    first = int((ids[0] == model.config.image_token_id).nonzero()[0])
    with probe.attach(model, processor) as p, p.record(tmp_path, llr=False, boxes=False) as recording:
        for stop in (first + 16, first):
            cache = DynamicCache(config=model.config.get_text_config())
            pixels = two["pixel_values"][:1] if stop > first else None
            with torch.no_grad():
                model(input_ids=ids[:, :stop], pixel_values=pixels, past_key_values=cache)
            given = {**two, "pixel_values": second if stop > first else two["pixel_values"]}
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model.generate(**given, past_key_values=cache, max_new_tokens=3, do_sample=False)
            told = [str(warning.message) for warning in caught if warning.category is probe.ProbeWarning]
            assert any("16 image tokens stand for images that only the cache holds" in one for one in told) is (
                stop > first
            )
    (trace,) = recording.traces
    assert len(trace.image_positions) == 32


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_counts_by_its_older_and_its_newer_name(llava, name):
    """``generate()`` takes the one up to transformers 5.23, the other since."""
    model, _ = llava
    inputs, states = ask(llava), torch.zeros(1, 2, 7, 4)
    cache = DynamicCache()
    cache.update(states, states, 0)
    assert "goes on from a key-value cache (7 positions)" in without_image(inputs["input_ids"], None, {name: cache})
    settings = {}.get
    cache.offloading = True
    assert offloads_its_cache(settings, {name: cache}) and not offloads_its_cache(settings, {name: None})
    assert other_conditions(model, inputs, {name: cache}) == [
        "a key-value cache was given that held 7 positions already"
    ]
    assert other_conditions(model, inputs, {name: DynamicCache()}) == []
    quantised = type("QuantizedCache", (DynamicCache,), {})()
    assert other_conditions(model, inputs, {name: quantised}) == ["the cache was quantised"]


def test_a_probe_that_nobody_keeps_lasts_as_long_as_its_recording(llava, tmp_path):
    model, processor = llava
    with probe.attach(model, processor).record(tmp_path, llr=False, boxes=False) as recording:
        model.generate(**ask(llava), max_new_tokens=2)
    assert len(recording.paths) == 1
    with probe.attach(model, processor):  # the other one is gone
        pass


def test_a_list_names_tokens_and_a_tuple_a_span(llava, tmp_path):
    (trace,) = record(llava, tmp_path, max_new_tokens=6, min_new_tokens=6)
    replay = probe.replay(trace, *llava)
    chosen = {
        kind: probe.explain(replay, method="input_gradient", tokens=tokens, strengthen=False).selection.indices
        for kind, tokens in {"list": [0, 3], "tuple": (0, 3), "three": [4, 1, 2]}.items()
    }
    assert chosen == {"list": (0, 3), "tuple": (0, 1, 2), "three": (1, 2, 4)}
    with pytest.raises(probe.errors.SelectionError, match="0 to 5"):
        probe.explain(replay, method="input_gradient", tokens=[0, 9])


def test_a_selection_shows_no_token_that_it_leaves_out(demo, tmp_path):
    model, processor = demo
    scene = probe.demo.scenes(1)[0]
    with probe.attach(model, processor) as p, p.record(tmp_path, llr=False, boxes=False) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs, max_new_tokens=20, do_sample=False)
    selection = probe.select_tokens(recording.traces[0], words=".")
    assert selection.text == "." and type(selection).from_dict(selection.to_dict()).text == "."


def test_a_picture_that_cannot_be_encoded_leaves_the_answer(llava, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("no room")

    monkeypatch.setattr("lvlm_probe.recording.prompt_images.encode_image", broken)
    with pytest.warns(probe.ProbeWarning, match="marked status='error'"):
        (trace,) = record(llava, tmp_path)
    assert trace.status == "error" and "no room" in trace.error and len(trace.token_ids) == 4


# ------------------------------------------------------------------------------------- image tokens that are masked out


@pytest.mark.parametrize("every", [1, 2])
def test_hidden_image_tokens_are_told_and_the_answer_is_the_users_own(llava, tmp_path, every):
    """They ended as a trace of status "error", with the family's own text on tokens and features."""
    model, processor = llava
    with probe.attach(model, processor) as attached:
        inputs = ask(llava)
        places = (inputs["input_ids"] == model.config.image_token_id)[0].nonzero()[::every, 0]
        mask = inputs["attention_mask"].clone()
        mask[0, places] = 0
        given = {**inputs, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
        expected = model.generate(**given)
        with attached.record(tmp_path) as recording:
            with pytest.warns(probe.ProbeWarning, match="the attention mask hides image tokens"):
                assert torch.equal(model.generate(**given), expected)
    assert recording.paths == [] and "causal.knockout" in recording.passed_over[0]


def test_text_that_is_masked_out_is_no_part_of_the_prompt(llava, tmp_path):
    """Positions are numbered without it, so a prompt that never had it gives the same."""

    def hidden():
        inputs = dict(ask(llava))
        inputs["attention_mask"] = inputs["attention_mask"].clone()
        inputs["attention_mask"][0, -2] = 0
        return inputs

    (trace,) = record(llava, tmp_path, hidden)
    assert trace.status == "complete"
    assert len(trace.input_ids) == hidden()["input_ids"].shape[1] - 1
    replay = probe.replay(trace, *llava)
    assert np.allclose(replay.original_log_probs.numpy(), trace.log_probs, atol=1e-3)
