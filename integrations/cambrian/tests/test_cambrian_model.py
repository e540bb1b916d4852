"""The native model as transformers uses models: generation, batches, caches, saving, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cambrian_tiny import IMAGE, VOCABULARY, build, config, inputs, picture
from lvlm_probe_cambrian import CambrianConfig, CambrianForConditionalGeneration
from lvlm_probe_cambrian.sampler import CrossAttention, SamplerState, readings
from lvlm_probe_cambrian.small import small_tower
from lvlm_probe_cambrian.towers import ConvNextStages
from transformers import AutoConfig, AutoModelForImageTextToText, ConvNextModel

PIXELS = tuple(f"pixel_values_{tower}" for tower in range(4))


def generate(model: Any, given: Any, **more: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 8, "do_sample": False, **more}
    with torch.no_grad():
        return model.generate(**given, **settings)[:, given["input_ids"].shape[1] :]


@pytest.mark.parametrize("decoder", ["llama", "phi3"])
def test_the_picture_has_a_say(decoder: str) -> None:
    model, processor = build(decoder=decoder)
    with torch.no_grad():
        one, two = (model(**inputs(processor, picture(seed=seed))).logits[0, -1] for seed in (0, 1))
    assert (one - two).abs().max() > 0.1


@pytest.mark.parametrize("decoder", ["llama", "phi3"])
def test_with_and_without_cache_the_same(decoder: str) -> None:
    model, processor = build(decoder=decoder)
    given = inputs(processor)
    assert torch.equal(generate(model, given), generate(model, given, use_cache=False))


def test_a_padded_batch_of_other_shapes_answers_as_each_alone() -> None:
    model, processor = build()
    images = [picture(90, 60, 0), picture(30, 95, 1), picture(64, 64, 2)]
    texts = [
        f"<s>USER: <image>\n{question} ASSISTANT:" for question in ("What?", "Where is it?", "How many are there?")
    ]
    batch = processor(images=images, text=texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        together = model.generate(
            **batch, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        for row, (image, text) in enumerate(zip(images, texts, strict=True)):
            alone = processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
            own = model.generate(
                **alone, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            for step, (mine, theirs) in enumerate(zip(own.logits, together.logits, strict=False)):
                assert torch.allclose(mine[0], theirs[row], atol=2e-5), (row, step)


def test_beams_samples_and_several_pictures_a_prompt() -> None:
    """Beams follow the pictures of their own row: two rows with two pictures each, in both orders."""
    model, processor = build()
    first, second = picture(90, 60, 0), picture(30, 95, 1)
    texts = ["<s>USER: <image><image>Which? ASSISTANT:"] * 2
    batch = processor(
        images=[first, second, second, first], text=texts, return_tensors="pt", padding=True, add_special_tokens=False
    )
    found = generate(model, batch, num_beams=3)
    for row, images in enumerate(([first, second], [second, first])):
        alone = processor(images=images, text=texts[:1], return_tensors="pt", add_special_tokens=False)
        assert torch.equal(generate(model, alone, num_beams=3)[0], found[row])
    torch.manual_seed(0)
    sampled = generate(model, inputs(processor), do_sample=True, num_return_sequences=3)
    assert sampled.shape[0] == 3


def test_a_decoding_step_never_runs_towers_or_aggregator() -> None:
    model, processor = build()
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, CrossAttention | ConvNextStages):
            module.register_forward_hook(lambda *_given, name=name: calls.append(name))
    generate(model, inputs(processor), min_new_tokens=8)
    layers = model.config.connector_depth + len(model.config.sampler_layers) + 1
    assert len(calls) == len(set(calls)) == layers
    calls.clear()
    generate(model, processor(text="<s>only words", return_tensors="pt", add_special_tokens=False))
    assert calls == []


def test_text_alone_is_the_decoder_alone() -> None:
    model, processor = build()
    given = processor(text="<s>only words", return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        found = model(**given).logits
        hidden = model.model.language_model(input_ids=given["input_ids"]).last_hidden_state
        assert torch.equal(found, model.lm_head(hidden))


def test_kept_logits_are_the_last_ones() -> None:
    model, processor = build()
    given = inputs(processor)
    with torch.no_grad():
        every = model(**given).logits
        assert every.shape[-1] == VOCABULARY
        assert torch.allclose(model(**given, logits_to_keep=3).logits, every[:, -3:], atol=1e-5)
        assert torch.allclose(model(**given, logits_to_keep=torch.tensor([4, 9])).logits, every[:, [4, 9]], atol=1e-5)
        loss = model(**given, labels=given["input_ids"].masked_fill(given["input_ids"] == IMAGE, -100)).loss
    wanted = torch.nn.functional.cross_entropy(
        every[0, :-1], given["input_ids"].masked_fill(given["input_ids"] == IMAGE, -100)[0, 1:]
    )
    assert torch.allclose(loss, wanted)


@pytest.mark.parametrize("decoder", ["llama", "phi3"])
def test_eager_gives_the_numbers_of_sdpa_and_its_attention(decoder: str) -> None:
    (fused, processor), (eager, _) = build(decoder=decoder), build(decoder=decoder, attention="eager")
    given = inputs(processor)
    with torch.no_grad():
        found = eager(**given, output_attentions=True, output_hidden_states=True)
        assert torch.allclose(found.logits, fused(**given).logits, atol=2e-5)
    length = given["input_ids"].shape[1]
    assert len(found.attentions) == eager.config.text_config.num_hidden_layers
    assert found.attentions[0].shape == (1, 4, length, length)
    assert torch.allclose(found.attentions[0].sum(dim=-1), torch.ones(1, 4, length), atol=1e-5)
    assert len(found.hidden_states) == eager.config.text_config.num_hidden_layers + 1
    fused.set_attn_implementation("eager")
    assert {part._attn_implementation for part in fused.config.vision_configs} == {"eager"}
    assert next(m for m in fused.modules() if isinstance(m, CrossAttention)).config._attn_implementation == "eager"


def _settings(value: Any) -> Any:
    """A configuration without what saving adds to it."""
    added = ("dtype", "architectures", "transformers_version", "_name_or_path")
    return {k: _settings(v) for k, v in value.items() if k not in added} if isinstance(value, dict) else value


@pytest.mark.parametrize("decoder", ["llama", "phi3"])
def test_saved_and_loaded_bit_for_bit(tmp_path: Path, decoder: str) -> None:
    model, processor = build(decoder=decoder)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert isinstance(again, CambrianForConditionalGeneration)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert _settings(again.config.to_dict()) == _settings(model.config.to_dict())
    assert _settings(AutoConfig.from_pretrained(tmp_path).to_dict()) == _settings(model.config.to_dict())
    given = inputs(processor)
    with torch.no_grad():
        assert torch.equal(model(**given).logits, again(**given).logits)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert half(**given).logits.isfinite().all()


def test_gradients_reach_every_tower_and_checkpointing_keeps_them() -> None:
    model, processor = build()
    given = inputs(processor)

    def gradients() -> list[torch.Tensor]:
        leaves = {name: given[name].clone().requires_grad_(True) for name in PIXELS}
        logits = model(**{**given, **leaves}, use_cache=False).logits
        return list(torch.autograd.grad(logits[0, -1].logsumexp(-1), list(leaves.values())))

    plain = gradients()
    assert all(part.abs().max() > 1e-6 for part in plain)
    model.train()
    model.gradient_checkpointing_enable()
    layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]
    assert len(layers) >= model.config.text_config.num_hidden_layers
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(plain, gradients(), strict=True))


def test_weights_learn_from_the_first_step() -> None:
    """Fresh weights, one step on each: everything that takes part has a gradient."""
    torch.manual_seed(0)
    model = CambrianForConditionalGeneration(config())
    given = inputs(build()[1])
    model(**given, labels=given["input_ids"].masked_fill(given["input_ids"] == IMAGE, -100)).loss.backward()
    idle = {name for name, value in model.named_parameters() if value.grad is None}
    # CLIP is read in front of its last layer; nothing reads masked patches or DINOv2's class token alone.
    clip = "model.vision_towers.1."
    assert {name for name in idle if not name.startswith((f"{clip}encoder.layers.1.", f"{clip}post_layernorm"))} == {
        "model.vision_towers.2.embeddings.mask_token"
    }


@pytest.mark.parametrize(
    "towers",
    [
        (("convnext", 64),),
        (("dinov2", 56), ("siglip_vision_model", 56)),
        (("clip_vision_model", 56), ("clip_vision_model", 84), ("convnext", 96)),
    ],
)
def test_one_to_four_towers_of_any_kind(towers: tuple[tuple[str, int], ...]) -> None:
    model, processor = build(towers=towers)
    given = inputs(processor)
    assert [name for name in given if name.startswith("pixel")] == list(PIXELS[: len(towers)])
    assert generate(model, given).shape[1] > 0


def test_several_groups_of_queries_are_joined() -> None:
    made = config(image_grid=4, tower_grids=[8, 8, 8, 8])
    made.query_grids = [4, 2]
    made = CambrianConfig(**made.to_dict())
    model = CambrianForConditionalGeneration(made).eval()
    assert model.model.vision_query.shape == (2, made.vision_hidden_size)
    assert model.model.mm_projector[0].in_features == 2 * made.vision_hidden_size
    assert generate(model, inputs(build()[1])).shape[1] > 0


def test_stages_are_those_of_transformers_with_the_same_epsilon() -> None:
    mine, theirs = (make(small_tower("convnext", 64, width=64)).eval() for make in (ConvNextStages, ConvNextModel))
    state = {name.removeprefix("encoder."): value for name, value in theirs.state_dict().items()}
    mine.load_state_dict({name: value for name, value in state.items() if not name.startswith("layernorm")})
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found, wanted = mine(pixels), theirs(pixels, output_hidden_states=True).hidden_states
    assert all(torch.equal(one, two) for one, two in zip(found, wanted[-4:], strict=True))
    other = small_tower("convnext", 64, width=64)
    other.layer_norm_eps = 1e-2
    assert {module.eps for module in ConvNextStages(other).modules() if isinstance(module, torch.nn.LayerNorm)} == {
        1e-2
    }


def test_windows_lie_over_their_query() -> None:
    """Features that are their own place: the window of query (r, c) of a 2 × 2 grid over 4 × 4 cells."""
    places = torch.arange(16.0).reshape(1, 16, 1)
    read = readings([places, torch.arange(4.0).reshape(1, 4, 1)], torch.ones(1, 1), [(40, 20)], 2)
    assert read.windows[0][:, :, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    # A picture of 40 × 20 fills rows 1 and 2 of 4; of 2 rows it fills both, since half a row is no margin.
    assert read.masks[0].tolist() == [[False, False, True, True]] * 2 + [[True, True, False, False]] * 2
    assert read.masks[1].all()
    # 10 × 60 fills 2 columns of 12, the 6th and 7th: of 4 windows of 3 cells the outer ones have none, and stay open.
    tall = readings([torch.zeros(1, 144, 1)], torch.ones(1, 1), [(10, 60)], 4)
    assert tall.masks[0][:4].tolist() == [[True] * 9, [False, False, True] * 3, [True, False, False] * 3, [True] * 9]


def test_the_state_touches_image_tokens_alone() -> None:
    model, processor = build()
    given = inputs(processor)
    seen: list[SamplerState] = []
    place = type(model.model)._placed

    def keep(self: Any, *args: Any) -> Any:
        made = place(self, *args)
        seen.append(made[1])
        return made

    type(model.model)._placed = keep
    try:
        with torch.no_grad():
            model(**given)
    finally:
        type(model.model)._placed = place
    hidden = torch.randn(1, given["input_ids"].shape[1], model.config.text_config.hidden_size)
    with torch.no_grad():
        updated = seen[0].update(model.model.language_model.layers[model.config.sampler_layers[0]].sampler, hidden)
    moved = (updated != hidden).any(dim=-1)[0].nonzero()[:, 0]
    tokens = (given["input_ids"][0] == IMAGE).nonzero()[:, 0].reshape(2, 5)
    assert moved.tolist() == tokens[:, :4].flatten().tolist()
    assert [layer.sampler is not None for layer in model.model.language_model.layers] == [True, False, True, False]


def test_weights_that_are_offloaded_give_the_same() -> None:
    accelerate = pytest.importorskip("accelerate")
    (model, processor), (away, _) = build(), build()
    accelerate.cpu_offload(away, execution_device=torch.device("cpu"))
    assert next(away.parameters()).is_meta
    with torch.no_grad():
        assert torch.equal(away(**inputs(processor)).logits, model(**inputs(processor)).logits)


def test_a_layer_that_lives_elsewhere_gets_the_state_there(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    (model, processor), (away, _) = build(), build()
    moved: list[Any] = []
    to = SamplerState.to
    monkeypatch.setattr(SamplerState, "to", lambda self, *a, **k: (moved.append(a), to(self, *a, **k))[1])
    layer = away.model.language_model.layers[0]
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device=torch.device("cpu"), io_same_device=True))
    with torch.no_grad():
        assert torch.equal(away(**inputs(processor)).logits, model(**inputs(processor)).logits)
    assert len(moved) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pixel_values_2": None}, "pixel_values_2 missing"),
        ({"image_sizes": None}, "image_sizes missing"),
        ({"image_sizes": torch.tensor([[50, 50]])}, "have 20"),
        ({"pixel_values_1": torch.zeros(1, 3, 60, 60)}, r"its tower reads \(1, 3, 56, 56\)"),
        ({"input_ids": None}, "give either"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 4, 48)}, "inputs_embeds have none"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], said: str) -> None:
    model, processor = build()
    with pytest.raises(ValueError, match=said):
        model(**{**inputs(processor), **change})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tower_grids": [4, 4, 4, 6]}, "cannot be cut"),
        ({"tower_grids": [4, 4]}, "2 entries for 4"),
        ({"vision_heads": 5}, "no multiple of 5 heads"),
        ({"sampler_layers": [0, 9]}, "layers of a decoder of 4"),
        ({"vision_config_1": None}, "without a gap"),
        ({"vision_config_0": {"model_type": "vit"}}, "one of siglip"),
        ({"text_config": {"model_type": "gemma"}}, "llama, phi3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CambrianConfig(**{**config().to_dict(), **change})
