"""Attention rows from captured queries and keys equal those that the model itself was recorded with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from captured_qk import as_sent, captures, capturing

import lvlm_probe as probe
from lvlm_probe.boxes.equal_parts import boxes_in_order
from lvlm_probe.images import ImagePath

HALF = 2.0**-11  # rows are kept in half precision


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def recorded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any, dict[str, Any]]:
    """A trace with the attention that was recorded, its processor, and the queries and keys of one pass over it."""
    model, processor = tiny_models.build(request.param)
    pictures = [tiny_models.picture()]
    out = tmp_path_factory.mktemp("recorded")
    answer = probe.ask(model, processor, pictures[0], "What?", out=out, max_new_tokens=4)
    steps = len(answer.trace.token_ids)
    with capturing() as seen, torch.no_grad():
        _ = probe.replay(answer.trace, model, processor).original_log_probs
    found = captures(seen)
    assert found["attn_q"].shape[1] == len(answer.trace.input_ids) + steps - 1
    return answer.trace, processor, found


def test_rows_equal_those_that_were_recorded(recorded: Any, tmp_path: Path) -> None:
    trace, processor, found = recorded
    heads, key_heads = found["attn_q"].shape[2], found["attn_k"].shape[2]
    assert heads > key_heads or trace.model["class"].startswith("Llava")  # one of the two groups its queries
    for captured in (found, as_sent(found)):
        made = probe.import_attention(trace, captured, processor=processor, out=tmp_path)
        made.verify()
        assert made.attention.layers == trace.attention.layers and made.attention.reduce == "head_mean"
        assert np.allclose(made.attention.values, trace.attention.values, rtol=2 * HALF, atol=1e-6)
        assert np.allclose(made.attention.text_mass, trace.attention.text_mass, rtol=2 * HALF, atol=1e-3)
        assert made.answer == trace.answer and made.trace_id != trace.trace_id
    every = probe.import_attention(trace, found, heads="all", out=tmp_path)
    assert every.attention.values.shape[2] == heads
    assert np.allclose(every.attention.values.mean(2), trace.attention.values[:, :, 0], rtol=2 * HALF, atol=1e-5)


def test_a_window_a_cap_and_a_sink_are_what_a_kernel_makes_of_them(recorded: Any, tmp_path: Path) -> None:
    """Against a softmax written out for one query."""
    trace, _, found = recorded
    changed = copy.deepcopy(found)
    heads = found["attn_q"].shape[2]
    more = {"sliding_window": [70, 0], "logits_soft_cap": 0.5, "sinks": [0.3] * heads, "alibi_slopes": [0.02] * heads}
    for one in changed["qk_meta"]:
        one.update(more)
    made = probe.import_attention(trace, changed, heads="all", out=tmp_path)
    at, layer, head = len(trace.input_ids), 1, heads - 1  # the position that predicts the second token
    key_head = head // (heads // found["attn_k"].shape[2])
    query, keys = found["attn_q"][layer, at, head].double(), found["attn_k"][layer, :, key_head].double()
    scores = 0.5 * torch.tanh(keys @ query * len(query) ** -0.5 / 0.5)
    distance = torch.arange(len(keys)) - at
    scores = (scores + 0.02 * distance)[(distance <= 0) & (distance >= -70)].exp()
    wanted = torch.zeros(len(keys), dtype=torch.float64)
    wanted[(distance <= 0) & (distance >= -70)] = scores / (scores.sum() + np.exp(0.3))
    images = wanted[trace.layout.image_positions]
    assert np.allclose(made.attention.values[1, layer, head], images, rtol=2 * HALF, atol=1e-6)
    assert made.attention.text_mass[1, layer, head] == pytest.approx(float(wanted.sum() - images.sum()), abs=1e-5)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=pytest.mark.quick if family == "llava" else ())
        for family in sorted(set(tiny_models.FAMILIES) - {"mllama"})
    ],
)
def test_boxes_by_the_processor_alone_are_those_that_the_model_has_or_refused(family: str, tmp_path: Path) -> None:
    model, processor = tiny_models.build(family)
    trace = probe.ask(model, processor, tiny_models.picture(), "What?", out=tmp_path, max_new_tokens=1).trace
    try:
        places = boxes_in_order(ImagePath.from_processor(processor, list(trace.images)), len(trace.image_positions))
    except (probe.errors.ImageError, probe.errors.ProcessorRefused):
        assert family not in ("llava", "qwen2_vl", "qwen2_5_vl")
        return
    assert np.allclose(places.boxes, trace.layout.patch_box, atol=0.01)


@pytest.mark.quick
def test_what_was_captured_of_something_else_is_refused(recorded: Any, tmp_path: Path) -> None:
    trace, _, found = recorded

    def changed(**parts: Any) -> dict[str, Any]:
        return {**found, **parts}

    sent = as_sent(found)["activations"]
    split = [{**one, "num_kv_heads_local": 1, "num_kv_heads_total": 8} for one in found["qk_meta"]]
    for captured, said in (
        ({"choices": []}, "runs without vllm-lens"),
        ({key: value for key, value in found.items() if key != "attn_k"}, "no attn_k"),
        (changed(attn_q=found["attn_q"][:, 3:], attn_k=found["attn_k"][:, 3:]), "of another prompt or answer"),
        (changed(attn_k=found["attn_k"][:, 3:]), "not of the same layers"),
        (changed(qk_meta=split), "without tensor parallelism"),
        (changed(qk_meta=[{}] * len(split)), "do not say how they scale"),
        ({**sent, "attn_q": {**sent["attn_q"], "data": sent["attn_q"]["data"][:40]}}, "cannot be unpacked"),
        ({**sent, "attn_q": {**sent["attn_q"], "shape": [10**6, 10**6]}}, "GiB: capture fewer layers"),
        ({**sent, "attn_q": {**sent["attn_q"], "dtype": "object"}}, "not sent as vllm-lens does"),
    ):
        with pytest.raises(probe.errors.ReplayError, match=said):
            probe.import_attention(trace, captured, out=tmp_path)
    assert not list(tmp_path.iterdir())
