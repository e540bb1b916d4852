"""What users put on and around a model: adapters, offloading, half precision, compilation, copies, many pictures."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from marks import campaign
from tiny_models import picture

import lvlm_probe as probe
from lvlm_probe.models.fingerprint import fingerprint

peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

QUESTION = "What colour is the circle?"


def ask(name: str, model: Any, processor: Any) -> dict[str, Any]:
    made = tiny_models.inputs(name, SimpleNamespace(device="cpu"), processor, [picture()], QUESTION)
    return dict(made)


def generate(model: Any, inputs: dict[str, Any], **settings: Any) -> Any:
    """Four greedy tokens with their logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model.generate(
            **inputs,
            **{"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **settings},
            return_dict_in_generate=True,
            output_logits=True,
        )


def recorded(
    name: str, model: Any, processor: Any, directory: Path, *, source: str = "generation", **record: Any
) -> Any:
    """The only trace of one answer; generation with the probe is the same to the last bit."""
    plain = generate(model, ask(name, model, processor))
    with probe.attach(model, processor) as p, p.record(directory, **record) as recording:
        seen = generate(model, ask(name, model, processor))
    assert not recording.faults
    assert torch.equal(plain.sequences, seen.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, seen.logits, strict=True))
    (trace,) = recording.traces
    assert trace.log_probs_source == source and trace.attention is not None
    return trace


def slope(replay: Any, *, step: float = 2e-3) -> tuple[float, float]:
    """The derivative of log P(answer) along a direction of the mask, and its finite difference.

    The direction is a random one that the gradient has a part in: where the function is level, a difference of float32
    numbers says nothing.
    """
    generator = torch.Generator().manual_seed(1)
    mask = 0.3 + 0.5 * torch.rand(1, 6, 6, generator=generator)
    way = torch.randn(1, 6, 6, generator=generator)
    leaf = mask.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(replay.log_probs(leaf).sum(), leaf)
    way = way + way.norm() * gradient / gradient.norm()
    with torch.no_grad():
        high, low = replay.log_probs(torch.cat([mask + step * way, mask - step * way])).double().sum(1).tolist()
    return float((gradient * way).sum()), (high - low) / (2 * step)


def mask_gradient(replay: Any) -> torch.Tensor:
    leaf = torch.full((1, 6, 6), 0.5, requires_grad=True)
    return torch.autograd.grad(replay.log_probs(leaf).sum(), leaf)[0]


def hung(model: Any) -> list[Any]:
    """Everything that could be left on a model."""
    return [
        (path, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks), module.training)
        for path, module in model.named_modules()
    ]


# ------------------------------------------------------------------------------------------------------------- adapters

TARGETS = ["q_proj", "v_proj", "down_proj", "lm_head"]


def adapted(name: str, *, seed: int = 5, **settings: Any) -> tuple[Any, Any]:
    """A family with LoRA whose B is not zero, so that the adapter changes what the model says."""
    model, processor = tiny_models.build(name)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.2, "target_modules": TARGETS, **settings})
    wrapped = peft.get_peft_model(model, config).eval()
    draw_adapter(wrapped, seed)
    return wrapped, processor


