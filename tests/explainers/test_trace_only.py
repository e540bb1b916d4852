"""Explaining a trace without its model, and every method that looks inside on every family."""

from __future__ import annotations

from typing import Any

import inside
import numpy as np
import pytest
import tiny_models

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers import methods, needs_of

INSIDE = {
    "attention": [{}, {"source": "replay", "layers": "last", "heads": [0, 1], "sinks": "drop"}],
    "relative_attention": [{}],
    "tam": [{}, {"interference": False}],
    "gradcam": [{}],
    "tmm": [{}, {"scope": "encoder"}, {"scope": "both", "last_factor": "bare"}],
    "iia": [{"points": 3}, {"variant": "iia2", "points": 2}, {"scope": "encoder", "points": 2}],
    "rollout": [{}, {"scope": "encoder"}, {"scope": "both"}],
}
RUNS = [(method, params) for method, variants in INSIDE.items() for params in variants]


def explain(what, method: str, **params: Any):
    return probe.explain(what, method=method, tokens=inside.SPAN, strengthen=False, **params)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_every_method_gives_a_map_or_says_why_not(name):
    """There is a map for every family; where it is made of image tokens, only for those that have some."""
    replay = inside.replay(name)
    state = [
        (key, id(vars(module)["config"])) for key, module in replay.model.named_modules() if "config" in vars(module)
    ]
    for method, params in RUNS:
        in_encoder = method == "gradcam" or params.get("scope") == "encoder"
        expected = in_encoder or name != "mllama" or method in ("attention", "relative_attention")
        if method == "iia" and in_encoder and "qwen" in name:
            expected = False  # its encoder joins the points of the path
        if not expected:
            with pytest.raises(ExplainError, match=r"igos\+\+|'tmm'") as caught:
                explain(replay, method, **params)
            assert len(str(caught.value)) > 60
            continue
        heat = explain(replay, method, **params)
        if heat.values is None:
            assert heat.reason.startswith("the method gives every region")
            continue
        rows, cols = heat.values.shape
        assert np.isfinite(heat.values).all() and heat.values.min() >= 0 and heat.values.max() == 1
        assert 2 <= rows <= 8 and 2 <= cols <= 8
        assert heat.params["size"] == [rows, cols]
    assert state == [
        (key, id(vars(module)["config"])) for key, module in replay.model.named_modules() if "config" in vars(module)
    ]


def test_most_families_really_have_maps():
    """The matrix above lets a method give nothing; for these it gives something for every method."""
    for name in ("llava", "qwen2_vl", "paligemma"):
        replay = inside.replay(name)
        for method in INSIDE:
            params = {"points": 3} if method == "iia" else {}
            values = explain(replay, method, **params).values
            assert values is not None and values.std() > 0.05


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "paligemma"])
@pytest.mark.parametrize("method", ["attention", "tam"])
def test_methods_that_run_on_a_trace_alone(name, method):
    trace = inside.trace(name)
    heat = explain(trace, method)
    assert heat.provenance["passes"] == {"forward": 0, "backward": 0}
    assert heat.provenance["device"] == "none: from the trace"
    assert heat.provenance["trace_id"] == trace.trace_id
    assert heat.image_size == (90, 60) and heat.trace is trace
    assert heat.values.max() == 1
    live = explain(inside.replay(name), method)
    assert np.array_equal(heat.values, live.values)
    # A token's box is what the model sees of the picture: the same as the replay says, but for half a pixel.
    assert np.array_equal(heat.seen, live.seen)


def test_tokens_are_chosen_on_a_trace_as_on_a_replay():
    trace, replay = inside.trace("llava"), inside.replay("llava")
    one = probe.explain(trace, method="attention", tokens=None)
    two = probe.explain(replay, method="attention", tokens=None, strengthen=False)
    assert one.selection.indices == two.selection.indices
    word = next(word.text.strip() for word in trace.words if word.text.strip())
    assert explain_word(trace, word).selection.indices == explain_word(replay, word).selection.indices
    assert probe.explain(trace, method="attention", tokens=replay_selection(replay)).values is not None


def explain_word(what, word):
    return probe.explain(what, method="attention", tokens=word, strengthen=False)


def replay_selection(replay):
    return probe.select_tokens(replay, span=inside.SPAN)


@pytest.mark.parametrize("method", methods())
def test_methods_that_cannot_say_what_they_need(method):
    """Passes or gradients: refused before anything runs, by what is needed, with the methods that would do."""
    trace = inside.trace("llava")
    needed = needs_of(method) & {"passes", "gradients"}
    if not needed:
        return
    with pytest.raises(ExplainError) as caught:
        probe.explain(trace, method=method, tokens=inside.SPAN)
    words = str(caught.value)
    assert words.startswith(f"{method} needs ") and all(need in words for need in needed)
    assert "probe.replay(trace, model, processor)" in words
    alternatives = words.split("trace alone: ")[1].split(", ")
    assert {"attention", "relative_attention", "tam"} <= set(alternatives)
    assert all(not needs_of(other) & {"passes", "gradients"} for other in alternatives)


def test_a_method_that_reaches_for_the_model_is_stopped():
    @probe.register_explainer("reaches for the model", needs=("attention",))
    def reaching(problem):
        return problem.replay.log_probs(None)

    try:
        with pytest.raises(ExplainError, match="log_probs needs the model, and only a trace is at hand"):
            probe.explain(inside.trace("llava"), method="reaches for the model", tokens=inside.SPAN)
    finally:
        from lvlm_probe.explainers import registry

        registry.METHODS.pop("reaches for the model")


def test_a_trace_without_what_is_needed():
    model, processor = tiny_models.build("llava")
    trace = inside.record("llava", model, processor, attention=False, points=["hidden"], llr=False)
    with pytest.raises(ExplainError, match="record with attention=True"):
        explain(trace, "attention")
    with pytest.raises(ExplainError, match="give reference="):
        explain(inside.trace("llava"), "relative_attention")
    bare = inside.record("llava", model, processor, boxes=False)
    with pytest.raises(ExplainError, match="holds no boxes of its image tokens"):
        explain(bare, "tam")
    assert explain(probe.replay(bare, model, processor), "tam").values is not None  # a replay traces them
    with pytest.raises(probe.errors.SelectionError, match="llr=False"):
        probe.explain(trace, method="attention")
    model_free = inside.record("mllama", *tiny_models.build("mllama"))
    with pytest.raises(ExplainError, match="holds no image tokens"):
        explain(model_free, "tam")
    with pytest.raises(ExplainError, match="no boxes of its image tokens"):
        explain(bare, "attention")
