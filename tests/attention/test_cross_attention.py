"""Attention to pictures that are not in the prompt: rows over the keys of cross-attention, against the textbook softmax
and against the maps that the modules themselves return under eager."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers

import lvlm_probe as probe
from lvlm_probe.attention import RowTap
from lvlm_probe.attention.dispatch import is_view

_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "decoder_start_token_id": 2}
_SETTINGS: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def bart(seed: int = 0) -> Any:
    """An encoder-decoder whose decoder has self- and cross-attention in every layer."""
    config = transformers.BartConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
        forced_eos_token_id=None, **_IDS,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config)
    tiny_models.redraw(model, seed)
    return model.eval()


def merged(seed: int = 0) -> Any:
    """A decoder whose one softmax runs over its own keys and, behind them, the encoder's."""
    text = tiny_models.text_config(
        {"<bos>": 0, "<eos>": 2, "<pad>": 1},
        vocab_size=60, head_dim=12, sliding_window=3, query_pre_attn_scalar=12,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    vision = {"model_type": "siglip_vision_model", **tiny_models.clip_config(vision_use_head=False)}
    encoder = {"text_config": dict(text), "vision_config": vision, "mm_tokens_per_image": 4}
    config = transformers.T5Gemma2Config(encoder=encoder, decoder=dict(text), image_token_index=59)
    model = transformers.T5Gemma2ForConditionalGeneration(config)
    model.generation_config.decoder_start_token_id = 0
    tiny_models.redraw(model, seed)
    return model.float().eval()


def padded_batch(length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3], ids[0, :3] = 0, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [bart, merged])
def test_rows_of_an_encoder_decoder_are_the_models_own_cross_attentions(build: Any, implementation: str) -> None:
    model, inputs = build(), padded_batch()
    model.set_attn_implementation("eager")
    truth = model.generate(**inputs, **_SETTINGS, return_dict_in_generate=True, output_attentions=True)
    model.set_attn_implementation(implementation)
    plain = model.generate(**inputs, **_SETTINGS)
    columns = torch.tensor([[3, 5, 8], [0, 1, 7]])
    with RowTap(model, cross=True) as tap:
        tap.arm(columns, heads="all", dtype=torch.float32, prompt_length=1, cross_keys=9)
        assert torch.equal(model.generate(**inputs, **_SETTINGS), plain)
        rows = tap.collect()
    assert tap.error is None and rows is not None and not rows.missing
    assert not any(is_view(module.__dict__.get("config")) for module in model.modules())
    count = len(truth.cross_attentions[0])
    assert rows.values.shape[:3] == (2, 5, count)
    for step, maps in enumerate(truth.cross_attentions):
        for place, layer in enumerate(rows.layers):
            whole = maps[layer.index][:, :, -1]
            want = torch.stack([whole[b][:, columns[b]] for b in range(2)])
            torch.testing.assert_close(rows.values[:, step, place], want, atol=1e-5, rtol=0)
            torch.testing.assert_close(rows.text_mass[:, step, place], 1 - want.sum(-1), atol=1e-5, rtol=0)


def test_self_attention_of_that_decoder_is_not_mixed_up_with_it() -> None:
    across, within = RowTap(bart(), cross=True), RowTap(bart())
    assert [layer.module.rpartition(".")[2] for layer in across.layers] == ["encoder_attn"] * 2
    assert [layer.module.rpartition(".")[2] for layer in within.layers] == ["self_attn"] * 2
    assert {layer.kind for layer in across.layers} == {"cross"}
    assert across.unsupported == {}
    assert {layer.kind for layer in RowTap(merged(), cross=True).layers} == {"merged"}


def test_a_wrong_number_of_keys_disarms_instead_of_reading_the_wrong_ones() -> None:
    model, inputs = bart(), padded_batch()
    errors: list[str] = []
    with RowTap(model, cross=True, on_error=lambda error: errors.append(str(error))) as tap:
        tap.arm(torch.tensor([[0], [1]]), prompt_length=1, cross_keys=8)
        model.generate(**inputs, **_SETTINGS)
        assert tap.collect() is None
    assert errors == ["cross-attention has 9 keys where the encoder was given 8 tokens"]


