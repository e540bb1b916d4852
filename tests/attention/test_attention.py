"""The attention row tap: its arithmetic against full softmax matrices, its rows against eager maps, its manners."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lvlm_probe.attention import RowTap, attention_rows
from lvlm_probe.attention import collection as collection_module
from lvlm_probe.attention import tap as tap_module
from lvlm_probe.attention.dispatch import NAME, is_view
from lvlm_probe.attention.layers import dispatches
from lvlm_probe.errors import AttachError, ProbeError

FAMILIES = ("llava", "llava_onevision", "qwen2_5_vl", "gemma3")
QUESTIONS = ("What is in the picture?", "Where?")


def snapshot(model: torch.nn.Module) -> tuple[Any, ...]:
    """Everything the tap could leave behind: registries, every module's own config object and its implementation."""
    return (
        {name: found for name, found in AttentionInterface._global_mapping.items() if name != NAME},
        dict(AttentionMaskInterface._global_mapping),
        [
            (name, id(module.__dict__["config"]), getattr(module.config, "_attn_implementation", None))
            for name, module in model.named_modules()
            if "config" in module.__dict__
        ],
        model.config.to_json_string(),
    )


def batch_of(name: str, model: Any, processor: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A left-padded batch of two prompts with different pictures, and its image columns with their validity."""
    pictures = [[tiny_models.picture(90, 60)], [tiny_models.picture(60, 60, seed=2)]]
    inputs = dict(tiny_models.inputs(name, model, processor, pictures, QUESTIONS))
    inputs.pop("labels", None)
    positions = [(row == model.config.image_token_id).nonzero()[:, 0] for row in inputs["input_ids"]]
    width = max(map(len, positions))
    columns = torch.zeros(2, width, dtype=torch.long)
    valid = torch.zeros(2, width, dtype=torch.bool)
    for row, found in enumerate(positions):
        columns[row, : len(found)] = found
        valid[row, : len(found)] = True
    assert inputs["attention_mask"].min() == 0  # the batch really is padded
    return inputs, columns, valid


def generate(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Any:
    torch.manual_seed(7)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, **{**settings, **kwargs})


def same_output(left: Any, right: Any) -> bool:
    return torch.equal(left.sequences, right.sequences) and all(
        torch.equal(a, b) for a, b in zip(left.logits, right.logits, strict=True)
    )


def eager_last_rows(model: Any, inputs: dict[str, Tensor], columns: Tensor, **kwargs: Any) -> Tensor:
    """The model's own maps: last query of each pass at absolute ``columns``; ``(batch, step, layer, head, key)``."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        steps = generate(model, inputs, output_attentions=True, **kwargs).attentions
    finally:
        model.set_attn_implementation(before)
    prompt = inputs["input_ids"].shape[1]
    collected = []
    for step, maps in enumerate(steps):
        layers = []
        for weights in maps:
            last = weights[:, :, -1]
            local = columns - max(0, prompt + step - last.shape[-1])  # a sliding cache forgot the oldest keys
            inside = (local >= 0)[:, None].expand(-1, last.shape[1], -1)
            picked = last.gather(-1, local.clamp(min=0)[:, None].expand(-1, last.shape[1], -1))
            layers.append(picked * inside)
        collected.append(torch.stack(layers, dim=1))
    return torch.stack(collected, dim=1)


# ---------------------------------------------------------------------------------------------------- the arithmetic


def test_rows_of_a_toy_computed_by_hand() -> None:
    """Scores ln 1, ln 2, ln 3, ln 4: softmax is 1/10, 2/10, 3/10, 4/10; without the last key 1/6, 2/6, 3/6."""
    query = torch.tensor([[[[1.0, 0.0]]]])
    key = torch.tensor([[[[math.log(1), 5.0], [math.log(2), 5.0], [math.log(3), 5.0], [math.log(4), 5.0]]]])
    columns = torch.tensor([[3, 0]])
    rows = attention_rows(query, key, columns=columns, scaling=1.0)
    torch.testing.assert_close(rows, torch.tensor([[[[0.4, 0.1]]]]))
    mask = torch.tensor([[[[True, True, True, False]]]])
    rows = attention_rows(query, key, columns=columns, scaling=1.0, attention_mask=mask)
    torch.testing.assert_close(rows, torch.tensor([[[[0.0, 1 / 6]]]]))
    # A sink of logit ln 10 takes half of the mass, and is no key.
    rows = attention_rows(query, key, columns=columns, scaling=1.0, sinks=torch.tensor([math.log(10)]))
    torch.testing.assert_close(rows, torch.tensor([[[[0.2, 0.05]]]]))


def full_matrix(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The textbook: repeat the key heads, form every score, softmax everything."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.einsum("bhqc,bhkc->bhqk", query, key) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
        return scores.softmax(-1)[..., :-1]
    return scores.softmax(-1)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("case", ["plain", "additive", "boolean", "causal", "softcap", "bias", "sinks", "all"])
def test_rows_equal_the_full_softmax_matrix(case: str, key_heads: int) -> None:
    generator = torch.Generator().manual_seed(3)
    batch, heads, length, channels = 2, 4, 9, 8
    query = torch.randn(batch, heads, length, channels, generator=generator)
    key = torch.randn(batch, key_heads, length, channels, generator=generator)
    seen = torch.ones(length, length).tril().bool()[None, None].repeat(batch, 1, 1, 1)
    seen[0, :, :, :2] = False  # left padding
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    bias = torch.randn(1, heads, length, length, generator=generator)
    sinks = torch.randn(heads, generator=generator)
    everything = case == "all"
    given: dict[str, Any] = {}
    wanted: dict[str, Any] = {}
    if case == "additive" or everything:
        given["attention_mask"] = wanted["mask"] = additive
    if case == "boolean":
        given["attention_mask"], wanted["mask"] = seen, additive
    if case == "causal":
        given["causal"] = True
        wanted["mask"] = torch.full((length, length), float("-inf")).triu(1)
    if case == "softcap" or everything:
        given["softcap"] = wanted["softcap"] = 1.5
    if case == "bias" or everything:
        given["position_bias"] = wanted["bias"] = bias
    if case == "sinks" or everything:
        given["sinks"] = wanted["sinks"] = sinks
    whole = full_matrix(query, key, scaling=0.3, **wanted)
    columns = torch.tensor([[4, 2, 3], [0, 8, 5]])
    for rows in (None, torch.tensor([3, 8, 5]), torch.tensor([[3, 8], [7, 4]])):
        got = attention_rows(query, key, columns=columns, rows=rows, scaling=0.3, **given)
        picked = torch.tensor([[length - 1]] * batch) if rows is None else rows.expand(batch, -1)
        want = torch.stack([whole[b][:, picked[b]][:, :, columns[b]] for b in range(batch)])
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_rows_are_float32_whatever_the_inputs_are() -> None:
    query, key = torch.randn(1, 2, 3, 16).bfloat16(), torch.randn(1, 2, 50, 16).bfloat16()
    columns = torch.arange(50)[None]
    rows = attention_rows(query, key, columns=columns, scaling=0.25)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.sum(-1), torch.ones(1, 2, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        rows, full_matrix(query.float(), key.float(), scaling=0.25)[:, :, -1:], atol=1e-6, rtol=0
    )


def test_columns_outside_the_keys_weigh_nothing_and_padding_rows_are_zero() -> None:
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    rows = attention_rows(query, key, columns=torch.tensor([[-1, 0, 1, 2, 3]]))
    assert torch.equal(rows[..., 0], torch.zeros(1, 2, 1))
    assert torch.equal(rows[..., 4], torch.zeros(1, 2, 1))
    torch.testing.assert_close(rows.sum(-1), torch.ones(1, 2, 1))
    nothing = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    rows = attention_rows(query, key, columns=torch.tensor([[0, 1, 2]]), attention_mask=nothing)
    assert torch.equal(rows, torch.zeros(1, 2, 1, 3))


def test_heads_that_do_not_group_are_refused() -> None:
    with pytest.raises(ValueError, match="4 query heads over 3 key heads"):
        attention_rows(torch.randn(1, 4, 1, 8), torch.randn(1, 3, 5, 8), columns=torch.tensor([[0]]))


# ------------------------------------------------------------------------------------------- rows of running models


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_is_bit_equal_and_rows_equal_the_eager_maps(name: str, implementation: str) -> None:
    model, processor = tiny_models.build(name, attn_implementation=implementation)
    inputs, columns, valid = batch_of(name, model, processor)
    settings = {"do_sample": True, "temperature": 1.3}
    plain = generate(model, inputs, **settings)
    state = torch.random.get_rng_state()
    before = snapshot(model)
    with RowTap(model) as tap:
        assert not tap.unsupported
        tap.arm(columns, valid=valid, heads="all", dtype=torch.float32)
        tapped = generate(model, inputs, **settings)
        assert torch.equal(torch.random.get_rng_state(), state)
        rows = tap.collect()
    assert snapshot(model) == before
    assert same_output(plain, tapped)
    assert rows is not None
    assert tap.error is None
    assert not rows.missing
    assert [layer.index for layer in rows.layers] == [0, 1, 2]
    assert rows.values.shape == (2, 6, 3, 4, columns.shape[1])
    want = eager_last_rows(model, inputs, columns, **settings) * valid[:, None, None, None]
    torch.testing.assert_close(rows.values, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.text_mass + rows.values.sum(-1), torch.ones(2, 6, 3, 4), atol=1e-6, rtol=0)
    assert rows.values[valid[:, None, None, None].expand_as(rows.values)].max() > 0.01


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_sliding_window_rows_are_placed_by_absolute_position(implementation: str) -> None:
    """gemma3's window of 8 keeps the newest keys only; all prompt positions are asked for."""
    model, processor = tiny_models.build("gemma3", attn_implementation=implementation)
    inputs, _, _ = batch_of("gemma3", model, processor)
    columns = torch.arange(inputs["input_ids"].shape[1]).repeat(2, 1)
    with RowTap(model) as tap:
        tap.arm(columns, heads="all", dtype=torch.float32)
        generate(model, inputs)
        rows = tap.collect()
    assert rows is not None
    want = eager_last_rows(model, inputs, columns)
    torch.testing.assert_close(rows.values, want, atol=1e-5, rtol=0)
    # Decoding step 5 of a sliding layer sees 8 - 5 prompt positions; the full layer sees them all.
    assert (rows.values[1, 5, 0, 0] > 0).sum() == 3
    assert (rows.values[1, 5, 1, 0] > 0).sum() == inputs["attention_mask"][1].sum()
    # The prefill's last query sees itself and everything in its window: no mass is elsewhere.
    torch.testing.assert_close(rows.text_mass[:, 0], torch.zeros(2, 3, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_rows_without_a_cache(name: str, implementation: str) -> None:
    """Every pass is over all positions, and sees no others."""
    model, processor = tiny_models.build(name, attn_implementation=implementation)
    inputs, columns, valid = batch_of(name, model, processor)
    with RowTap(model) as tap:
        tap.arm(columns, valid=valid, heads="all", dtype=torch.float32)
        generate(model, inputs, use_cache=False)
        rows = tap.collect()
    assert rows is not None and not rows.missing and tap.error is None
    want = eager_last_rows(model, inputs, columns, use_cache=False) * valid[:, None, None, None]
    torch.testing.assert_close(rows.values, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "qwen3_vl", "internvl", "idefics3", "paligemma"])
def test_more_families(name: str) -> None:
    model, processor = tiny_models.build(name)
    inputs, columns, valid = batch_of(name, model, processor)
    plain = generate(model, inputs)
    with RowTap(model) as tap:
        tap.arm(columns, valid=valid, heads="all", dtype=torch.float32)
        assert same_output(plain, generate(model, inputs))
        rows = tap.collect()
    assert rows is not None
    want = eager_last_rows(model, inputs, columns) * valid[:, None, None, None]
    torch.testing.assert_close(rows.values, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_teacher_forced_rows_and_gradients(name: str, implementation: str) -> None:
    model, processor = tiny_models.build(name, attn_implementation=implementation)
    inputs, columns, valid = batch_of(name, model, processor)
    answer = generate(model, inputs).sequences[:, inputs["input_ids"].shape[1] :]
    prompt = inputs["input_ids"].shape[1]
    forced = dict(inputs)
    forced["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    forced["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1)
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            forced[key] = torch.cat([inputs[key], torch.zeros_like(answer)], dim=1)

    def run() -> tuple[Tensor, Tensor]:
        pixels = inputs["pixel_values"].clone().requires_grad_(True)
        logits = model(**{**forced, "pixel_values": pixels}, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits[:, -1].logsumexp(-1).sum(), pixels)
        return logits.detach(), gradient

    plain, plain_gradient = run()
    queries = torch.arange(prompt - 1, prompt + answer.shape[1] - 1)
    collected = []
    with RowTap(model) as tap:
        for positions in (queries, queries.repeat(2, 1)):
            tap.arm(columns, valid=valid, queries=positions, heads="all", dtype=torch.float32)
            logits, gradient = run()
            assert torch.equal(logits, plain)
            assert torch.equal(gradient, plain_gradient)
            rows = tap.collect()
            assert rows is not None
            assert not rows.values.requires_grad
            collected.append(rows)
    torch.testing.assert_close(collected[0].values, collected[1].values, atol=0, rtol=0)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**forced, use_cache=False, output_attentions=True).attentions
    whole = torch.stack(list(maps), dim=1)[:, :, :, queries]  # (batch, layer, head, step, key)
    index = columns[:, None, None, None].expand(*whole.shape[:-1], -1)
    want = whole.gather(-1, index).movedim(3, 1) * valid[:, None, None, None]
    torch.testing.assert_close(collected[0].values, want, atol=1e-5, rtol=0)


def test_rows_do_not_change_when_layers_are_recomputed_for_backward() -> None:
    model, processor = tiny_models.build("llava")
    inputs, columns, valid = batch_of("llava", model, processor)
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, transformers.modeling_layers.GradientCheckpointingLayer):
            module.training = True
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.get_decoder().layers[0].self_attn.register_forward_hook(count)
    pixels = inputs["pixel_values"].clone().requires_grad_(True)
    with RowTap(model) as tap:
        tap.arm(columns, valid=valid, queries=torch.tensor([20, 21]))
        model(**{**inputs, "pixel_values": pixels}, use_cache=False).logits.sum().backward()
        rows = tap.collect()
    assert calls == 2  # checkpointing really recomputed
    assert rows is not None
    assert rows.values.shape[1] == 2
    assert not rows.missing


def test_mean_over_heads_and_dtype() -> None:
    model, processor = tiny_models.build("llava_onevision")
    inputs, columns, valid = batch_of("llava_onevision", model, processor)
    with RowTap(model) as tap:
        tap.arm(columns, valid=valid, heads="all", dtype=torch.float32)
        generate(model, inputs)
        every = tap.collect()
        tap.arm(columns, valid=valid)
        generate(model, inputs)
        mean = tap.collect()
    assert every is not None
    assert mean is not None
    assert mean.values.dtype == torch.float16
    assert mean.values.shape[3] == 1
    torch.testing.assert_close(mean.values.float(), every.values.mean(3, keepdim=True), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(mean.text_mass, every.text_mass.mean(3, keepdim=True), atol=1e-6, rtol=0)


def test_a_small_budget_changes_nothing_but_where_rows_wait() -> None:
    model, processor = tiny_models.build("llava")
    inputs, columns, valid = batch_of("llava", model, processor)
    got = []
    with RowTap(model) as tap:
        for budget in (2**30, 1):
            tap.arm(columns, valid=valid, budget_bytes=budget)
            generate(model, inputs)
            got.append(tap.collect())
    assert torch.equal(got[0].values, got[1].values)
    assert torch.equal(got[0].text_mass, got[1].text_mass)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_unpadded_prompt_has_no_mask_and_is_causal_all_the_same(name: str, cache: str) -> None:
    """sdpa gets ``attention_mask=None`` and ``is_causal``: the tap must apply causality to the rows by itself."""
    model, processor = tiny_models.build(name)
    inputs = dict(tiny_models.inputs(name, model, processor, [tiny_models.picture()], QUESTIONS[0]))
    length = inputs["input_ids"].shape[1]
    columns, queries = torch.arange(length)[None], torch.arange(length // 2, length)
    settings = {"max_new_tokens": 1, "min_new_tokens": 1, "cache_implementation": cache}
    with RowTap(model) as tap:
        tap.arm(columns, queries=queries, heads="all", dtype=torch.float32)
        generate(model, inputs, **settings)
        rows = tap.collect()
    assert rows is not None
    model.set_attn_implementation("eager")
    maps = generate(model, inputs, output_attentions=True, **{**settings, "cache_implementation": "dynamic"})
    want = torch.stack([weights[:, :, queries] for weights in maps.attentions[0]], dim=1).movedim(3, 1)
    torch.testing.assert_close(rows.values, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.text_mass, torch.zeros_like(rows.text_mass), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_static_cache_keys_that_are_not_filled_yet(name: str) -> None:
    model, processor = tiny_models.build(name)
    inputs, columns, valid = batch_of(name, model, processor)
    plain = generate(model, inputs, cache_implementation="static")
    with RowTap(model) as tap:
        tap.arm(columns, valid=valid, heads="all", dtype=torch.float32)
        assert same_output(plain, generate(model, inputs, cache_implementation="static"))
        rows = tap.collect()
    assert rows is not None
    want = eager_last_rows(model, inputs, columns) * valid[:, None, None, None]
    torch.testing.assert_close(rows.values, want, atol=1e-5, rtol=0)


def text_model(config: str, model: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    return getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **heads, **settings})).eval()


@pytest.mark.parametrize(
    ("config", "model", "settings"),
    [
        ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
        ("Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": 8, "attn_logit_softcapping": 0.5}),
        ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8}),
        ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 32, "word_embed_proj_dim": 32}),
        ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_head": 4, "bos_token_id": 2}),
        (
            "DeepseekV32Config",
            "DeepseekV32ForCausalLM",
            {
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
                "v_head_dim": 8,
                "n_routed_experts": 2,
                "num_experts_per_tok": 1,
                "n_group": 1,
                "topk_group": 1,
                "index_topk": 6,
                "index_n_heads": 2,
                "index_head_dim": 16,
                "num_key_value_heads": 4,
                "first_k_dense_replace": 4,
            },
        ),
    ],
    ids=["sliding", "softcap", "sinks", "opt", "asks-eager", "sparse-asks-sdpa"],
)
def test_decoders_with_windows_softcaps_sinks_and_sparse_layers(
    config: str, model: str, settings: dict[str, Any]
) -> None:
    decoder = text_model(config, model, **settings)
    if config == "Gemma2Config":
        decoder.set_attn_implementation("eager")  # sdpa refuses a softcap
    ids = torch.randint(3, 99, (2, 14), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][0, :3] = 0
    columns = torch.arange(14).repeat(2, 1)
    plain = generate(decoder, inputs)
    with RowTap(decoder) as tap:
        assert len(tap.layers) == 4
        tap.arm(columns, heads="all", dtype=torch.float32)
        assert same_output(plain, generate(decoder, inputs))
        rows = tap.collect()
    assert rows is not None
    assert not rows.missing
    torch.testing.assert_close(rows.values, eager_last_rows(decoder, inputs, columns), atol=1e-5, rtol=0)


