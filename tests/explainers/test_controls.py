"""The two floors: what they are, and that they need no model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from toy_replay import ToyReplay, box_weights

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers import explain, registry
from lvlm_probe.metrics import evaluate

BOX = box_weights(16, slice(3, 6), slice(9, 13))


def test_random_is_uniform_seeded_and_leaves_the_global_state() -> None:
    before = torch.random.get_rng_state()
    first = explain(ToyReplay(BOX), method="random", size=40, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.shape == (40, 40)
    assert stats.kstest(first.values.ravel(), "uniform").pvalue > 0.01
    assert np.array_equal(first.values, explain(ToyReplay(BOX), method="random", size=40, seed=3).values)
    assert not np.array_equal(first.values, explain(ToyReplay(BOX), method="random", size=40, seed=4).values)


@pytest.mark.quick
def test_center_is_a_gaussian_around_the_middle() -> None:
    heat = explain(ToyReplay(BOX, size=(400, 100)), method="center", size=(5, 9), sigma=0.2)
    row, col = (np.arange(5) + 0.5) / 5, (np.arange(9) + 0.5) / 9
    expected = stats.norm.pdf(row, 0.5, 0.2)[:, None] * stats.norm.pdf(col, 0.5, 0.2)
    assert np.allclose(heat.values, expected / expected.max(), atol=1e-6)
    assert explain(ToyReplay(BOX), method="center").values.max() == 1.0
    with pytest.raises(ExplainError, match="sigma is positive"):
        explain(ToyReplay(BOX), method="center", sigma=0.0)


@pytest.mark.parametrize("method", ["random", "center"])
def test_floors_run_no_pass_and_say_so(method: str) -> None:
    assert registry.needs_of(method) == frozenset()
    told: list[tuple[int, int]] = []
    heat = explain(ToyReplay(BOX), method=method, progress=lambda a, b: told.append((a, b)))
    assert heat.provenance["passes"] == {"forward": 0, "backward": 0}
    assert told == [(0, 1), (1, 1)]


def test_random_scores_one_half_on_both_curves() -> None:
    scores = [evaluate(explain(ToyReplay(BOX), method="random", seed=seed), ToyReplay(BOX)) for seed in range(40)]
    for values in ([score.deletion for score in scores], [score.insertion for score in scores]):
        error = np.std(values, ddof=1) / len(values) ** 0.5
        assert abs(np.mean(values) - 0.5) < 4 * error < 0.1


@pytest.mark.parametrize("method", ["random", "center"])
def test_floors_run_on_a_trace_alone(method: str, demo: tuple[object, object], tmp_path: Path) -> None:
    model, processor = demo
    (scene,) = probe.demo.scenes(1)
    with probe.attach(model, processor) as p, p.record(tmp_path, images=[scene.image]) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs, max_new_tokens=16)
    trace = probe.open_store(tmp_path)[0]
    heat = probe.explain(trace, method=method, size=6)
    assert heat.shape == (6, 6)
    assert recording.traces[0].trace_id == heat.provenance["trace_id"]