@torch.no_grad()
def draw_adapter(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if "lora_" in path:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_model_with_lora_is_recorded_replayed_and_explained(name, tmp_path):
    model, processor = adapted(name)
    trainable = [path for path, parameter in model.named_parameters() if parameter.requires_grad]
    generate(model, ask(name, model, processor))
    before = hung(model)
    trace = recorded(name, model, processor, tmp_path)
    assert trace.model["adapter"] == "default" and hung(model) == before
    assert probe.verify(trace, model, processor).within(1e-4)
    replay = probe.replay(trace, model, processor)
    mine, measured = slope(replay)
    assert measured != 0 and abs(mine - measured) <= 1e-2 * abs(measured)
    for method in ("input_gradient", "gradcam"):
        assert probe.explain(replay, method=method, tokens=(0, 2)).values.max() > 0
    # The adapter is in what was recorded, and it can be trained after all that.
    with model.disable_adapter():
        base = generate(model, ask(name, model, processor))
    assert not torch.equal(base.logits[0], generate(model, ask(name, model, processor)).logits[0])
    assert trainable == [path for path, parameter in model.named_parameters() if parameter.requires_grad]
    model(**ask(name, model, processor)).logits.sum().backward()
    assert all(p.grad is not None for path, p in model.named_parameters() if p.requires_grad and "vision" not in path)
    assert hung(model) == before


def test_the_wrapper_and_the_model_inside_are_one_model(tmp_path):
    model, processor = adapted("llava")
    inner = model.get_base_model()
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        with pytest.raises(probe.errors.AttachError, match="already"):
            probe.attach(inner, processor)
        generate(inner, ask("llava", inner, processor))
        generate(model, ask("llava", model, processor))
    one, two = recording.traces
    assert np.array_equal(one.log_probs, two.log_probs)
    for trace in (one, two):
        for held in (model, inner):
            assert probe.verify(trace, held, processor).within(1e-4)


def test_a_mask_reaches_the_model_through_the_wrapper():
    model, processor = adapted("llava")
    with probe.attach(model, processor) as p:
        inputs = ask("llava", model, processor)
        mask = torch.full((5, 5), 0.5, requires_grad=True)
        with p.masked(mask):
            model(**inputs).logits[0, -1].log_softmax(-1)[3].backward()
        assert mask.grad.abs().max() > 0
        with p.masked(torch.zeros(5, 5)):
            masked = generate(model, inputs)
        assert not torch.equal(masked.logits[0], generate(model, inputs).logits[0])


def test_adapters_that_compute_nothing_do_not_count_for_identity(tmp_path):
    plain, processor = tiny_models.build("llava")
    model, _ = adapted("llava")
    with_adapter = fingerprint(model)
    assert with_adapter != fingerprint(plain)
    with model.disable_adapter():
        assert fingerprint(model) == fingerprint(plain)
        trace = recorded("llava", model, processor, tmp_path / "disabled")
        assert probe.verify(trace, plain, processor).within(1e-4)
    with pytest.raises(probe.errors.ModelMismatch):  # enabled again, it is another model
        probe.replay(trace, model, processor)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert fingerprint(model) == with_adapter
    model.set_adapter("second")
    assert fingerprint(model) != with_adapter
    model.set_adapter("default")
    model.get_base_model().model.language_model.layers[0].self_attn.q_proj.scaling["default"] = 1.0
    assert fingerprint(model) != with_adapter


def test_merged_adapters(tmp_path):
    model, processor = adapted("llava")
    model.merge_adapter()
    trace = recorded("llava", model, processor, tmp_path / "in place")
    assert probe.verify(trace, model, processor).within(1e-4)
    model.unmerge_adapter()
    with pytest.raises(probe.errors.ModelMismatch):  # other weights in bfloat16's eyes than base + adapter
        probe.replay(trace, model, processor)
    merged = model.merge_and_unload()
    assert probe.verify(trace, merged, processor).within(1e-4)
    again = recorded("llava", merged, processor, tmp_path / "unloaded")
    np.testing.assert_allclose(trace.log_probs, again.log_probs, atol=1e-6)


def test_transformers_own_adapters(tmp_path):
    """model.add_adapter() puts LoRA into the model without a wrapper."""
    model, processor = tiny_models.build("qwen2_5_vl")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    draw_adapter(model.eval(), 3)
    trace = recorded("qwen2_5_vl", model, processor, tmp_path)
    assert trace.model["adapter"] == "default" and probe.verify(trace, model, processor).within(1e-4)
    mine, measured = slope(probe.replay(trace, model, processor))
    assert measured != 0 and abs(mine - measured) <= 1e-2 * abs(measured)


@pytest.mark.quick
def test_an_adapter_around_the_language_model_alone(tmp_path):
    model, processor = tiny_models.build("llava")
    inner = peft.get_peft_model(model.model.language_model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    draw_adapter(inner.eval(), 3)
    model.model.language_model = inner
    trace = recorded("llava", model, processor, tmp_path)
    assert probe.verify(trace, model, processor).within(1e-4)
    mine, measured = slope(probe.replay(trace, model, processor))
    assert measured != 0 and abs(mine - measured) <= 1e-2 * abs(measured)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["multi_modal_projector"]},
        {"trainable_token_indices": [5, 6, 7], "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "embed_tokens", "linear_1", "fc1"]},
    ],
    ids=["dora", "modules_to_save", "trainable_tokens", "tower_projector_embedding"],
)
def test_other_adapters(settings, tmp_path):
    model, processor = adapted("llava", **settings)
    trace = recorded("llava", model, processor, tmp_path)
    assert probe.verify(trace, model, processor).within(1e-4)
    mine, measured = slope(probe.replay(trace, model, processor))
    assert measured != 0 and abs(mine - measured) <= 1e-2 * abs(measured)
    before = fingerprint(model)
    with torch.no_grad():
        parameter = next(p for path, p in reversed(list(model.named_parameters())) if p.requires_grad)
        parameter.add_(0.5)
    assert fingerprint(model) != before


