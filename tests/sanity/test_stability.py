"""Stability over seeds and prompts, completeness of attributions, ties: on scorers whose answers are known."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from toy_replay import ToyReplay, box_weights

from lvlm_probe.errors import ExplainError, SelectionError
from lvlm_probe.explainers import explain, registry
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.sanity import completeness, prompts, seeds, stability, tie_share
from lvlm_probe.sanity.former import over_prompts, over_seeds

BOX = box_weights(8, slice(1, 4), slice(2, 5))


def heat(values: np.ndarray, **more: object) -> Heatmap:
    return Heatmap(values, (64, 64), **more)


def noisy(problem: registry.Problem, *, noise: float = 0.1) -> registry.Outcome:
    """The toy's own weights with noise from the seed."""
    truth = problem.replay.weights[problem.selection.indices[0]].float()
    drawn = torch.rand(truth.shape, generator=problem.generator())
    return registry.Outcome(((1 - noise) * truth / truth.max() + noise * drawn), {"noise": noise})


@pytest.fixture(autouse=True)
def method():
    registry.register("test noisy")(noisy)
    yield
    del registry.METHODS["test noisy"]


def test_stability_is_the_mean_over_pairs() -> None:
    generator = np.random.default_rng(0)
    maps = [np.float32(generator.random((9, 9))) for _ in range(4)]
    result = stability([heat(values) for values in maps])
    rhos = [spearmanr(a.ravel(), b.ravel()).statistic for a, b in itertools.combinations(maps, 2)]
    assert result.n == 4
    assert result.rank_correlation == pytest.approx(np.mean(rhos))
    assert result.lowest_rank_correlation == pytest.approx(np.min(rhos))
    scaled = np.array([values / values.max() for values in maps], dtype=float)
    assert result.deviation == pytest.approx(np.sqrt(scaled.var(axis=0, ddof=1).mean()), rel=1e-5)
    assert len(result.heatmaps) == 4
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["n"] == 4


def test_the_same_map_is_perfectly_stable_at_any_scale_and_resolution() -> None:
    values = np.kron(np.random.default_rng(1).random((5, 5)), np.ones((2, 2)))
    result = stability([heat(values), heat(values * 0.5)])
    assert (result.rank_correlation, result.top_iou, result.deviation) == pytest.approx((1.0, 1.0, 0.0), abs=1e-6)
    coarse = stability([heat(values[::2, ::2]), heat(values)])
    assert coarse.rank_correlation == pytest.approx(1.0)


def explained(replay: ToyReplay, noise: float, **options: object) -> Heatmap:
    return explain(replay, method="test noisy", noise=noise, **options)


def test_seeds_make_the_difference_and_less_noise_less_of_it() -> None:
    replay = ToyReplay(BOX)
    loud = seeds(replay, explained(replay, 0.99), seeds=4)
    quiet = seeds(replay, explained(replay, 0.05), seeds=4)
    assert loud.stability.n == quiet.stability.n == 4
    assert quiet.stability.deviation < 0.1 < loud.stability.deviation
    assert quiet.stability.top_iou > loud.stability.top_iou
    assert [item.provenance["seed"] for item in loud.stability.heatmaps] == [0, 1, 2, 3]
    assert (quiet.verdict, loud.verdict) == ("passes", "fails")
    assert f"{loud.stability.top_iou:.2f} in the mean (limit 0.33" in loud.reason
    chosen = seeds(replay, explained(replay, 0.1, seed=7), seeds=[7, 8, 8])
    assert [item.provenance["seed"] for item in chosen.stability.heatmaps] == [7, 8]
    assert [step.name for step in chosen.steps] == ["seed 8"]
    assert json.loads(json.dumps(chosen.to_dict(), allow_nan=False))["stability"]["n"] == 2
    silent = seeds(replay, explained(replay, 0.0), seeds=2)
    assert silent.verdict == "passes" and "draws no random numbers" in silent.reason


def test_paraphrased_prompts() -> None:
    replays = [
        ToyReplay(BOX, tokens=[" red"]),
        ToyReplay(BOX, tokens=["Red"]),
        ToyReplay(BOX.flip(0, 1), tokens=[" red"]),
    ]
    heat = explained(replays[0], 0.0, tokens="red")
    same = prompts(replays[0], heat, replays[1:2])
    assert (same.stability.rank_correlation, same.stability.top_iou) == pytest.approx((1.0, 1.0))
    assert same.verdict == "passes" and "identical" not in same.reason
    other = prompts(replays[0], heat, replays[2:])
    assert other.verdict == "fails" and other.stability.lowest_rank_correlation < 0.7
    with pytest.raises(SelectionError):
        prompts(replays[0], heat, [ToyReplay(BOX, tokens=["blue"])])
    for nothing in ([], "what?"):
        with pytest.raises(ExplainError, match="several wordings"):
            prompts(replays[0], heat, nothing)