def test_what_cannot_be_armed_is_said() -> None:
    with RowTap(tiny_models.build_model("llava")) as tap, pytest.raises(ValueError, match="cross-attention"):
        tap.arm(None)
    with RowTap(merged(), cross=True) as tap, pytest.raises(ValueError, match="cross_keys must be given"):
        tap.arm(torch.tensor([[0]]))
    lacking = RowTap(tiny_models.build_model("llava"), cross=True)
    assert lacking.layers == ()
    assert "has no cross-attention layer" in "; ".join(lacking.unsupported.values())


# ------------------------------------------------------------------------------------------------- pictures as keys


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any, dict[str, Any], Any]:
    """mllama, its processor, what it was asked about a picture of two tiles, and the trace with all heads."""
    model, processor = tiny_models.build("mllama")
    picture = tiny_models.picture(150, 80)
    attached = probe.attach(model, processor)
    with attached.record(tmp_path_factory.mktemp("cross"), heads="all") as recording:
        inputs = dict(tiny_models.inputs("mllama", model, processor, [picture], "What colour is the circle?"))
        model.generate(**inputs, **_SETTINGS)
    attached.detach()
    assert not recording.faults
    return model, processor, picture, inputs, recording.traces[0]


def maps_under_eager(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """(head, key) of the last query of every pass, as the cross-attention module of an eager copy returns them."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    kept: list[torch.Tensor] = []
    path = next(name for name, _ in twin.named_modules() if name.endswith("cross_attn"))
    twin.get_submodule(path).register_forward_hook(lambda _m, _a, out: kept.append(out[1][0, :, -1]))
    twin.generate(**inputs, **_SETTINGS)
    return kept


def test_rows_over_all_keys_are_those_of_the_module_itself(asked: Any) -> None:
    model, _, _, inputs, trace = asked
    rows, truth = trace.attention, maps_under_eager(model, inputs)
    assert len(trace.layout.image_positions) == 0
    assert rows.layers == tuple(model.config.text_config.cross_attention_layers)
    assert rows.values.shape == (5, 1, *truth[0].shape)
    for step, want in enumerate(truth):
        np.testing.assert_allclose(rows.values[step, 0], want.numpy(), atol=1e-4)
    np.testing.assert_allclose(rows.values.sum(-1), 1, atol=2e-3)


def test_keys_have_places_and_those_without_pixels_have_none(asked: Any) -> None:
    _, _, picture, _, trace = asked
    rows = trace.attention
    keys = rows.values.shape[-1]
    assert rows.key_box.shape == (keys, 4) and rows.key_image.shape == (keys,)
    empty = (rows.key_box == 0).all(1)
    assert 0 < (~empty).sum() < keys  # class tokens, and tiles that only fill the canvas, stand for nothing
    assert np.array_equal(empty, rows.key_image < 0)
    assert rows.key_box[:, 2].max() <= picture.width and rows.key_box[:, 3].max() <= picture.height


@pytest.mark.quick
def test_the_attention_explainer_draws_recorded_and_replayed_rows_alike(asked: Any) -> None:
    model, processor, _, _, trace = asked
    alone = probe.explain(trace, method="attention", tokens=(0, 2))
    replay = probe.replay(trace, model, processor)
    before, after = (
        probe.explain(replay, method="attention", tokens=(0, 2), source=source) for source in ("recorded", "replay")
    )
    assert after.params["source"] == "replay"
    np.testing.assert_allclose(before.values, after.values, atol=5e-3)
    np.testing.assert_allclose(before.values, alone.values, atol=1e-6)
    assert float(np.ptp(np.asarray(after.values))) > 0.1
    with pytest.raises(probe.errors.ExplainError, match="no image tokens"):
        probe.explain(replay, method="tam", tokens=(0, 1))
