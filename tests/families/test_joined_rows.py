"""A batch gives what each of its rows gives by itself: of masks, also where images are not stacked on the first axis,
and of prompts, also where a model counts padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from zoo import build, load_members

import lvlm_probe as probe

load_members()


@pytest.mark.parametrize(("name", "larger"), [("minicpmv4_7", False), ("minicpm_ocr", True), ("qwen3_vl", False)])
def test_two_masks_in_one_call_are_two_calls(tmp_path: Path, name: str, larger: bool) -> None:
    built = build(name, "torchvision")
    with probe.attach(built.model, built.processor) as attached, attached.record(tmp_path) as recording:
        built.generate(built.inputs([built.picture(larger=larger)]))
    replay = probe.replay(recording.traces[0], built.model, built.processor, micro_batch=2)
    masks = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    together = replay.log_probs(masks)
    (gradient,) = torch.autograd.grad(together.sum(), masks)
    apart = torch.cat([replay.log_probs(mask[None]) for mask in masks])
    (expected,) = torch.autograd.grad(apart.sum(), masks)
    assert (apart[0] - apart[1]).abs().max() > 1e-3  # the masks differ, and the model sees it
    assert torch.allclose(together, apart, atol=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "moved"), [("florence2", True), ("kosmos-2", True), ("llava", False)])
def test_both_sides_of_a_ratio_are_of_the_prompt_without_padding(tmp_path: Path, name: str, moved: bool) -> None:
    built = build(name, "pil")
    pictures = [built.picture(seed=seed) for seed in (1, 2)]
    questions = ["What is it?", "How many red shapes are there, and where?"]
    if built.member.templated:
        turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}] for q in questions]
        questions = [built.processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    with probe.attach(built.model, built.processor) as attached, attached.record(tmp_path) as recording:
        inputs = built.processor(
            text=questions, images=pictures, padding=True, padding_side="left", return_tensors="pt", **built.member.call
        )
        built.generate(inputs)
    short, long = recording.traces
    assert long.log_probs_source == "generation"
    assert short.log_probs_source == ("teacher_forced" if moved else "generation")
    assert any("the prompt was padded, which moves" in note for note in short.notes) is moved
    replay = probe.replay(short, built.model, built.processor)
    np.testing.assert_allclose(np.asarray(short.llr), replay.llr.numpy(), atol=2e-4)


@pytest.mark.parametrize(("name", "moved"), [("fuyu", True), ("qwen3_vl", False)])
def test_several_answers_to_an_image_are_scored_by_that_image(tmp_path: Path, name: str, moved: bool) -> None:
    """transformers repeats Fuyu's patches one by one, so that its answers are to other images."""
    built = build(name, "torchvision")
    with probe.attach(built.model, built.processor) as attached, attached.record(tmp_path) as recording:
        inputs = built.inputs([built.picture()])
        built.model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2)
    assert len(recording.traces) == 2
    for trace in recording.traces:
        assert trace.log_probs_source == ("teacher_forced" if moved else "generation")
        assert any("were repeated for several answers" in note for note in trace.notes) is moved
        replay = probe.replay(trace, built.model, built.processor)
        np.testing.assert_allclose(np.asarray(trace.llr), replay.llr.numpy(), atol=2e-4)