def test_chunked_prefill_gives_one_step_when_the_prompt_length_is_known() -> None:
    decoder = text_model("LlamaConfig", "LlamaForCausalLM")
    ids = torch.randint(3, 99, (1, 14), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    columns = torch.arange(14)[None]
    with RowTap(decoder) as tap:
        tap.arm(columns, heads="all", dtype=torch.float32, prompt_length=14)
        generate(decoder, inputs, prefill_chunk_size=5)
        rows = tap.collect()
    assert rows is not None
    torch.testing.assert_close(rows.values, eager_last_rows(decoder, inputs, columns), atol=1e-5, rtol=0)


def test_bfloat16_rows_stay_near_the_model_own() -> None:
    model, processor = tiny_models.build("llava")
    model = model.to(torch.bfloat16)
    inputs, columns, valid = batch_of("llava", model, processor)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with RowTap(model) as tap:
        tap.arm(columns, valid=valid, heads="all", dtype=torch.float32)
        plain = generate(model, inputs)
        rows = tap.collect()
    assert rows is not None
    want = eager_last_rows(model, inputs, columns) * valid[:, None, None, None]
    assert plain.sequences.shape[1] > 0
    torch.testing.assert_close(rows.values[:, 0], want[:, 0].float(), atol=0.02, rtol=0)


# ------------------------------------------------------------------------------------------------------ what is said


def test_cross_attention_and_linear_layers_are_named_with_a_reason() -> None:
    model, _ = tiny_models.build("mllama")
    tap = RowTap(model)
    assert [(layer.index, layer.module) for layer in tap.layers] == [
        (0, "model.language_model.layers.0.self_attn"),
        (2, "model.language_model.layers.2.self_attn"),
    ]
    assert list(tap.unsupported) == ["model.language_model.layers.1.cross_attn"]
    assert "image states" in tap.unsupported["model.language_model.layers.1.cross_attn"]

    linear = text_model("Qwen3_5TextConfig", "Qwen3_5ForCausalLM")
    tap = RowTap(linear)
    assert [layer.index for layer in tap.layers] == [3]
    assert {path: "no attention map" in reason for path, reason in tap.unsupported.items()} == {
        f"model.layers.{index}": True for index in (0, 1, 2)
    }


def test_a_linear_layer_is_named_after_what_mixes_its_tokens_not_after_an_embedding_beside_it() -> None:
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    experts = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 2}
    beside = {"ple_layer_ids": [1], "ple_embed_dim": 16, "heads_per_ngram": 2, "ngram_vocab_size_base": 64}
    indexer = {"n_heads": 2, "kv_heads": 1, "head_dim": 8, "budget": 8, "compress_ratio": 2}
    model = text_model(
        "Qwen4ExpTextConfig",
        "Qwen4ExpForCausalLM",
        layer_types=["linear_attention", "linear_attention", "linear_attention", "indexed_attention"],
        num_experts_per_tok=1,
        linear_num_value_heads=2,
        **{**linear, **experts, **beside, **{f"indexer_{name}": value for name, value in indexer.items()}},
    )
    assert any(name.endswith("ple_embedding") for name, _ in model.named_modules())
    reasons = RowTap(model).unsupported
    assert set(reasons.values()) == {"no attention map: Qwen4ExpTextGatedDeltaNet has no softmax attention"}
    assert len(reasons) == 3