@pytest.mark.quick
def test_words_of_an_adapted_head_are_those_it_computes_with():
    """TAM reads rows of the LM head; with LoRA on it they are weight + delta."""
    from lvlm_probe.replaying.hidden_states import head_rows

    model, _ = adapted("llava")
    ids = torch.tensor([3, 9, 3])
    found = head_rows(model, ids)
    merged = model.merge_and_unload()
    torch.testing.assert_close(found, merged.lm_head.weight.detach()[ids], atol=1e-5, rtol=0)


def test_adapters_by_batch_row_are_not_recorded(tmp_path):
    model, processor = adapted("llava")
    settings = {"adapter_names": ["default"]}
    plain = generate(model, ask("llava", model, processor), **settings)
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        with pytest.warns(probe.ProbeWarning, match="adapter_names"):
            seen = model.generate(
                **ask("llava", model, processor), max_new_tokens=4, min_new_tokens=4, do_sample=False, **settings
            )
    assert torch.equal(plain.sequences, seen) and not recording.paths


def test_virtual_tokens_are_refused():
    model, processor = tiny_models.build("llava")
    wrapped = peft.get_peft_model(
        model,
        peft.PromptTuningConfig(
            num_virtual_tokens=3, token_dim=48, num_layers=3, num_attention_heads=4, num_transformer_submodules=1,
            task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    with pytest.raises(probe.errors.AttachError, match="PROMPT_TUNING adapter"):
        probe.attach(wrapped, processor)


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_task_types(task, tmp_path):
    model, processor = adapted("llava", task_type=task)
    trace = recorded("llava", model, processor, tmp_path)
    assert probe.verify(trace, model, processor).within(1e-4)


# ----------------------------------------------------------------------------------------------------------- offloading


def offloaded(name: str, how: str, directory: Path) -> tuple[Any, Any, Any]:
    """A model with weights on the meta device between calls (all, or some of them), one without, and the processor."""
    plain, processor = tiny_models.build(name)
    model, _ = tiny_models.build(name)
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu"), plain, processor
    if how == "disk":
        return accelerate.disk_offload(model, str(directory / "weights"), execution_device="cpu"), plain, processor
    towers = ("vision_tower", "visual")  # accelerate itself cannot run mllama's vision_model with its gates offloaded
    parts = {path: "disk" for path, _ in model.named_modules() if path.endswith((*towers, "language_model.layers"))}
    leaves = [path for path, _ in [*model.named_parameters(), *model.named_buffers()]]
    left = [path for path in leaves if not path.startswith(tuple(f"{part}." for part in parts))]
    parts |= dict.fromkeys([*left, "lm_head"], "cpu")
    if how == "split":
        return accelerate.dispatch_model(model, parts, offload_dir=str(directory / "weights")), plain, processor
    model.save_pretrained(directory / "saved")
    # Compared with what is loaded from the same files: weights that lie elsewhere in memory are summed differently.
    plain = type(model).from_pretrained(directory / "saved", dtype=torch.float32)
    loaded = type(model).from_pretrained(
        directory / "saved", device_map=parts, offload_folder=str(directory / "weights"), dtype=torch.float32
    )
    return loaded.eval(), plain.eval(), processor


HOW = ("cpu", "disk", "split", "from_pretrained")
OTHERS = ("qwen2_5_vl", "gemma3", "internvl", "mllama")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("llava", how) for how in HOW),
        *((name, "split") for name in OTHERS),
        *campaign(*((name, how) for name in OTHERS for how in HOW if how != "split")),
    ],
)
def test_an_offloaded_model_is_what_it_is_in_memory(name, how, tmp_path):
    if name == "mllama" and how in ("cpu", "disk"):
        pytest.skip("accelerate itself cannot run mllama's vision_model with its gates offloaded")
    model, plain, processor = offloaded(name, how, tmp_path)
    meta = {path for path, parameter in model.named_parameters() if parameter.is_meta}
    assert meta
    expected = generate(plain, ask(name, plain, processor))
    with probe.attach(model, processor) as p, p.record(tmp_path / "traces", points=("hidden",)) as recording:
        seen = generate(model, ask(name, model, processor))
    assert not recording.faults
    assert torch.equal(expected.sequences, seen.sequences)
    assert all(torch.equal(a, b) for a, b in zip(expected.logits, seen.logits, strict=True))
    (trace,) = recording.traces
    assert trace.log_probs_source == "generation" and not any("no hidden" in note for note in trace.notes), trace.notes
    assert fingerprint(model) == fingerprint(plain)
    away, here = (probe.replay(trace, held, processor) for held in (model, plain))
    assert probe.verify(trace, model, processor).within(1e-4)
    expected = mask_gradient(here)
    assert expected.abs().max() > 0
    torch.testing.assert_close(mask_gradient(away), expected, atol=1e-6, rtol=1e-5)
    saving = probe.replay(trace, model, processor, gradient_checkpointing=True)
    torch.testing.assert_close(mask_gradient(saving), expected, atol=1e-6, rtol=1e-5)
    assert meta == {path for path, parameter in model.named_parameters() if parameter.is_meta}
    assert probe.explain(away, method="gradcam", tokens=(0, 2)).values.max() > 0
    assert meta == {path for path, parameter in model.named_parameters() if parameter.is_meta}