def test_the_former_names_compare_as_before() -> None:
    replay = ToyReplay(BOX)
    result = over_seeds(replay, seeds=[7, 8], method="test noisy", noise=0.5)
    assert [item.provenance["seed"] for item in result.heatmaps] == [7, 8]
    replays = [ToyReplay(BOX, tokens=[" red"]), ToyReplay(BOX, tokens=["Red"])]
    same = over_prompts(replays, method="test noisy", tokens="red", noise=0.0)
    assert (same.rank_correlation, same.top_iou) == pytest.approx((1.0, 1.0))
    with pytest.raises(ExplainError, match="at least two different"):
        over_seeds(replay, seeds=1, method="test noisy")


def test_a_linear_scorers_own_weights_are_complete() -> None:
    """log P is linear in nothing here, so f is taken as the toy gives it and attributions are made to add up."""
    replay = ToyReplay(torch.stack([BOX, BOX]), original=[0.9, 0.6], base=[0.01, 0.2])
    difference = float(np.log(0.9 / 0.01) + np.log(0.6 / 0.2))
    exact = completeness(BOX.numpy() * difference, replay, [0, 1])
    assert exact.difference == pytest.approx(difference, rel=1e-5)
    assert exact.error == pytest.approx(0.0, abs=1e-5)
    assert completeness(torch.full((4, 4), difference / 8), replay, [0, 1]).error == pytest.approx(1.0, abs=1e-5)
    first = completeness(-BOX.numpy(), replay, [0])
    assert first.total == pytest.approx(-1)
    assert first.error == pytest.approx((1 + np.log(90)) / np.log(90), rel=1e-5)
    assert replay.passes.forward == 6


def test_completeness_of_gradients_along_the_straight_path() -> None:
    """Integrated gradients of the mask, by hand, add up; one gradient times the input does not."""
    replay = ToyReplay(BOX)
    points = (torch.arange(400) + 0.5) / 400
    masks = points[:, None, None].expand(-1, 8, 8).clone()
    _, slopes = replay.score_and_grad(masks, lambda log_probs: log_probs[:, 0])
    integrated = completeness(slopes.mean(dim=0), replay, [0])
    assert integrated.error < 0.01
    _, slope = replay.score_and_grad(torch.ones(1, 8, 8), lambda log_probs: log_probs[:, 0])
    assert completeness(slope[0], replay, [0]).error > 0.5


def test_completeness_without_a_difference_is_no_number() -> None:
    replay = ToyReplay(BOX, original=[0.5], base=[0.5])
    result = completeness(np.ones(3), replay, [0])
    assert np.isnan(result.error)
    assert result.to_dict() == {"total": 3.0, "difference": 0.0, "error": None}


def test_tie_share_of_a_heatmap() -> None:
    seen = np.array([[True, True], [True, False]])
    assert tie_share(heat(np.array([[0.5, 0.5], [0.1, 0.1]]))) == 1.0
    assert tie_share(heat(np.array([[0.5, 0.5], [0.1, 0.1]]), seen=seen)) == pytest.approx(2 / 3)
    assert tie_share(heat(np.array([[0.4, 0.3], [0.2, 0.1]]))) == 0.0
    with pytest.raises(ExplainError, match="no values: empty"):
        tie_share(Heatmap(None, (8, 8), reason="empty"))


@pytest.mark.quick
def test_refusals_and_missing_heatmaps() -> None:
    one = heat(np.eye(4))
    empty = Heatmap(None, (64, 64), reason="nothing selected")
    with pytest.raises(ExplainError, match="1 of 2 have values"):
        stability([one, empty])
    assert stability([one, empty, one]).missing == 1
    with pytest.raises(ExplainError, match="at least two different"):
        seeds(ToyReplay(BOX), explained(ToyReplay(BOX), 0.1), seeds=1)
    with pytest.raises(ExplainError, match="images of"):
        stability([one, Heatmap(np.eye(4), (32, 32))])
