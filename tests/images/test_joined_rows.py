"""A batch of masks gives what each gives by itself, also where pictures are not stacked on the first axis."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "families"), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import torchvision_shim  # noqa: E402, F401  (before anything imports torchvision)
from transformers.utils import is_torchvision_available  # noqa: E402
from zoo import build, load_members  # noqa: E402

import lvlm_probe as probe  # noqa: E402

load_members()


@pytest.mark.skipif(not is_torchvision_available(), reason="these processors want torchvision")
@pytest.mark.parametrize(("name", "tiled"), [("minicpmv4_7", False), ("minicpm_ocr", True), ("qwen3_vl", False)])
def test_two_masks_in_one_call_are_two_calls(tmp_path: Path, name: str, tiled: bool) -> None:
    built = build(name, "torchvision")
    attached = probe.attach(built.model, built.processor)
    with attached.record(tmp_path) as recording:
        built.generate(built.inputs([built.picture(tiled=tiled)]))
    replay = probe.replay(recording.traces[0], built.model, built.processor, micro_batch=2)
    masks = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    together = replay.log_probs(masks)
    (gradient,) = torch.autograd.grad(together.sum(), masks)
    apart = torch.cat([replay.log_probs(mask[None]) for mask in masks])
    (expected,) = torch.autograd.grad(apart.sum(), masks)
    assert (apart[0] - apart[1]).abs().max() > 1e-3  # the masks differ, and the model sees it
    assert torch.allclose(together, apart, atol=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-4, rtol=1e-3)
