"""Passes that leave out what the wanted tokens do not depend on, on the odd families of the zoo.

Which shortcuts a family allows is found by the package; what is known of the family says here which it must not take.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import MEMBERS, build, load_members

import lvlm_probe as probe
from lvlm_probe.replaying import shortcuts

load_members()

BEFORE = "Describe this picture to the USER in two words of the ASSISTANT: left, right, red, blue, green. "

WITHOUT_CACHE = {
    "paligemma": "the whole prompt attends both ways",
    "gemma3": "image tokens attend both ways, which the mask of a cached pass does not say",
    "mllama": "cross-attention to the picture from the first token on",
    "idefics": "cross-attention to the picture from the first token on",
    "florence2": "encoder and decoder",
    "fuyu": "the picture stands in front of the prompt",
    "blip-2": "the picture stands in front of the prompt",
    "qwen3_5": "linear attention: the state of one row cannot be handed to several",
    "instructblip": "the question is read twice",
    "unlimited_ocr": "the cache of one row hands on a state of its own that is not repeated for several",
    "inkling_mm_model": "states of convolutions are not repeated for several rows",
}
WITH_CACHE = ("llava", "qwen2_5_vl", "internvl", "smolvlm")
"""One each of: plain, positions by pictures, and two of tiles."""


def recorded(name: str, directory: Path) -> probe.Replay:
    """A replay of an answer of four tokens, to a prompt with text in front of the picture where there is a template."""
    built = build(name, MEMBERS[name].backends[0])
    template = built.processor.chat_template
    built.processor.chat_template = template.replace("<bos>", "<bos>" + BEFORE, 1)
    with probe.attach(built.model, built.processor) as attached, attached.record(directory) as recording:
        built.generate(built.inputs([built.picture()]))
    return probe.replay(recording.traces[0], built.model, built.processor)


def differences(replay: probe.Replay, steps: list[int]) -> tuple[float, float]:
    """Largest difference of a log-probability, nats, and of the gradients relative to their length."""
    masks = torch.rand(2, replay.n_images, 5, 6, generator=torch.Generator().manual_seed(5))

    def score(log_probs: torch.Tensor) -> torch.Tensor:
        return log_probs[:, steps].sum(1)

    with torch.no_grad():
        plain, cut = replay.log_probs(masks), replay.log_probs(masks, steps=steps)
    _, slope = replay.score_and_grad(masks, score)
    _, mine = replay.score_and_grad(masks, score, steps=steps)
    return float((cut - plain)[:, steps].abs().max()), float((mine - slope).norm() / slope.norm())


@pytest.mark.parametrize("name", [*WITHOUT_CACHE, *WITH_CACHE])
def test_all_cuts_together_equal_the_plain_pass(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcuts, "_PAYS", 10**6)  # a cache is tried however short the beginning is
    replay = recorded(name, tmp_path)
    off, gradient_off = differences(replay, [0, 2])
    assert off < 1e-4 and gradient_off < 1e-3
    assert "later tokens cut" in str(replay.shortcuts)
    assert ("cache" in str(replay.shortcuts)) == (name in WITH_CACHE)


def test_layers_that_can_drop_positions_keep_them_for_who_looks_inside(tmp_path: Path) -> None:
    """Gemma 4's last layers take keys and values of others, and run on ``logits_to_keep`` positions where told so."""
    replay = recorded("gemma4_unified", tmp_path)
    seen: dict[str, tuple[int, int]] = {}

    def visit(layer: Any) -> None:
        if layer.part == "decoder":
            seen[layer.layer.module] = (layer.queries, layer.keys)

    with replay.capture(attention=["decoder"], visit=visit):
        replay.score_and_grad(torch.ones(1, 1, 4, 4), lambda log_probs: log_probs.sum(1))
    assert len(seen) == 4 and set(seen.values()) == {(replay.length, replay.length)}
    for method in ("attention", "tmm", "rollout", "iia"):
        settings = {"source": "replay"} if method == "attention" else {}
        assert probe.explain(replay, method=method, tokens=[0], **settings).values is not None