def test_a_device_map_made_by_transformers(tmp_path):
    """device_map="auto" with less memory than the model needs: the rest goes to disk."""
    home = tiny_models.save("llava", tmp_path / "home")
    processor = tiny_models.load_processor(home)
    kind = type(tiny_models.build_model("llava"))
    plain = kind.from_pretrained(home, dtype=torch.float32).eval()
    model = kind.from_pretrained(
        home, dtype=torch.float32, device_map="auto", max_memory={"cpu": 200_000}, offload_folder=tmp_path / "weights"
    ).eval()
    assert any(parameter.is_meta for parameter in model.parameters())
    trace = recorded("llava", model, processor, tmp_path / "traces")
    for held in (model, plain):
        assert probe.verify(trace, held, processor).within(1e-4)
    gradients = [mask_gradient(probe.replay(trace, held, processor)) for held in (model, plain)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_offloaded_embeddings_say_where_they_run():
    from lvlm_probe.models.inputs import input_device

    model = tiny_models.build_model("llava")
    model.get_input_embeddings().to("meta")
    assert input_device(model) == torch.device("cpu")
    for given, device in ((1, "cuda:1"), ("xpu:0", "xpu:0"), (torch.device("cpu"), "cpu")):
        model.get_input_embeddings()._hf_hook = SimpleNamespace(execution_device=given)
        assert input_device(model) == torch.device(device)


def test_numbers_of_devices_are_of_the_accelerator_there_is(monkeypatch):
    from lvlm_probe.models.wrappers import execution_device

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    hooked = SimpleNamespace(_hf_hook=SimpleNamespace(execution_device=1))
    assert execution_device(hooked) == torch.device("xpu:1")


# --------------------------------------------------------------------------------------------------------------- copies


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_a_probed_model_is_an_unprobed_model(copied, tmp_path):
    model, processor = tiny_models.build("qwen2_5_vl")
    inputs = ask("qwen2_5_vl", model, processor)
    expected = generate(model, inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
    with probe.attach(model, processor) as p, p.record(tmp_path / "first"):
        other = copied(model)
        with p.masked(torch.zeros(4, 4)):
            masked = copied(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)  # now the two say different things
    with probe.attach(model, processor) as p, p.record(tmp_path / "second") as recording, p.masked(torch.zeros(4, 4)):
        for twin in (other, masked):
            seen = generate(twin, inputs)
            assert torch.equal(seen.sequences, expected.sequences)
            assert all(torch.equal(a, b) for a, b in zip(seen.logits, expected.logits, strict=True))
            with torch.no_grad():
                assert torch.equal(twin(**inputs).logits, logits)
    assert not recording.paths
    trace = recorded("qwen2_5_vl", other, processor, tmp_path / "other")  # and a probe can be attached to it
    assert probe.verify(trace, other, processor).within(1e-4)
    # A copy of a copy, after a probe has come and gone, is its own object too.
    third = copied(other)
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    assert torch.equal(generate(third, inputs).sequences, expected.sequences)


def test_a_copy_made_while_an_answer_is_recorded(tmp_path):
    """A stopping criterion that keeps a copy of the model, as an exponential moving average does, copies no probe."""
    model, processor = tiny_models.build("llava")
    inputs = ask("llava", model, processor)
    expected = generate(model, inputs)
    kept = []

    def keep(input_ids, scores, **kwargs):
        kept.append(copy.deepcopy(model))
        return torch.zeros(len(input_ids), dtype=torch.bool)

    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        generate(model, ask("llava", model, processor), stopping_criteria=[keep])
    assert not recording.faults and len(recording.paths) == 1
    for twin in kept:
        seen = generate(twin, inputs)
        assert all(torch.equal(a, b) for a, b in zip(seen.logits, expected.logits, strict=True))
        probe.attach(twin, processor).detach()


def test_a_copy_of_a_watched_processor_is_not_watched(tmp_path):
    model, processor = tiny_models.build("llava")
    with probe.attach(model, processor) as p:
        other = copy.deepcopy(processor)
        third = pickled(processor)
        other.image_processor.image_mean = [0.0, 0.0, 0.0]
        mine, theirs, loaded = (ask("llava", model, one)["pixel_values"] for one in (processor, other, third))
        assert torch.equal(mine, loaded) and not torch.equal(mine, theirs)
        assert len(p.attachment.watch) == 1


# ------------------------------------------------------------------------------------------------------- half precision

HALF = ["llava", "qwen2_5_vl", "gemma3", "internvl", "llava_next", "qwen3_vl", "idefics3", "paligemma", "mllama"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in HALF),
        ("llava", torch.float16),
        *campaign(*((name, torch.float16) for name in HALF[1:])),
    ],
    ids=str,
)
def test_half_precision(name, dtype, tmp_path):
    whole, processor = tiny_models.build(name)
    model, _ = tiny_models.build(name)
    model.to(dtype)
    plain = generate(model, ask(name, model, processor))
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        seen = generate(model, ask(name, model, processor))
    assert not recording.faults
    assert torch.equal(plain.sequences, seen.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, seen.logits, strict=True))
    (trace,) = recording.traces
    assert trace.log_probs.dtype == np.float32 and trace.model["torch_dtype"] == str(dtype).removeprefix("torch.")
    # log P is computed in float32 from the model's own logits, not in half precision.
    ids = plain.sequences[0, -4:]
    scores = torch.cat(list(plain.logits)).double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    np.testing.assert_allclose(trace.log_probs, scores.numpy(), atol=1e-5)
    replay = probe.replay(trace, model, processor)
    assert probe.verify(trace, model, processor).within(0.05 if dtype == torch.bfloat16 else 0.005)
    leaf = torch.full((1, 6, 6), 0.5, requires_grad=True)
    values = replay.log_probs(leaf)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    assert values.dtype == gradient.dtype == torch.float32 and bool(gradient.isfinite().all())
    # float16 rounded to bfloat16 is not float32 rounded to bfloat16, so fingerprints differ there.
    reference = probe.replay(trace, whole, processor, strict=dtype == torch.bfloat16)
    expected = mask_gradient(reference)
    cosine = float(torch.nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0))
    assert cosine > (0.99 if dtype == torch.bfloat16 else 0.999)
    # The picture is blended in float32 and rounded once, at the end.
    mask = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(3))
    for key in replay.path.pixel_keys:
        mine, theirs = (one.path.apply(mask)[key] for one in (replay, reference))
        assert mine.dtype == dtype and torch.equal(mine, theirs.to(dtype))


