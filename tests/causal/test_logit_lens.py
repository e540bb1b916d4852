"""The logit lens against the model's own norm and head by hand, on several families, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError


@pytest.fixture(scope="module")
def answer(demo: Any) -> probe.Answer:
    (scene,) = probe.demo.scenes(1)
    return probe.ask(*demo, scene.image, scene.question)


@pytest.mark.quick
def test_by_hand_with_the_norm_and_the_head_of_the_model(answer: probe.Answer, demo: Any) -> None:
    lens = probe.causal.logit_lens(answer.replay, top=3)
    model, trace = demo[0], answer.trace
    sequence = torch.from_numpy(np.concatenate([trace.input_ids, trace.token_ids]))[None]
    with torch.no_grad():
        states = model(
            input_ids=sequence, pixel_values=answer.replay.path.inputs["pixel_values"], output_hidden_states=True
        ).hidden_states
        for layer in range(len(lens.words) - 1):  # transformers gives the last one behind the norm
            there = states[layer + 1][0, list(trace.layout.image_positions)]
            by_hand = model.lm_head(model.model.language_model.norm(there)).softmax(dim=-1).topk(3, dim=-1)
            np.testing.assert_array_equal(lens.token_ids[layer], by_hand.indices.numpy())
            np.testing.assert_allclose(lens.probabilities[layer], by_hand.values.numpy(), rtol=1e-4)
        last = model.lm_head(states[-1][0, list(trace.layout.image_positions)]).softmax(dim=-1).topk(3, dim=-1)
    np.testing.assert_array_equal(lens.token_ids[-1], last.indices.numpy())
    assert lens.notes == ()
    decode = demo[1].tokenizer.decode
    assert [decode([int(token)]) for token in lens.token_ids[1, 5]] == list(lens.words[1, 5])


def test_at_finds_the_token_of_a_pixel(answer: probe.Answer) -> None:
    lens = probe.causal.logit_lens(answer.replay, top=1)
    for token in (0, 9, len(lens.boxes) - 1):
        x0, y0, x1, y1 = lens.boxes[token]
        assert lens.at((x0 + x1) / 2, (y0 + y1) / 2) == token
    assert lens.at(-50, -50) == lens.at(0, 0)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "internvl"])
def test_families_with_other_decoders(family: str, tmp_path: Path) -> None:
    model, processor = tiny_models.build(family)
    asked = probe.ask(model, processor, tiny_models.picture(), "what is it?", out=tmp_path, max_new_tokens=4)
    lens = probe.causal.logit_lens(asked.replay, top=2)
    text = model.config.get_text_config()
    assert lens.words.shape == (text.num_hidden_layers, len(lens.boxes), 2)
    assert (np.diff(lens.probabilities, axis=-1) <= 0).all()
    assert lens.notes == ()


def test_a_model_that_changes_its_logits_behind_the_head_is_told(answer: probe.Answer) -> None:
    """As Cohere and Granite, which scale them."""
    model, processor = probe.demo.load()

    def scale(_module: Any, _args: Any, output: Any) -> Any:
        output.logits = output.logits * 3
        return output

    model.register_forward_hook(scale)
    scaled = probe.ask(model, processor, answer.trace.image, answer.trace.question)
    # Of an answer that the model is sure of, a factor changes next to nothing: one that it would not give.
    (note,) = probe.causal.logit_lens(scaled.replay.reworded("The star is blue.")).notes
    assert "changes its logits behind the head" in note


def test_what_has_no_image_tokens_or_no_model_is_refused_in_a_sentence(tmp_path: Path, answer: probe.Answer) -> None:
    asked = probe.ask(
        *tiny_models.build("mllama"), tiny_models.picture(), "what is it?", out=tmp_path, max_new_tokens=2
    )
    with pytest.raises(ExplainError, match="holds no image tokens"):
        probe.causal.logit_lens(asked.replay)
    with pytest.raises(ExplainError, match="looks inside the model"):
        probe.causal.logit_lens(answer.trace)  # type: ignore[arg-type]
    with pytest.raises(ExplainError, match="image=1"):
        probe.causal.logit_lens(answer.replay, image=1)
