"""Token activation maps: the formulas by hand and against scipy, and on traces whose model is gone."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import inside
import numpy as np
import pytest
import tiny_models
import torch
from scipy.ndimage import generic_filter
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch import Tensor

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.tam import interference_scale, rank_gaussian
from lvlm_probe.replaying.hidden_states import HIDDEN, ROWS, head_rows, hidden_states


def explain(what, **params: Any):
    return probe.explain(what, method="tam", tokens=inside.SPAN, strengthen=False, **params)


@pytest.mark.parametrize("seed", range(5))
def test_the_scale_is_the_minimiser(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(40, generator=generator, dtype=torch.float64)
    shared = torch.rand(40, generator=generator, dtype=torch.float64) * 3
    found = minimize_scalar(lambda s: float(((values - s * shared) ** 2).sum()), tol=1e-12)
    assert interference_scale(values, shared) == pytest.approx(found.x, abs=1e-6)
    assert interference_scale(values, values * 2) == pytest.approx(0.5)


def test_no_interference_is_no_scale():
    assert interference_scale(torch.ones(3), torch.zeros(3)) == 0


def test_rank_gaussian_by_hand():
    """Eight times 1 and one 10: mean 2, deviation √8, so ranks weigh exp(−r²/4), r = −4 … 4; the 10 has rank 4 and
    weight e⁻⁴, so the middle is 1 + 9·e⁻⁴ / (1 + 2(e^−¼ + e⁻¹ + e^−9⁄4 + e⁻⁴))."""
    grid = torch.ones(3, 3)
    grid[1, 1] = 10
    total = 1 + 2 * (math.exp(-0.25) + math.exp(-1) + math.exp(-2.25) + math.exp(-4))
    assert float(rank_gaussian(grid)[1, 1]) == pytest.approx(1 + 9 * math.exp(-4) / total)
    even = torch.full((4, 5), 3.0)
    assert torch.allclose(rank_gaussian(even), even.double())
    assert not rank_gaussian(torch.zeros(2, 2)).any()


def filtered_by_scipy(grid: np.ndarray) -> np.ndarray:
    """The filter as scipy runs it over windows of its own making, edges repeated."""

    def middle(window: np.ndarray) -> float:
        ranked = np.sort(window)
        weights = (
            norm.pdf(np.arange(9), loc=4, scale=ranked.std() / ranked.mean()) if ranked.std() > 0 else np.eye(9)[4]
        )
        return float(np.average(ranked, weights=weights))

    found: np.ndarray = generic_filter(grid.astype(np.float64), middle, size=3, mode="nearest")
    return found


def test_rank_gaussian_everywhere():
    """Against scipy's filter; also a single row, and a part in which all is the same."""
    for shape in ((4, 6), (1, 5), (7, 7)):
        grid = torch.rand(shape, generator=torch.Generator().manual_seed(1)).numpy().astype(np.float64)
        grid[:, 4:] = 0.5
        assert np.allclose(rank_gaussian(torch.from_numpy(grid)).numpy(), filtered_by_scipy(grid))


def spelled_out(replay, *, interference: bool, filtered: Callable[[np.ndarray], np.ndarray] = np.asarray) -> np.ndarray:
    """The method's formulas, token after token, on the model's own last hidden state and LM head; ``(token,)``."""
    model, trace = replay.model, replay.trace
    ids = torch.cat([replay.input_ids, replay.token_ids])
    extra = {key: value for key, value in trace.model_kwargs.items() if key.startswith(("pixel", "image"))}
    if "mm_token_type_ids" in trace.model_kwargs:
        kinds = trace.model_kwargs["mm_token_type_ids"]
        longer = torch.zeros(1, len(ids) - 1, dtype=kinds.dtype)
        longer[:, : kinds.shape[1]] = kinds
        extra["mm_token_type_ids"] = longer
    with torch.no_grad():
        hidden = model.model(input_ids=ids[None, :-1], use_cache=False, **extra).last_hidden_state[0].double()
    head = model.lm_head.weight.detach().double()
    image = [int(position) for position in trace.layout.image_positions]
    text = [position for position in range(len(ids)) if position not in set(image)]
    total = np.zeros(len(image))
    for step in range(*inside.SPAN):
        at = len(replay.input_ids) + step
        own: Tensor = (hidden[image] @ head[ids[at]]).clamp(min=0)
        if interference:
            others = [j for j in text if j < at and ids[j] != ids[at]]
            scores = [max(0.0, float(head[ids[at]] @ hidden[j])) for j in others]
            shared = torch.zeros(len(image), dtype=torch.float64)
            for j, score in zip(others, scores, strict=True):
                shared += score / sum(scores) * (hidden[image] @ head[ids[j]]).clamp(min=0)
            scale = minimize_scalar(lambda s, a=own, b=shared: float(((a - s * b) ** 2).sum()), tol=1e-12).x
            own = (own - scale * shared).clamp(min=0)
        total += filtered(own.numpy())
    return total


@pytest.mark.parametrize("interference", [True, False])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_the_map_is_the_formula(name, interference):
    replay = inside.replay(name)
    wanted = spelled_out(replay, interference=interference)
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    heat = explain(replay, interference=interference, filtered=False)
    boxes = replay.trace.layout.patch_box
    rows, cols = heat.values.shape
    y, x = (boxes[:, 1] + boxes[:, 3]) / 2 / 60 * rows, (boxes[:, 0] + boxes[:, 2]) / 2 / 90 * cols
    assert np.allclose(heat.values[y.astype(int), x.astype(int)], wanted, atol=0.02)  # recorded in half precision
    assert heat.provenance["diagnostics"]["source"] == "recorded"