def test_generation_under_autocast(tmp_path):
    """A float32 model that runs in bfloat16 inside autocast: what it said is kept, and the probe changes nothing. Both
    sides of the log-likelihood ratio are computed without."""
    model, processor = tiny_models.build("llava")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trace = recorded("llava", model, processor, tmp_path, source="teacher_forced")
        assert probe.verify(trace, model, processor).within(0.05)
        gradient = mask_gradient(probe.replay(trace, model, processor))
    assert gradient.dtype == torch.float32 and bool(gradient.isfinite().all()) and gradient.abs().max() > 0
    assert probe.verify(trace, model, processor).within(0.05)


# ------------------------------------------------------------------------------------- several pictures, turns, batches


def conversation(processor: Any, turns: list[tuple[int, str, str]]) -> str:
    """A chat of several turns: ``(pictures, question, answer)``; the last answer is left to the model."""
    messages: list[dict[str, Any]] = []
    for count, question, answer in turns:
        content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        if answer:
            messages.append({"role": "assistant", "content": answer})
    return processor.apply_chat_template(messages, add_generation_prompt=True)


MANY = [
    *("llava", "qwen2_5_vl", "llava_next", "idefics3", "mllama"),
    *campaign("qwen3_vl", "gemma3", "internvl", "llava_onevision"),
]
BOXES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl", "llava_next", "llava_onevision", "idefics3")
NESTED = ("gemma3", "idefics3", "mllama", "paligemma")
SIZES = [(90, 60), (60, 90), (120, 40), (56, 56)]