def test_mllama_self_attention_is_bit_equal_and_right() -> None:
    model, processor = tiny_models.build("mllama")
    inputs = dict(tiny_models.inputs("mllama", model, processor, [tiny_models.picture()], "Where?"))
    columns = torch.arange(inputs["input_ids"].shape[1])[None]
    plain = generate(model, inputs)
    with RowTap(model) as tap:
        tap.arm(columns, heads="all", dtype=torch.float32)
        assert same_output(plain, generate(model, inputs))
        rows = tap.collect()
    assert rows is not None
    torch.testing.assert_close(rows.text_mass[:, 0], torch.zeros(1, 2, 4), atol=1e-5, rtol=0)


def test_flash_and_flex_are_not_tapped_and_say_why() -> None:
    model, _ = tiny_models.build("llava")
    before = snapshot(model)
    config = model.get_decoder().config
    config._attn_implementation_internal = "flex_attention"
    tap = RowTap(model)
    assert not tap.layers
    assert all("flex_attention" in reason for reason in tap.unsupported.values())
    with tap, pytest.raises(AttachError, match="flex_attention"):
        tap.arm(torch.zeros(1, 1, dtype=torch.long))
    config._attn_implementation_internal = "sdpa"
    assert snapshot(model) == before


def test_own_forward_attention_is_reported() -> None:
    bloom = text_model("BloomConfig", "BloomForCausalLM", n_head=4)
    tap = RowTap(bloom)
    assert not tap.layers
    assert len(tap.unsupported) >= 1
    assert any("attention" in reason for reason in tap.unsupported.values())


