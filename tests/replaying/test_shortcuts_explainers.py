"""Explanations made with passes that leave something out are those made with plain passes.

In float64: an optimiser's steps carry the rounding of float32 on, which is another one on every processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from float64 import in_float64
from marks import campaign
from test_shortcuts import record

import lvlm_probe as probe
from lvlm_probe.replaying.shortcuts import Shortcuts

METHODS: dict[str, dict[str, Any]] = {
    "igos++": {},  # one iteration, then the order
    "igos+": {"iterations": 2, "ig_steps": 3},
    "integrated_gradients": {"steps": 6, "batch": 4},
    "input_gradient": {},
    "rise": {"masks": 12, "batch": 5},
    "occlusion": {"size": 8},
    "greedy": {"segments": "grid", "regions": (2, 3)},
}
FAMILIES = {
    "demo": "mlp at wanted positions",
    "llava": "beginning read from a cache",
    "qwen2_vl": "positions handed over",
    "paligemma": "later tokens cut, ",  # the prompt attends both ways: no cache
    "leaking": "plain passes",  # the beginning reads the end: nothing may be left out
}


def demo(directory):
    model, processor = probe.demo.load()
    (scene,) = probe.demo.scenes(1, split="tune", start=3)
    with probe.attach(model, processor) as attached, attached.record(directory, images=[scene.image]) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return recording.traces[-1], model, processor


def leak(model):
    """Every position of the sequence gets something of the last ones from the second layer on."""

    def mix(_module, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        return (states + 0.1 * states.mean(dim=1, keepdim=True), *args[1:]), kwargs

    model.model.language_model.layers[1].register_forward_pre_hook(mix, with_kwargs=True)
    return model


PAIRS = [(family, method) for family in FAMILIES for method in METHODS]
SHORT = [
    (family, method)
    for family, method in PAIRS
    if family == "llava" or method == ("rise" if family == "demo" else "igos++")
]
"""On one family all methods; they go the same ways, with gradients or without, on every other one."""


@pytest.fixture(scope="module")
def family(request, tmp_path_factory):
    """Name, and what makes a replay of the same answer on the same model, which computes in float64 meanwhile."""
    directory = tmp_path_factory.mktemp("answers")
    if request.param == "demo":
        made = demo(directory)
    elif request.param == "leaking":
        made = record("llava", directory, model=leak(tiny_models.build("llava")[0]))
    else:
        made = record(request.param, directory)
    with in_float64(made[1]):
        yield request.param, lambda: probe.replay(*made, strict=False)


@pytest.mark.parametrize(
    ("family", "method"),
    [*SHORT, *campaign(*(pair for pair in PAIRS if pair not in SHORT))],
    indirect=["family"],
)
def test_heatmaps_are_those_of_plain_passes(family, method, monkeypatch):
    name, make = family
    tokens = None if name == "demo" else (1, 3)

    def explained(replay):
        return probe.explain(replay, method=method, tokens=tokens, seed=1, strengthen=name == "demo", **METHODS[method])

    short = make()
    mine = explained(short)
    assert FAMILIES[name] in str(short.shortcuts)
    if name == "leaking":
        assert short.shortcuts.way is None
    monkeypatch.setattr(Shortcuts, "take", lambda *_arguments: None)
    plain = make()
    expected = explained(plain)
    assert plain.shortcuts.way is None
    assert (mine.values is None) == (expected.values is None) and mine.reason == expected.reason
    assert mine.values is not None or method in ("greedy", "occlusion", "rise")
    if mine.values is not None:
        assert np.abs(mine.values - expected.values).max() < 1e-6  # they are kept in float32
    assert mine.provenance["shortcuts"] == str(short.shortcuts)
    again, plainly = explained(short), explained(plain)  # with all known that is found out once
    assert again.provenance["passes"] == plainly.provenance["passes"]
    for ours, theirs in zip(mine.history, expected.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_the_gradient_of_every_mask_is_that_of_the_plain_pass(family, monkeypatch):
    _name, make = family
    masks = torch.rand(6, 8, 8, generator=torch.Generator().manual_seed(2))

    def slopes(replay):
        return replay.score_and_grad(masks, lambda rows: rows[:, [1, 2]].sum(1), noise=0.2, steps=[1, 2])

    scores, mine = slopes(make())
    monkeypatch.setattr(Shortcuts, "take", lambda *_arguments: None)
    expected_scores, expected = slopes(make())
    assert torch.allclose(scores, expected_scores, atol=1e-9, rtol=0)
    assert float((mine - expected).abs().max() / expected.abs().max()) < 1e-6