def prepared(name: str, processor: Any, chats: list[list[tuple[int, str, str]]], groups: list[list[Any]]) -> Any:
    given: Any = groups if name in NESTED else [picture for group in groups for picture in group]
    texts = [conversation(processor, chat) for chat in chats]
    return dict(processor(images=given, text=texts, return_tensors="pt", padding=True, padding_side="left"))


@pytest.mark.parametrize("name", MANY)
def test_several_pictures_in_several_turns(name, tmp_path):
    model, processor = tiny_models.build(name)
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(SIZES[:3])]
    chat = [(2, "What is in the two?", "A red square."), (1, "Where is this one?", "")]
    plain = generate(model, prepared(name, processor, [chat], [pictures]))
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        seen = generate(model, prepared(name, processor, [chat], [pictures]))
    assert not recording.faults
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, seen.logits, strict=True))
    (trace,) = recording.traces
    assert [image.size for image in trace.images] == SIZES[:3]
    assert probe.verify(trace, model, processor).within(1e-4)
    replay = probe.replay(trace, model, processor)
    check_masks(replay, model, processor, lambda shown: prepared(name, processor, [chat], [shown]))
    if trace.layout.patch_box is not None:
        check_boxes(trace, pictures)
    else:
        assert name not in BOXES


def test_pictures_with_unequal_numbers_of_tokens(tmp_path):
    """Pan and scan: a wide picture becomes several views, each with its tokens, and so do settings of one call."""
    model, processor = tiny_models.build("gemma3")
    pictures = [picture(60, 60, seed=1), picture(150, 40, seed=2)]
    settings = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20, "pan_and_scan_min_ratio_to_activate": 1.2}
    text = conversation(processor, [(2, "What is in the two?", "")])

    def prepare() -> Any:
        return dict(processor(images=[pictures], text=[text], return_tensors="pt", **settings))

    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        generate(model, prepare())
    assert not recording.faults
    (trace,) = recording.traces
    first, second = (int((trace.layout.image_index == k).sum()) for k in (0, 1))
    assert first == 4 and second > 8 and second % 4 == 0
    assert probe.verify(trace, model, processor).within(1e-4)


