"""Attention flow against networkx on an eager model's maps, and against every cut of a small graph."""

from __future__ import annotations

import itertools

import inside
import networkx
import numpy as np
import pytest
import torch

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError, ProbeError
from lvlm_probe.explainers import attention_flow as module
from lvlm_probe.explainers.attention_flow import UNIT, flows
from lvlm_probe.explainers.registry import Problem, cost_of
from lvlm_probe.planning import Pace, expected

DECODER = "model.language_model"


def random_maps(length: int, depth: int, seed: int) -> list[torch.Tensor]:
    drawn = torch.rand(depth, length, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    causal = (drawn**4).tril()
    return list(causal / causal.sum(dim=-1, keepdim=True))


@pytest.mark.parametrize("seed", range(4))
def test_the_greatest_flow_is_the_least_cut(seed: int) -> None:
    """Ford and Fulkerson: of all ways to part the nodes with the source on one side and the target on the other, the
    one with the narrowest pipes across; here all of them are tried."""
    length, depth = 3, 2
    maps = random_maps(length, depth, seed)
    pipes = {
        ((level, i), (level - 1, j)): float((attention[i, j] + (i == j)) / 2)
        for level, attention in enumerate(maps, start=1)
        for i, j in itertools.product(range(length), repeat=2)
    }
    source = (depth, length - 1)
    nodes = [node for node in itertools.product(range(depth + 1), range(length)) if node != source]
    found = flows(maps, torch.tensor([length - 1]), torch.arange(length))
    for target in range(length):
        others = [node for node in nodes if node != (0, target)]
        least = min(
            sum(width for (above, below), width in pipes.items() if above in side and below not in side)
            for size in range(len(others) + 1)
            for chosen in itertools.combinations(others, size)
            for side in [{source, *chosen}]
        )
        assert float(found[target]) == pytest.approx(least, abs=20 / UNIT)


@pytest.mark.quick
def test_on_a_model_it_is_networkx_on_an_eager_models_maps() -> None:
    replay = inside.replay("llava")
    calls = inside.dense(inside.replay("llava", attention="eager")).of(DECODER)
    graph = networkx.DiGraph()
    for level, call in enumerate(calls, start=1):
        mean = call.weights[0].double().mean(dim=0)
        for i, j in itertools.product(range(len(mean)), repeat=2):
            if (width := float(mean[i, j] + (i == j)) / 2) > 0:
                graph.add_edge((level, i), (level - 1, j), capacity=width)
    for step in range(*inside.SPAN):
        graph.add_edge("words", (len(calls), len(replay.input_ids) - 1 + step), capacity=1.0)
    columns = replay.trace.layout.image_positions
    wanted = np.array([networkx.maximum_flow_value(graph, "words", (0, int(at))) for at in columns])
    heat = probe.explain(replay, method="attention_flow", tokens=inside.SPAN, strengthen=False)
    scaled = ((wanted - wanted.min()) / (wanted.max() - wanted.min())).reshape(4, 4)
    assert np.allclose(heat.values[:, 1:5], scaled, atol=5e-3)  # CLIP sees the middle square
    assert inside.own_passes(replay, "attention_flow") == {"forward": 1, "backward": 0}
    fewer = probe.explain(replay, method="attention_flow", tokens=inside.SPAN, strengthen=False, layers=1)
    assert fewer.provenance["diagnostics"]["layers"] == 1
    assert np.abs(fewer.values - heat.values).max() > 0.01


def test_a_plan_counts_the_graph() -> None:
    """It is of layers × tokens², which no pass is."""
    replay = inside.replay("llava")
    problem = Problem(replay, None)  # type: ignore[arg-type]
    three, one = (cost_of("attention_flow", problem, params).numbers for params in ({}, {"layers": 1}))
    assert three == 3 * one > 2 * 3 * replay.length**2


def test_a_plan_says_that_flows_take_time_beside_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = inside.replay("llava")
    targets = len(replay.trace.layout.image_positions)
    pipes = 3 * replay.length * (replay.length + 1) // 2
    monkeypatch.setattr(module, "_PACE", 10.0)
    planned = probe.plan(replay, method="attention_flow")
    assert planned.seconds is not None and planned.seconds >= pipes * targets * 10
    assert expected(replay, ["attention_flow"], Pace((0.0, 0.0), None)) == {"attention_flow": pipes * targets * 10}


def test_a_single_layer_lets_through_half_of_its_attention() -> None:
    (attention,) = random_maps(4, 1, 7)
    found = flows([attention], torch.tensor([3]), torch.tensor([0, 1, 2]))
    assert torch.allclose(found, attention[3, :3] / 2, atol=2 / UNIT)


def test_a_graph_that_would_take_hours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PIPES", 10)
    with pytest.raises(ExplainError, match=r"takes hours: give fewer layers=…, or use 'rollout'"):
        flows(random_maps(4, 2, 0), torch.tensor([3]), torch.arange(3))
    with pytest.raises(ExplainError, match="layers is a whole number"):
        probe.explain(inside.replay("llava"), method="attention_flow", tokens=inside.SPAN, layers=0)


def test_without_scipy_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ProbeError, match=r"lvlm-probe\[stats\]"):
        flows(random_maps(3, 1, 0), torch.tensor([2]), torch.arange(2))
