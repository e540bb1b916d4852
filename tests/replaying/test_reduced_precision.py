"""A search in bfloat16: what is computed in it, what is not, and that nobody else is."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from torch.nn import functional

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers import needs_of
from lvlm_probe.heatmap_store import MapSettings, map_name
from lvlm_probe.metrics import evaluate
from lvlm_probe.replaying.reduced_precision import ReducedPrecision, check_reducible
from lvlm_probe.serving.journal import Journal


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, processor = probe.demo.load()
    (scene,) = probe.demo.scenes(1)
    trace = probe.ask(model, processor, scene.image, scene.question, out=tmp_path_factory.mktemp("demo")).trace
    return trace, model, processor


@pytest.fixture
def replay(demo: Any) -> probe.Replay:
    """One of which nothing is known yet."""
    return probe.replay(*demo)


def tiny(name: str, directory: Path) -> Any:
    model, processor = tiny_models.build(name)
    with probe.attach(model, processor) as p, p.record(directory) as recording:
        inputs = tiny_models.inputs(name, model, processor, [tiny_models.picture(90, 60)], "What is this?")
        model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return probe.replay(recording.traces[0], model, processor)


def score(log_probs: torch.Tensor) -> torch.Tensor:
    return log_probs[:, :3].sum(dim=1)


MASKS = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.quick
@pytest.mark.parametrize("unchanged", [True, False])
def test_linear_layers_multiply_in_bfloat16_and_weights_stay(unchanged: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.LayerNorm(30), torch.nn.Linear(30, 20, bias=False))
    model.requires_grad_(False)
    first, norm, last = model
    given = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    low = torch.bfloat16
    normed = norm(functional.linear(given.to(low), first.weight.to(low), first.bias.to(low)).float())
    expected = functional.linear(normed.to(low), last.weight.to(low))
    held: list[dict[Any, Any] | None] = [{} if unchanged else None]
    reduced = ReducedPrecision("bfloat16", torch.device("cpu"), lambda: held[0])
    with reduced.passes(model):
        assert torch.equal(model(given), expected)
        last.weight.mul_(2)  # seen by the next pass, unless it was said that nothing changes
        assert torch.equal(model(given), expected if unchanged else 2 * expected)
    held[0] = held[0] and {}
    with reduced.passes(model):
        assert torch.equal(model(given), 2 * expected)
    assert model(given).dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    assert "forward" not in vars(first)


def test_convolutions_stay_in_float32() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5))
    model.requires_grad_(False)
    given = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    with ReducedPrecision("bfloat16", torch.device("cpu"), dict).passes(model):
        low, found = model[0](given), model[1](model[0](given))
        assert low.dtype == torch.bfloat16 == model[2](found).dtype
    assert torch.equal(found, functional.conv2d(low.float(), model[1].weight, model[1].bias))
    assert "forward" not in vars(model[1])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "mllama"])
def test_passes_are_near_those_of_autocast_and_the_replay_stays_what_it_is(name: str, tmp_path: Path) -> None:
    replay = tiny(name, tmp_path)
    exact, original = replay.log_probs(MASKS), replay.original_log_probs
    view = replay.computed_in("bfloat16")
    under = probe.replay(replay.trace, replay.model, replay.processor)
    with torch.autocast("cpu", torch.bfloat16):  # rounds convolutions too
        near = under.log_probs(MASKS)
        _, slopes = under.score_and_grad(MASKS, score)
    before = replay.passes.forward, view.passes.forward
    found = view.log_probs(MASKS)
    with view.shortcuts.caching():
        kept = view.log_probs(MASKS)
        _, mine = view.score_and_grad(MASKS, score)
    assert torch.equal(kept, found) and found.dtype == torch.float32
    assert not torch.equal(found, exact) and (found - exact).abs().max() <= 2 * (near - exact).abs().max() < 0.5
    assert functional.cosine_similarity(mine.flatten(1), slopes.flatten(1)).min() > 0.9
    assert torch.equal(view.original_log_probs, original) and torch.equal(view.llr, replay.llr)
    assert torch.equal(replay.log_probs(MASKS), exact)
    assert (replay.passes.forward - before[0], view.passes.forward - before[1]) == (15, 9)
    assert view.origin["computed_in"] == "bfloat16" and "computed_in" not in replay.origin


def test_gradients_and_shortcuts_are_near_those_of_float32(replay: probe.Replay) -> None:
    """bfloat16 has 8 bits: products are off by 2⁻⁹ each, which sums of a hundred leave below a per cent or so."""
    steps = [3]
    _, exact = replay.score_and_grad(MASKS, lambda log_probs: log_probs[:, 3], steps=steps)
    view = replay.computed_in()
    _, found = view.score_and_grad(MASKS, lambda log_probs: log_probs[:, 3], steps=steps)
    _, whole = view.score_and_grad(MASKS, lambda log_probs: log_probs[:, 3])
    assert functional.cosine_similarity(found.flatten(1), exact.flatten(1)).min() > 0.99
    assert functional.cosine_similarity(found.flatten(1), whole.flatten(1)).min() > 0.99
    assert view.shortcuts is not replay.shortcuts and str(view.shortcuts) == str(replay.shortcuts)
    frugal = view.with_settings(gradient_checkpointing=True)
    _, again = frugal.score_and_grad(MASKS, lambda log_probs: log_probs[:, 3], steps=steps)
    assert functional.cosine_similarity(again.flatten(1), whole.flatten(1)).min() > 0.99
    leaf = MASKS.clone().requires_grad_(True)  # more masks than fit, which run again in backward
    with view.shortcuts.caching():
        (later,) = torch.autograd.grad(view.log_probs(leaf, micro_batch=1)[:, 3].sum(), leaf)
    assert functional.cosine_similarity(later.flatten(1), whole.flatten(1)).min() > 0.99
    assert view.shortcuts.held is None and replay.shortcuts.held is None


@pytest.mark.parametrize("method", ["igos++", "integrated_gradients", "rise", "occlusion"])
def test_maps_are_near_and_their_scores_are_exact(demo: Any, method: str) -> None:
    """Scores of a map searched in bfloat16 are those that its values have on a replay that never saw bfloat16."""
    fresh, replay = probe.replay(*demo), probe.replay(*demo)
    params: dict[str, Any] = {"rise": {"masks": 100}, "occlusion": {"size": 8}}.get(method, {})
    exact = probe.explain(fresh, method=method, progress=False, **params)
    replay.require_gradients()
    _ = replay.strengthened(probe.select_tokens(replay).decided)
    heat = probe.explain(replay, method=method, progress=False, search_dtype="bfloat16", **params)
    assert heat.values is not None and exact.values is not None and not np.array_equal(heat.values, exact.values)
    assert np.corrcoef(heat.values.ravel(), exact.values.ravel())[0, 1] > 0.95
    score = evaluate(heat, replay, steps=10, progress=False)
    assert score.to_dict() == evaluate(heat, fresh, steps=10, progress=False).to_dict()
    assert torch.equal(replay.original_log_probs, fresh.original_log_probs)
    search, passes = heat.provenance["search"], heat.provenance["passes"]
    assert search["dtype"] == heat.search_dtype == "bfloat16" and 0 < search["forward"] <= passes["forward"]
    assert search["backward"] == passes["backward"] and "computed_in" not in heat.provenance
    assert heat.cost.endswith(f", {search['forward']} and {search['backward']} of them in bfloat16")
    assert "search" not in exact.provenance and exact.search_dtype is None and "bfloat16" not in exact.cost
    if method == "igos++":  # what rounds are compared by is exact, and not scored again
        (gain, *_) = (one["gain"] for one in heat.provenance["diagnostics"]["rounds"])
        assert search["forward"] == passes["forward"] - 8 * len(heat.provenance["diagnostics"]["rounds"]) and gain > 0.3


def test_cast_weights_go_with_the_block(replay: probe.Replay) -> None:
    view = replay.computed_in()
    gc.collect()
    gc.disable()
    try:
        with view.shortcuts.caching():
            view.score_and_grad(MASKS, score)
            assert view.reduced is not None and view.shortcuts.held is not None
            linear = {(module.weight.data_ptr(), module.weight.numel()) for module in replay.model.modules()
                      if type(module) is torch.nn.Linear}  # fmt: skip
            assert view.reduced.kept == 2 * sum(count for _, count in linear)
            cast = [weakref.ref(one) for one in view.shortcuts.held.values() if isinstance(one, torch.Tensor)]
            assert len(cast) == len(linear)
        assert view.reduced.kept == 0 and not any(one() is not None for one in cast)
    finally:
        gc.enable()


def test_the_search_keeps_nothing_for_passes_in_float32(replay: probe.Replay) -> None:
    view = replay.computed_in()
    view.kept.facts["a"] = view.kept.baseline_log_probs["b"] = torch.zeros(1)
    _ = view.over("blank").baseline_log_probs
    assert set(replay.kept.baseline_log_probs) == {next(iter(replay.kept.baseline_log_probs))}
    assert replay.kept.facts == {}


def test_every_method_runs_so(tmp_path: Path) -> None:
    replay = tiny("llava", tmp_path)
    few: dict[str, dict[str, Any]] = {
        "rise": {"masks": 4}, "occlusion": {"size": 2}, "integrated_gradients": {"steps": 2}, "iia": {"points": 2},
        "greedy": {"segments": "grid", "regions": 3}, "igos++": {"preset": "fast"}, "igos+": {"iterations": 1},
    }  # fmt: skip
    for method in probe.methods():
        options = {**few.get(method, {}), "tokens": [1], "strengthen": False, "progress": False}
        plain = probe.explain(replay, method=method, **options)
        heat = probe.explain(replay, method=method, search_dtype="bfloat16", **options)
        assert (heat.values is None) == (plain.values is None) and heat.search_dtype == "bfloat16", method
        assert heat.provenance["search"]["backward"] > 0 or "gradients" not in needs_of(method), method


def test_scores_of_ones_own_and_other_questions_go_along(replay: probe.Replay) -> None:
    heat = probe.explain(
        replay, method="occlusion", size=3, tokens=[3], against="next", search_dtype="bfloat16", progress=False
    )
    assert heat.provenance["search"]["forward"] >= 9 and heat.selection.score is not None
    asked = replay.computed_in().reworded("Describe this picture.")
    assert torch.equal(asked.plain.input_ids, asked.input_ids) and asked.plain.reduced is None


def test_generate_in_another_thread_is_not_touched(replay: probe.Replay, demo: Any) -> None:
    _, model, _ = demo
    inputs = {name: torch.as_tensor(value) for name, value in replay.asked().items()}

    def logits() -> torch.Tensor:
        made = model.generate(**inputs, max_new_tokens=3, do_sample=False, output_logits=True,
                              return_dict_in_generate=True)  # fmt: skip
        return torch.stack(made.logits)

    expected, met, inside, mine = logits(), [], [], threading.get_ident()
    view = replay.computed_in()

    def generate(*_: Any) -> None:
        if threading.get_ident() != mine or met:
            return
        inside.append(torch.is_autocast_enabled("cpu"))
        met.append(None)
        other = threading.Thread(target=lambda: met.append(logits()))
        other.start()
        other.join()

    with model.get_output_embeddings().register_forward_hook(generate):  # of the user's: our passes run it too
        view.log_probs(MASKS)
    assert inside == [True] and torch.equal(met[1], expected)
    assert torch.equal(logits(), expected)


def test_a_journal_tells_both_apart(replay: probe.Replay, tmp_path: Path) -> None:
    kept = replay.journalled(Journal(tmp_path / "masks.jsonl"))
    found = kept.computed_in().log_probs(MASKS)
    assert torch.equal(kept.log_probs(MASKS), replay.log_probs(MASKS))
    again = replay.journalled(Journal(tmp_path / "masks.jsonl"))
    assert torch.equal(again.computed_in().log_probs(MASKS), found)
    settings = MapSettings("rise", {})
    names = [
        map_name(kept, probe.select_tokens(replay), "answer", one)
        for one in (settings, dataclasses.replace(settings, search_dtype="bfloat16"))
    ]
    assert names[0] != names[1]


def test_what_cannot_be_searched_so_is_refused_in_a_sentence(replay: probe.Replay, demo: Any) -> None:
    trace, *_ = demo
    with pytest.raises(ExplainError, match=r"computed in bfloat16, or in the model's own format; got 'int8'"):
        probe.explain(replay, search_dtype="int8")
    with pytest.raises(ExplainError, match="leave search_dtype out, or load the model here"):
        probe.explain(trace, method="attention", search_dtype="bfloat16")
    half = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16())
    with pytest.raises(ExplainError, match="Sequential holds weights in bfloat16, and a search in bfloat16 is for"):
        check_reducible(half, "bfloat16")


def test_kernels_that_do_not_go_along_are_told(replay: probe.Replay, demo: Any) -> None:
    _, model, _ = demo
    replay.require_gradients()
    projector = model.model.multi_modal_projector

    def kernel(_module: Any, _args: Any, output: torch.Tensor) -> None:
        if output.dtype == torch.bfloat16:
            raise RuntimeError("\"kernel\" not implemented for 'BFloat16'")

    with (
        projector.register_forward_hook(kernel),
        pytest.raises(ExplainError, match=r"kernels that do not go along .*'BFloat16'.*: leave search_dtype out"),
    ):
        probe.explain(replay, method="occlusion", size=2, search_dtype="bfloat16", progress=False)
    with (
        projector.register_forward_hook(kernel),
        pytest.raises(ExplainError, match=r"kernels that do not go along .*'BFloat16'.*: leave search_dtype out"),
    ):
        probe.plan(replay, method="occlusion", size=2, search_dtype="bfloat16", seconds=False)