@pytest.mark.quick
def test_a_layer_that_goes_past_the_interface_is_missing_with_a_reason() -> None:
    model, processor = tiny_models.build("llava")
    inputs, columns, valid = batch_of("llava", model, processor)
    layer = model.get_decoder().layers[1].self_attn
    layer.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    with RowTap(model) as tap:
        tap.arm(columns, valid=valid)
        model(**inputs)
        rows = tap.collect()
    assert rows is not None
    assert [kept.index for kept in rows.layers] == [0, 2]
    assert list(rows.missing) == ["model.language_model.layers.1.self_attn"]
    assert "0 of 1" in rows.missing["model.language_model.layers.1.self_attn"]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_layer_that_runs_twice_in_a_pass_gives_no_rows_and_the_others_their_own(name: str) -> None:
    model, processor = tiny_models.build(name)
    tiny_models.loop(model, [1])
    inputs, columns, valid = batch_of(name, model, processor)
    plain = generate(model, inputs)
    with RowTap(model) as tap:
        tap.arm(columns, valid=valid, heads="all", dtype=torch.float32)
        assert same_output(plain, generate(model, inputs))
        rows = tap.collect()
    assert rows is not None and [layer.index for layer in rows.layers] == [0, 2]
    want = eager_last_rows(model, inputs, columns) * valid[:, None, None, None]
    torch.testing.assert_close(rows.values, want[:, :, [0, -1]], atol=1e-5, rtol=0)
    assert list(rows.missing) == ["model.language_model.layers.1.self_attn"]
    assert "runs more than once in a pass" in rows.missing["model.language_model.layers.1.self_attn"]


