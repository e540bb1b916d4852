"""A batch of masks gives what each gives by itself, also where images are not stacked on the first axis."""

from __future__ import annotations

from pathlib import Path

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