def test_the_whole_map_of_several_words_is_the_formula():
    """Interference and filter of each word's map, then their mean: none of it by the package's own code."""
    replay = inside.replay("llava")
    wanted = spelled_out(replay, interference=True, filtered=lambda own: filtered_by_scipy(own.reshape(4, 4)).ravel())
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    assert len(range(*inside.SPAN)) > 1
    assert np.allclose(explain(replay).values[:, 1:5], wanted.reshape(4, 4), atol=0.02)  # recorded in half precision


def test_nothing_reads_what_it_reads():
    """Behind the last layer states of image tokens can be anything: the answer's log-probabilities stay as they are."""
    replay = inside.replay("llava")
    decoder = replay.model.get_submodule(replay.anatomy.decoder)
    image = torch.tensor(replay.trace.layout.image_positions)

    def scramble(_module, _args, output):
        drawn = torch.randn(output.last_hidden_state[:, image].shape, generator=torch.Generator().manual_seed(0))
        output.last_hidden_state[:, image] = 100 * drawn
        return output

    with torch.no_grad():
        before = replay.run_inputs(dict(replay.path.inputs))
        hook = decoder.register_forward_hook(scramble)
        try:
            after = replay.run_inputs(dict(replay.path.inputs))
        finally:
            hook.remove()
    assert torch.equal(before, after)


def test_the_filter_is_applied_to_every_words_map():
    replay = inside.replay("llava")
    one = probe.explain(replay, method="tam", tokens=(2, 3), strengthen=False)
    raw = probe.explain(replay, method="tam", tokens=(2, 3), strengthen=False, filtered=False)
    assert one.params["filtered"] and not raw.params["filtered"]
    # Affine scaling commutes with the filter only but for its width, so the raw map is taken where its lowest is 0.
    inner = raw.values[:, 1:5]  # CLIP's crop: what lies beyond is no neighbour
    assert inner.min() == 0 and (inner == 0).sum() > 1
    filtered = rank_gaussian(torch.tensor(inner).double()).numpy()
    filtered = (filtered - filtered.min()) / (filtered.max() - filtered.min())
    assert np.allclose(one.values[:, 1:5], filtered, atol=5e-3)
    assert not one.values[:, [0, 5]].any()
    assert explain(replay, size=(8, 12)).values.shape == (8, 12)


# ---------------------------------------------------------------------------------------------- without the model


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_the_trace_alone_gives_what_the_replay_gives(name):
    model, processor = tiny_models.build(name)
    plain = inside.record(name, model, processor, points=[])
    replay = probe.replay(plain, model, processor)
    live = explain(replay)
    assert live.provenance["diagnostics"]["source"] == "replay"
    assert inside.own_passes(replay, "tam") == {"forward": 1, "backward": 0}
    with pytest.raises(ExplainError, match=r"record with points=\['hidden'\]"):
        explain(plain)
    path = inside.record(name, model, processor).path
    gone = weakref.ref(model)
    del model, processor, replay
    gc.collect()
    trace = probe.open_trace(path)
    alone = explain(trace)
    assert gone() is None
    assert alone.provenance["diagnostics"]["source"] == "recorded"
    assert alone.provenance["passes"] == {"forward": 0, "backward": 0}
    assert np.abs(alone.values - live.values).max() < 0.02  # half precision
    assert np.array_equal(alone.seen, live.seen)


def test_what_is_recorded():
    trace, replay = inside.trace("qwen2_vl"), inside.replay("qwen2_vl")
    hidden, rows = trace.point(HIDDEN), trace.point(ROWS)
    text = np.setdiff1d(np.arange(len(trace.input_ids) + len(trace.token_ids)), trace.layout.image_positions)
    ids = np.concatenate([trace.input_ids, trace.token_ids])[text]
    assert hidden.values.shape == (replay.length, 64) and hidden.values.dtype == torch.float16
    assert rows.values.shape == (len(text), 64)
    assert torch.allclose(hidden.values.float(), hidden_states(replay), atol=2e-3, rtol=2e-3)
    head = replay.model.lm_head.weight.detach()[torch.from_numpy(ids)]
    assert torch.allclose(rows.values.float(), head, atol=1e-3, rtol=1e-3)
    # And the hidden states are those that the head turns into what was recorded.
    logits = hidden.values.float() @ replay.model.lm_head.weight.detach().T
    predicted = logits[len(trace.input_ids) - 1 :].log_softmax(-1)[torch.arange(5), torch.tensor(trace.token_ids)]
    assert np.allclose(predicted, trace.log_probs, atol=0.02)


def test_values_beyond_half_precision_are_kept_in_single():
    from lvlm_probe.replaying.hidden_states import narrowed

    assert narrowed(torch.tensor([1.0, 2.0])).dtype == torch.float16
    assert narrowed(torch.tensor([1.0, 1e6])).dtype == torch.float32


def test_a_head_without_rows_is_refused():
    class Headless(torch.nn.Module):
        def get_output_embeddings(self):
            return None

    with pytest.raises(ExplainError, match="no linear LM head"):
        head_rows(Headless(), torch.tensor([0]))