class OverLayers(torch.nn.Module):
    """Attention of each position over what layers have given there, as Inkling 2 has it in the place of residuals."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.is_causal = config, False

    def forward(self, block_states: Tensor, partial_block_states: Tensor) -> Tensor:
        states = torch.stack([block_states, partial_block_states], dim=-2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        return attend(self, states[..., -1:, :], states, states, None)[0][:, 0]


def test_attention_over_layers_is_none_along_the_sequence() -> None:
    model, _ = tiny_models.build("llava")
    before = [layer.module for layer in RowTap(model).layers]
    for layer in model.get_decoder().layers:
        layer.input = OverLayers(model.get_decoder().config)
    assert dispatches(model.get_decoder().layers[0].input)
    assert [layer.module for layer in RowTap(model).layers] == before


def test_bad_arguments() -> None:
    model, _ = tiny_models.build("llava")
    tap = RowTap(model)
    columns = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(AttachError, match="not installed"):
        tap.arm(columns)
    with tap:
        with pytest.raises(ValueError, match="columns must be"):
            tap.arm(columns[0])
        with pytest.raises(ValueError, match="must agree"):
            tap.arm(columns, valid=torch.ones(1, 3, dtype=torch.bool))
        with pytest.raises(ValueError, match="'last' or positions"):
            tap.arm(columns, queries="first")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="not empty"):
            tap.arm(columns, queries=torch.zeros(0, dtype=torch.long))
        with pytest.raises(ValueError, match="heads must be"):
            tap.arm(columns, heads="max")  # type: ignore[arg-type]
        assert not tap.armed
        tap.arm(columns)
        assert tap.collect() is None
        assert not tap.armed


# ------------------------------------------------------------------------------------------------------------ fences


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_fault_in_the_row_computation_leaves_generation_alone(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_models.build("llava", attn_implementation=implementation)
    inputs, columns, valid = batch_of("llava", model, processor)
    # Rows are computed within the pass where a step does not leave its query for later.
    cache = {"cache_implementation": "static" if implementation == "sdpa" else "dynamic"}
    plain = generate(model, inputs, **cache)
    calls = 0

    def broken(*_: Any, **__: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls < 5:  # fail in the middle of the generation
            return torch.zeros(2, 4, 1, columns.shape[1])
        raise RuntimeError("injected")

    monkeypatch.setattr(tap_module, "attention_rows" if implementation == "sdpa" else "take_columns", broken)
    errors: list[BaseException] = []

    def on_error(error: BaseException) -> None:
        errors.append(error)
        raise ValueError("a broken handler must not reach the model either")

    with RowTap(model, on_error=on_error) as tap:
        tap.arm(columns, valid=valid)
        assert same_output(plain, generate(model, inputs, **cache))
        assert [str(error) for error in errors] == ["injected"]
        assert calls == 5
        assert tap.error is errors[0]
        assert not tap.armed
        assert tap.collect() is None
        monkeypatch.undo()
        tap.arm(columns, valid=valid)  # and it can be armed again
        generate(model, inputs, **cache)
        assert tap.error is None
        assert tap.collect() is not None


def test_wrong_batch_and_wrong_positions_disarm_with_a_sentence() -> None:
    model, processor = tiny_models.build("llava")
    inputs, columns, valid = batch_of("llava", model, processor)
    errors: list[str] = []
    with RowTap(model, on_error=lambda error: errors.append(str(error))) as tap:
        tap.arm(columns[:1], valid=valid[:1])
        model(**inputs)
        tap.arm(columns, valid=valid, queries=torch.tensor([3, 500]))
        model(**inputs)
    assert "batch of 1, the model runs 2" in errors[0]
    assert "3…500 are not all in this pass" in errors[1]


def test_the_backend_own_error_reaches_the_user_and_the_context_still_cleans_up() -> None:
    model, processor = tiny_models.build("llava")
    inputs, columns, valid = batch_of("llava", model, processor)
    before = snapshot(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_decoder().layers[1].mlp.register_forward_hook(interrupt)
    tap = RowTap(model)

    def tapped_run() -> None:
        with tap:
            tap.arm(columns, valid=valid)
            generate(model, inputs)

    with pytest.raises(KeyboardInterrupt):
        tapped_run()
    handle.remove()
    assert snapshot(model) == before
    assert not tap.armed
    assert not tap.installed


# ---------------------------------------------------------------------------------------------- install and restore


def test_install_and_remove_are_idempotent_and_the_last_tap_out_restores() -> None:
    model, _ = tiny_models.build("qwen2_5_vl")
    before = snapshot(model)
    tap = RowTap(model)
    assert tap.install() is tap
    assert tap.install() is tap
    assert tap.installed
    other = RowTap(model).install()
    tap.remove()
    tap.remove()
    assert snapshot(model) != before
    other.remove()
    assert snapshot(model) == before
    with tap:
        assert tap.installed
    assert snapshot(model) == before


def test_vision_tower_and_every_config_stay_as_they_are() -> None:
    for name in ("llava_onevision", "qwen2_5_vl"):
        model, _ = tiny_models.build(name)
        decoder = model.get_decoder()
        configs = {id(module): module.__dict__["config"] for module in model.modules() if "config" in module.__dict__}
        with RowTap(model) as tap:
            touched = {
                path
                for path, module in model.named_modules()
                if "config" in module.__dict__ and module.__dict__["config"] is not configs[id(module)]
            }
            assert touched == {layer.module for layer in tap.layers}
            assert model.config._attn_implementation == decoder.config._attn_implementation == "sdpa"


def test_garbage_collection_of_the_tap_restores_the_model() -> None:
    model, _ = tiny_models.build("llava")
    before = snapshot(model)
    tap = RowTap(model).install()
    assert snapshot(model) != before
    del tap
    gc.collect()
    assert snapshot(model) == before


def test_the_tap_does_not_keep_the_model_alive() -> None:
    model, _ = tiny_models.build("llava")
    alive = weakref.ref(model)
    tap = RowTap(model).install()
    del model
    gc.collect()
    assert alive() is None
    tap.remove()


def test_copies_and_pickles_of_a_tapped_model_are_untapped(tmp_path: Any) -> None:
    model, processor = tiny_models.build("llava")
    inputs, columns, valid = batch_of("llava", model, processor)
    # Before any forward pass: transformers' own output-capturing hooks, laid by the first one, do not pickle.
    with RowTap(model) as tap:
        tap.arm(columns, valid=valid)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    twins.append(pickle.loads(pickle.dumps(model)))
    model.save_pretrained(tmp_path)
    twins.append(type(model).from_pretrained(tmp_path))
    with torch.no_grad():
        want = model(**inputs).logits
    for twin in twins:
        assert not any(is_view(module.__dict__.get("config")) for module in twin.modules())
        with torch.no_grad():
            assert torch.equal(twin(**inputs).logits, want)


def test_a_model_compiles_after_the_tap_is_gone() -> None:
    decoder = text_model("LlamaConfig", "LlamaForCausalLM", num_hidden_layers=1)
    ids = torch.randint(3, 99, (1, 6))
    with torch.no_grad():
        want = decoder(ids, use_cache=False).logits
        with RowTap(decoder) as tap:
            tap.arm(torch.tensor([[1]]))
            decoder(ids, use_cache=False)
        compiled = torch.compile(decoder, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, want)


def test_a_compiled_pass_is_not_observed_and_still_runs() -> None:
    decoder = text_model("LlamaConfig", "LlamaForCausalLM", num_hidden_layers=1)
    ids = torch.randint(3, 99, (1, 6))
    with torch.no_grad(), RowTap(decoder) as tap:
        want = decoder(ids, use_cache=False).logits
        compiled = torch.compile(decoder, backend="eager")
        tap.arm(torch.tensor([[1]]))
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, want)
        rows = tap.collect()
    assert rows is None or rows.values.shape[1] == 1  # a graph break at the tap may let it see the call


def test_two_models_at_once_do_not_mix() -> None:
    first, processor = tiny_models.build("llava", seed=0)
    second, _ = tiny_models.build("llava", seed=1)
    inputs, columns, valid = batch_of("llava", first, processor)
    alone = []
    for model in (first, second):
        with RowTap(model) as tap:
            tap.arm(columns, valid=valid)
            generate(model, inputs)
            alone.append(tap.collect())
    with RowTap(first) as one, RowTap(second) as two:
        one.arm(columns, valid=valid)
        two.arm(columns, valid=valid)
        generate(second, inputs)
        generate(first, inputs)
        together = [one.collect(), two.collect()]
    for expected, got in zip(alone, together, strict=True):
        assert torch.equal(expected.values, got.values)
    assert not torch.equal(together[0].values, together[1].values)


def test_switching_the_implementation_while_tapped_takes_effect() -> None:
    model, processor = tiny_models.build("llava")
    inputs, columns, valid = batch_of("llava", model, processor)
    model.set_attn_implementation("eager")
    eager = generate(model, inputs)
    model.set_attn_implementation("sdpa")
    with RowTap(model) as tap:
        model.set_attn_implementation("eager")
        tap.arm(columns, valid=valid)
        assert same_output(eager, generate(model, inputs))
        assert tap.collect() is not None
    assert all(
        module.config._attn_implementation == "eager"
        for module in model.get_decoder().layers.modules()
        if hasattr(module, "config")
    )


def test_the_name_reads_as_the_old_one_and_looks_up_the_tap() -> None:
    model, _ = tiny_models.build("llava")
    with RowTap(model) as tap:
        name = model.get_submodule(tap.layers[0].module).config._attn_implementation
        assert name == "sdpa"
        assert not name.__ne__("sdpa")
        assert name in ("eager", "sdpa")
        assert name != "eager"
        assert AttentionInterface._global_mapping[name] is not AttentionInterface._global_mapping["sdpa"]
        config = model.get_submodule(tap.layers[0].module).config
        assert isinstance(config, type(model.get_decoder().config))
        config.pretraining_tp = 3  # writes go through to the config itself
        assert model.get_decoder().config.pretraining_tp == 3


def test_layers_with_different_head_counts_need_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_models.build("llava")
    inputs, columns, valid = batch_of("llava", model, processor)
    real = tap_module.attention_rows
    calls = iter(range(100))

    def uneven(*args: Any, **kwargs: Any) -> Tensor:
        rows = real(*args, **kwargs)
        return rows[:, :2] if next(calls) == 1 else rows

    monkeypatch.setattr(collection_module, "attention_rows", uneven)
    with RowTap(model) as tap:
        tap.arm(columns, valid=valid, heads="all")
        model(**inputs)
        with pytest.raises(ProbeError, match="mean"):
            tap.collect()
