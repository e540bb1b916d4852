"""Refined maps: moving averages against scipy's, what is taken away against scipy's nonnegative least squares."""

from __future__ import annotations

from typing import Any

import inside
import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter
from scipy.optimize import nnls
from toy_replay import ToyReplay, box_weights

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.refined import accounted_for, over_scales
from lvlm_probe.explainers.registry import Problem, cost_of
from lvlm_probe.recording.answering import record_answer


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scales", [(1,), (3,), (1, 3, 5)])
def test_moving_averages_are_scipys(scales: tuple[int, ...]) -> None:
    grid = drawn(6, 7)
    wanted = np.mean([uniform_filter(grid.numpy(), side, mode="nearest") for side in scales], axis=0)
    assert np.allclose(over_scales(grid, scales).numpy(), wanted)
    clip = drawn(3, 6, 7)
    assert torch.allclose(over_scales(clip, scales)[1], over_scales(clip[1], scales))  # no averaging over time


@pytest.mark.parametrize("seed", range(5))
def test_what_earlier_maps_account_for_is_nonnegative_least_squares(seed: int) -> None:
    others = drawn(4, 30, seed=seed)
    signs = torch.tensor([0.8, -0.5, 0.3, 0.0], dtype=torch.float64)
    values = signs @ others + 0.3 * drawn(30, seed=seed + 100)
    wanted, _ = nnls(others.numpy().T, values.numpy())
    assert (wanted == 0).any() and (wanted > 0).any()  # the bound is met, and not everywhere
    assert np.allclose(accounted_for(values, others).numpy(), wanted, atol=1e-8)


def test_two_maps_that_are_the_same_and_one_that_is_nothing() -> None:
    values = drawn(10)
    weights = accounted_for(values, torch.stack([values, values, torch.zeros(10, dtype=torch.float64)]))
    assert float(weights[:2].sum()) == pytest.approx(1) and weights[2] == 0


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> probe.Replay:
    """An answer of four words of the demo model."""
    model, processor = probe.demo.load()
    (scene,) = probe.demo.scenes(1, split="tune", seed=5, kinds=["colour"])
    path = tmp_path_factory.mktemp("refined")
    record_answer(model, processor, [scene.image], scene.question, path, generate={"max_new_tokens": 32})
    return probe.replay(probe.open_store(path)[-1], model, processor)


def test_the_map_is_the_methods_own_less_what_earlier_words_account_for(replay: probe.Replay) -> None:
    """On attention, whose maps are the recorded rows; words that the image has no part in have one too."""
    *before, explained = replay.words[:4]  # "The cross is cyan"
    assert explained.text.startswith("cyan")
    rows = replay.trace.attention.values.astype(float).reshape(len(replay.tokens), -1, 64).mean(axis=1)

    def own(method: str, word: Any, **params: Any) -> probe.Heatmap:
        return probe.explain(replay, method=method, tokens=(word.start, word.stop), strengthen=False, **params)

    def map_of(word: Any) -> np.ndarray:
        mean: np.ndarray = rows[word.start : word.stop].mean(axis=0)
        return ((mean - mean.min()) / (mean.max() - mean.min())).reshape(8, 8)

    maps = [map_of(word) for word in (explained, *before[-2:])]
    flat = [grid.ravel() for grid in maps]
    weights, _ = nnls(np.stack(flat[1:]).T, flat[0])
    assert weights.max() > 0
    left = (flat[0] - weights @ np.stack(flat[1:])).clip(min=0).reshape(maps[0].shape)
    wanted = (left - left.min()) / (left.max() - left.min())
    heat = own("refined", explained, scales=(1,), earlier=2)
    assert np.allclose(heat.values, wanted, atol=1e-5)
    found = heat.provenance["diagnostics"]
    assert found["earlier_words"] == 2 and np.allclose(found["taken_away"], weights, atol=1e-5)
    assert heat.params["params"]["layers"] == "all"  # the method's own, as used
    plain = own("refined", explained, scales=(1,))
    assert np.allclose(plain.values, maps[0], atol=1e-5)
    assert own("refined", explained, earlier=9).provenance["diagnostics"]["earlier_words"] == len(before)


@pytest.mark.quick
def test_any_method_goes_through_it_and_passes_are_counted() -> None:
    replay = ToyReplay(
        torch.stack([box_weights(8, slice(0, 3), slice(0, 3)), box_weights(8, slice(4, 7), slice(4, 7))]),
        original=[0.9, 0.8], base=[0.01, 0.01],
    )  # fmt: skip
    params = {"of": "occlusion", "params": {"size": 4}, "scales": (1,)}
    heat = probe.explain(replay, method="refined", tokens=[1], earlier=1, **params)
    alone = probe.explain(replay, method="occlusion", tokens=[1], size=4)
    assert heat.values[:4, :4].mean() <= alone.values[:4, :4].mean() + 1e-6
    assert np.unravel_index(heat.values.argmax(), heat.shape)[0] >= heat.shape[0] // 2
    problem = Problem(replay, None)  # type: ignore[arg-type]
    own = cost_of("occlusion", problem, {"size": 4}).forward
    assert cost_of("refined", problem, {**params, "earlier": 1}).forward == 2 * own
    assert heat.provenance["passes"]["forward"] - alone.provenance["passes"]["forward"] == own


def test_a_word_that_was_said_before_is_not_taken_away() -> None:
    """Of several tokens too, as words often are."""
    spot = box_weights(8, slice(0, 3), slice(0, 3))
    other = box_weights(8, slice(4, 7), slice(4, 7))
    replay = ToyReplay(
        torch.stack([spot, spot, other, spot, spot]),
        original=[0.9] * 5, base=[0.01] * 5, tokens=[" tur", "quoise", " and", " tur", "quoise"],
    )  # fmt: skip
    heat = probe.explain(replay, method="refined", tokens=[3, 4], earlier=9, of="occlusion", params={"size": 4})
    assert heat.provenance["diagnostics"]["earlier_words"] == 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"of": "refined"}, "of is the name of another method"),
        ({"of": 3}, "of is the name of another method"),
        ({"of": "tmm", "params": 3}, "params is parameters by name"),
        ({"of": "tamm"}, "no explainer 'tamm'"),
        ({"of": "tmm", "params": {"depth": 1}}, "tmm takes no parameter 'depth'"),
        ({"scales": ()}, "scales is a list of window sizes"),
        ({"scales": 3}, "scales is a list of window sizes"),
        ({"scales": (0,)}, "scales is a list of window sizes"),
        ({"earlier": -1}, "earlier is a whole number of at least 0"),
    ],
)
def test_refusals(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ExplainError, match=message):
        probe.explain(inside.replay("llava"), method="refined", tokens=inside.SPAN, **params)


def test_what_the_method_lacks_is_said_by_its_name() -> None:
    toy = ToyReplay(box_weights(8, slice(0, 3), slice(0, 3)))
    with pytest.raises(ExplainError, match=r"attention needs attention of the model.*another of="):
        probe.explain(toy, method="refined", tokens=[0])