def check_masks(replay: Any, model: Any, processor: Any, prepare: Any) -> None:
    """A mask on one picture is that picture's: replay equals the model on pictures masked by hand."""
    count = len(replay.image_sizes)
    whole = replay.log_probs(torch.ones(1, count, 4, 4))[0]
    torch.testing.assert_close(whole, replay.original_log_probs, atol=1e-4, rtol=0)
    leaf = torch.full((1, count, 4, 4), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(replay.log_probs(leaf).sum(), leaf)
    assert bool((gradient.abs().amax(dim=(0, 2, 3)) > 0).all())
    for k in range(count):
        mine = replay.log_probs(torch.zeros(1, 4, 4), image=k, mode="exact")[0]
        stack = torch.ones(1, count, 4, 4)
        stack[0, k] = 0
        torch.testing.assert_close(mine, replay.log_probs(stack, mode="exact")[0], atol=1e-5, rtol=0)
        shown = [replay.path.baseline_images[i] if i == k else replay.image(i) for i in range(count)]
        inputs = prepare(shown)
        ids = torch.cat([inputs["input_ids"][0], replay.token_ids[:-1]])[None]
        extended = {}
        for key, value in inputs.items():
            if key == "input_ids":
                extended[key] = ids
            elif value.shape[:2] == inputs["input_ids"].shape:
                tail = value[:, -1:].expand(-1, ids.shape[1] - value.shape[1], *value.shape[2:])
                extended[key] = torch.cat([value, torch.zeros_like(tail) if "type_ids" in key else tail], dim=1)
            else:
                extended[key] = value
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None
        with torch.no_grad():
            logits = model(**extended).logits[0, -len(replay.token_ids) :].log_softmax(-1)
        truth = logits.gather(-1, replay.token_ids[:, None])[:, 0]
        torch.testing.assert_close(mine, truth, atol=1e-4, rtol=0)
        assert float((truth - whole).abs().max()) > 1e-3  # every picture has a say


def check_boxes(trace: Any, pictures: list[Any]) -> None:
    """Boxes lie within their own picture, and cover every picture."""
    boxes, index = np.asarray(trace.layout.patch_box), np.asarray(trace.layout.image_index)
    assert set(index.tolist()) == set(range(len(pictures)))
    for k, shown in enumerate(pictures):
        mine = boxes[index == k]
        assert (mine[:, :2] >= -1e-3).all() and (mine[:, 2] <= shown.width + 1e-3).all()
        assert (mine[:, 3] <= shown.height + 1e-3).all()
        real = mine[(mine[:, 2] > mine[:, 0]) & (mine[:, 3] > mine[:, 1])]
        assert len(real) and real[:, 2].max() > 0.6 * shown.width and real[:, 3].max() > 0.6 * shown.height


@pytest.mark.parametrize("name", MANY)
def test_a_batch_of_unequal_pictures(name, tmp_path):
    """Every row of a left-padded batch is what the same prompt is alone."""
    model, processor = tiny_models.build(name)
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
    chats = [
        [(1, "What?", "")],
        [(1, "How many red shapes are there?", "Two."), (1, "And in this picture of the other side?", "")],
        [(1, "Where is the blue triangle in the picture?", "")],
    ]
    groups = [pictures[:1], pictures[1:3], pictures[3:]]
    plain = generate(model, prepared(name, processor, chats, groups))
    with probe.attach(model, processor) as p, p.record(tmp_path / "batch") as recording:
        seen = generate(model, prepared(name, processor, chats, groups))
    assert not recording.faults
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, seen.logits, strict=True))
    assert len(recording.traces) == 3
    for row, trace in enumerate(recording.traces):
        assert [image.size for image in trace.images] == [shown.size for shown in groups[row]]
        replay = probe.replay(trace, model, processor)
        assert probe.verify(trace, model, processor).within(1e-4)

        def alone(shown: list[Any], row: int = row) -> Any:
            return prepared(name, processor, [chats[row]], [shown])

        check_masks(replay, model, processor, alone)
        with probe.attach(model, processor) as p, p.record(tmp_path / str(row)) as single:
            answer = generate(model, alone(groups[row]))
        (other,) = single.traces
        if np.array_equal(other.token_ids, trace.token_ids):
            np.testing.assert_allclose(other.log_probs, trace.log_probs, atol=1e-4)
            if trace.attention is not None:
                keys = other.attention.values.shape[-1]  # cross-attention keeps keys for pictures that fill the row up
                np.testing.assert_allclose(other.attention.values, trace.attention.values[..., :keys], atol=2e-3)
                if trace.attention.values.shape[-1] > keys:
                    assert not trace.attention.key_box[keys:].any() and other.attention.key_box.any()
        assert np.array_equal(other.input_ids, trace.input_ids) and answer is not None
        if trace.layout.patch_box is not None:
            check_boxes(trace, groups[row])
            np.testing.assert_allclose(other.layout.patch_box, trace.layout.patch_box, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------- compilation


def compile_decoder(model: Any, backend: str) -> None:
    model.model.language_model = torch.compile(model.model.language_model, backend=backend)


def compile_tower(model: Any, backend: str) -> None:
    model.model.vision_tower = torch.compile(model.model.vision_tower, backend=backend)


def compile_layers(model: Any, backend: str) -> None:
    for layer in model.model.language_model.layers:
        layer.compile(backend=backend)


def compile_forward(model: Any, backend: str) -> None:
    model.forward = torch.compile(model.forward, backend=backend)


def compile_in_place(model: Any, backend: str) -> None:
    model.compile(backend=backend)


WAYS = [compile_layers, compile_tower, *campaign(compile_forward, compile_in_place, compile_decoder)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_says_the_same_and_is_replayed_as_written(way, tmp_path):
    plain, processor = tiny_models.build("llava")
    model, _ = tiny_models.build("llava")
    torch._dynamo.reset()
    way(model, "aot_eager" if way is compile_decoder else "eager")
    inputs = ask("llava", model, processor)
    before = generate(model, inputs)  # the graphs exist before the probe comes
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        seen = generate(model, ask("llava", model, processor))
    after = generate(model, inputs)
    assert not recording.faults
    for a, b, c in zip(before.logits, seen.logits, after.logits, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)
    (trace,) = recording.traces
    assert trace.log_probs_source == "generation"
    if way is compile_tower:  # the decoder is as it was
        assert trace.attention is not None
    else:
        assert trace.attention is None and any("compiled" in note for note in trace.notes)
    assert fingerprint(model) == fingerprint(plain)
    assert probe.verify(trace, model, processor).within(1e-4)
    mine, here = (probe.replay(trace, held, processor) for held in (model, plain))
    assert torch.equal(mask_gradient(mine), mask_gradient(here))
    # Our own passes run uncompiled, so that what looks inside them sees something.
    for method in ("gradcam", "input_gradient"):
        maps = [probe.explain(replay, method=method, tokens=(0, 2)).values for replay in (mine, here)]
        np.testing.assert_allclose(*maps, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_mask_reaches_a_compiled_model():
    torch._dynamo.reset()
    plain, processor = tiny_models.build("llava")
    model, _ = tiny_models.build("llava")
    compile_in_place(model, "eager")
    with torch.no_grad(), probe.attach(model, processor) as p, probe.attach(plain, tiny_models.build("llava")[1]) as q:
        inputs = ask("llava", model, processor)
        whole = model(**inputs).logits
        with p.masked(torch.zeros(4, 4)), q.masked(torch.zeros(4, 4), images=[picture()]):
            masked, truth = model(**inputs).logits, plain(**inputs).logits
        assert torch.equal(model(**inputs).logits, whole)
    assert torch.equal(masked, truth) and not torch.equal(masked, whole)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_wrapper_is_replayed_but_not_attached_to(tmp_path):
    model, processor = tiny_models.build("llava")
    trace = recorded("llava", model, processor, tmp_path)
    wrapper = torch.compile(model, backend="eager")
    with pytest.raises(probe.errors.AttachError, match=r"model\.compile"):
        probe.attach(wrapper, processor)
    assert probe.verify(trace, wrapper, processor).within(1e-4)


@pytest.mark.filterwarnings("ignore")
def test_generation_that_compiles_itself(tmp_path):
    """A static cache: generate() compiles the model's call for the decoding steps (on accelerators; forced here)."""
    from transformers import CompileConfig

    torch._dynamo.reset()
    model, processor = tiny_models.build("llava")
    compiling = CompileConfig(backend="eager", fullgraph=False)
    compiling._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": compiling}
    before = generate(model, ask("llava", model, processor), **settings)
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        seen = generate(model, ask("llava", model, processor), **settings)
    assert not recording.faults
    assert all(torch.equal(a, b) for a, b in zip(before.logits, seen.logits, strict=True))
    (trace,) = recording.traces
    assert probe.verify(trace, model, processor).within(1e-4)
    assert trace.attention is not None or any("attention" in note for note in trace.notes)
