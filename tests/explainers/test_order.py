"""The order of a heatmap: level sets by hand, the gradient by finite differences, and that it does what it is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from toy_replay import ToyReplay

from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers import Problem, explain
from lvlm_probe.explainers.igos.order import draw_grids, draw_levels, level_sets, over_cells, refine_order
from lvlm_probe.metrics import evaluate
from lvlm_probe.selection import select_tokens

LEVELS = (0.1, 0.25)
SLOPE = torch.linspace(1, 16, 16, dtype=torch.float64).reshape(4, 4)
WEIGHTS = SLOPE / SLOPE.sum()


def refined(
    replay: ToyReplay, heat: torch.Tensor, *, seen: torch.Tensor | None = None, iterations: int = 4, **changes: Any
) -> tuple[torch.Tensor, list[dict[str, float]]]:
    settings = {"softness": 0.1, "rate": 0.3, "momentum": 5.0} | changes
    settings.setdefault("plan", [LEVELS] * iterations)
    return refine_order(
        Problem(replay, select_tokens(replay, rule="joint")),
        heat,
        torch.ones(heat.shape, dtype=torch.bool) if seen is None else seen,
        progress=lambda done: None,
        **settings,
    )


def slope_of(objective: Callable[[torch.Tensor], float], at: torch.Tensor, *, by: float = 1e-2) -> torch.Tensor:
    """The slope along every cell, by central differences."""
    slope = torch.zeros_like(at)
    for place in np.ndindex(*at.shape):
        shift = torch.zeros_like(at)
        shift[place] = by
        slope[place] = (objective(at + shift) - objective(at - shift)) / (2 * by)
    return slope


def test_level_sets_by_hand() -> None:
    height = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0]])
    (found,) = level_sets(height, torch.ones(1, 5, dtype=torch.bool), [0.25], softness=0.25)
    # The hottest quarter begins at the 75 % quantile, which is 0.75.
    expected = [1 / (1 + np.exp(-(h - 0.75) / 0.25)) for h in height[0].tolist()]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)
    (narrow,) = level_sets(height, torch.tensor([[True, True, True, False, False]]), [0.5], softness=0.25)
    assert narrow[0, 1] == pytest.approx(0.5)  # quantiles are those of the seen cells alone


def test_a_step_goes_down_the_gradient_of_the_objective() -> None:
    replay, heat = ToyReplay(WEIGHTS), torch.rand(4, 4, generator=torch.Generator().manual_seed(3))
    rank = heat.flatten().argsort().argsort().reshape(4, 4) / 15
    height = (heat / heat.max() + rank) / 2

    def objective(at: torch.Tensor) -> float:
        # Limits are held fixed, as the gradient step holds them.
        limits = torch.quantile(height, 1 - torch.tensor(LEVELS))
        shown = torch.sigmoid((at[None] - limits[:, None, None]) / 0.1)
        probability = replay.log_probs(torch.cat([1 - shown, shown])).exp().mean(dim=1)
        return float((probability[:2] - probability[2:]).mean())

    slope = slope_of(objective, height, by=1e-3)
    step = height - 0.3 / slope.abs().max() * slope
    found, _ = refined(replay, heat, iterations=1)
    assert found.flatten().argsort().tolist() == step.flatten().argsort().tolist()


def test_heights_over_coarser_cells_are_means_of_what_is_seen() -> None:
    height = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, -1.0]])
    seen = height >= 0
    found, there = over_cells(height, seen, (1, 2))
    assert found.tolist() == [[pytest.approx((1 + 2 + 5 + 6) / 4), pytest.approx((3 + 4 + 7) / 3)]]
    assert there.tolist() == [[True, True]]
    half = torch.tensor([[False, False, True, True]]).expand(2, 4)
    found, there = over_cells(height.clamp(min=0), half, (2, 2))
    assert there.tolist() == [[False, True], [False, True]]
    assert found.tolist() == [[-1.0, 3.5], [-1.0, 3.5]]
    clip = torch.arange(16.0).reshape(2, 2, 4)  # steps in time stay apart
    assert over_cells(clip, torch.ones_like(clip, dtype=torch.bool), (2, 1, 2))[0].tolist() == [
        [[2.5, 4.5]],
        [[10.5, 12.5]],
    ]


def test_every_second_step_sees_the_order_on_cells_drawn_anew() -> None:
    def drawn(seed: int) -> list[tuple[int, ...]]:
        generator = torch.Generator().manual_seed(seed)
        return draw_grids((3, 32, 20), steps=60, shares=(0.4, 0.9), generator=generator)

    grids = drawn(0)
    assert grids == drawn(0) != drawn(1)
    assert set(grids[1::2]) == {(3, 32, 20)}
    others = grids[::2]
    assert len(set(others)) > 20
    assert all(time == 3 and 13 <= rows <= 29 and 8 <= columns <= 18 for time, rows, columns in others)
    assert draw_grids((2, 2), steps=2, shares=(0.1, 0.1), generator=torch.Generator()) == [(1, 1), (2, 2)]


def test_a_step_on_coarser_cells_goes_down_the_gradient_of_what_they_show() -> None:
    replay, heat = ToyReplay(WEIGHTS), torch.rand(4, 4, generator=torch.Generator().manual_seed(4))
    rank = heat.flatten().argsort().argsort().reshape(4, 4) / 15
    height = (heat / heat.max() + rank) / 2

    def means(of: torch.Tensor) -> torch.Tensor:
        return of.reshape(2, 2, 2, 2).mean(dim=(1, 3))  # 2 × 2 cells of 2 × 2 each

    limits = torch.quantile(means(height), 1 - torch.tensor(LEVELS))

    def objective(at: torch.Tensor) -> float:
        shown = torch.sigmoid((means(at)[None] - limits[:, None, None]) / 0.1)
        probability = replay.log_probs(torch.cat([1 - shown, shown])).double().exp().mean(dim=1)
        return float((probability[:2] - probability[2:]).mean())

    slope = slope_of(objective, height)
    step = height - 0.3 / slope.abs().max() * slope
    found, _ = refined(replay, heat, iterations=1, grids=[(2, 2)])
    own, _ = refined(replay, heat, iterations=1)
    assert not torch.equal(found, own)
    assert found.flatten().argsort().tolist() == step.flatten().argsort().tolist()


def test_the_level_sets_are_scored_by_the_mean_probability_of_the_words() -> None:
    replay = ToyReplay(torch.stack([WEIGHTS, WEIGHTS.flip(0)]), original=(0.9, 0.5), base=(0.01, 0.2))
    heat = torch.rand(4, 4, generator=torch.Generator().manual_seed(5))
    rank = heat.flatten().argsort().argsort().reshape(4, 4) / 15
    shown = level_sets((heat / heat.max() + rank) / 2, torch.ones(4, 4, dtype=torch.bool), LEVELS, softness=0.1)
    taken, given = (float(replay.log_probs(masks).exp().mean()) for masks in (1 - shown, shown))
    _, records = refined(replay, heat, iterations=1)
    assert records[0]["probability_taken"] == pytest.approx(taken, abs=1e-6)
    assert records[0]["probability_shown"] == pytest.approx(given, abs=1e-6)


def test_every_level_pulls_as_hard_as_the_others() -> None:
    """``pace="level"``: gradients of the levels, found by finite differences, have one size before they are added."""
    replay, heat = ToyReplay(WEIGHTS), torch.rand(4, 4, generator=torch.Generator().manual_seed(2))
    rank = heat.flatten().argsort().argsort().reshape(4, 4) / 15
    height, levels = (heat / heat.max() + rank) / 2, (0.06, 0.5)
    sum_of_slopes = torch.zeros(4, 4)
    for level in levels:
        limit = torch.quantile(height, 1 - level)

        def objective(at: torch.Tensor, limit: torch.Tensor = limit) -> float:
            shown = torch.sigmoid((at - limit) / 0.1)
            taken, given = replay.log_probs(torch.stack([1 - shown, shown])).double().exp().mean(dim=1).tolist()
            return taken - given

        slope = slope_of(objective, height)
        sum_of_slopes += slope / slope.abs().max()
    step = height - 0.3 / sum_of_slopes.abs().max() * sum_of_slopes
    found, _ = refined(replay, heat, plan=[levels], pace="level")
    together, _ = refined(replay, heat, plan=[levels], pace="each")
    assert not torch.equal(found, together)
    assert found.flatten().argsort().tolist() == step.flatten().argsort().tolist()


def test_the_values_stay_and_their_order_improves() -> None:
    replay = ToyReplay(WEIGHTS, base=(0.001,))
    heat = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))  # knows nothing
    found, records = refined(replay, heat, iterations=10)
    assert torch.equal(found.flatten().sort().values, heat.flatten().sort().values)

    def agreement(values: torch.Tensor) -> float:
        return float(np.corrcoef(values.flatten().argsort().argsort(), WEIGHTS.flatten().argsort().argsort())[0, 1])

    assert agreement(found) > agreement(heat) + 0.2
    first, last = records[0], records[-1]
    assert last["probability_taken"] < first["probability_taken"]
    assert last["probability_shown"] > first["probability_shown"]


def test_cells_out_of_sight_stay_as_they_are() -> None:
    seen = torch.ones(4, 4, dtype=torch.bool)
    seen[:, 0] = False
    heat = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)).masked_fill(~seen, 0.0)
    found, _ = refined(ToyReplay(WEIGHTS), heat, seen=seen)
    assert bool((found[~seen] == 0).all())
    assert torch.equal(found[seen].sort().values, heat[seen].sort().values)


def test_a_score_that_no_level_set_changes_leaves_the_order() -> None:
    replay = ToyReplay(WEIGHTS, original=(0.5,), base=(0.5,))
    heat = torch.rand(4, 4, generator=torch.Generator().manual_seed(2))
    found, records = refined(replay, heat)
    assert torch.equal(found, heat)
    assert not records


def test_levels_are_dealt_out_evenly() -> None:
    levels = (0.01, 0.02, 0.04, 0.08, 0.16, 0.3)
    plan = draw_levels(levels, steps=9, per_step=2, generator=torch.Generator().manual_seed(0))
    assert [len(set(hand)) for hand in plan] == [2] * 9
    drawn = [level for hand in plan for level in hand]
    assert {drawn.count(level) for level in levels} == {3}
    assert plan == draw_levels(levels, steps=9, per_step=2, generator=torch.Generator().manual_seed(0))
    for hand in draw_levels(levels, steps=5, per_step=4, generator=torch.Generator().manual_seed(1)):
        assert len(set(hand)) == 4
    assert draw_levels(levels, steps=1, per_step=6, generator=torch.Generator()) == [levels]


def test_each_step_of_its_own_pace_moves_by_the_rate_and_decays() -> None:
    """One step on one level changes the highest cell of H by exactly the rate, and the second by half of it."""
    heat = torch.rand(4, 4, generator=torch.Generator().manual_seed(3))
    heights: list[torch.Tensor] = []

    class Watching(ToyReplay):
        def score_and_grad(self, masks: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            shown = masks[len(masks) // 2 :]
            heights.append(0.1 * torch.logit(shown[0].clamp(1e-7, 1 - 1e-7)))
            return super().score_and_grad(masks, *args, **kwargs)

    plan = [(0.25,), (0.25,), (0.25,)]
    refined(Watching(WEIGHTS), heat, plan=plan, momentum=1e9, pace="each", decay=True)
    for before, after, expected in ((0, 1, 0.3), (1, 2, 0.2)):
        change = heights[after] - heights[before]
        # The limit of the level set moves along with H; differences between cells do not know of it.
        spread = float(change.max() - change.min())
        assert expected * 0.9 <= spread <= 2 * expected + 1e-3


def test_igos_refines_on_a_finer_grid_and_counts_its_passes() -> None:
    replay = ToyReplay(WEIGHTS)
    told: list[tuple[int, int]] = []
    heat = explain(
        replay, preset="thorough", size=4, iterations=2, ig_steps=3, refine=3, levels=(0.1, 0.3), refine_scale=2,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert heat.shape == (8, 8)
    assert replay.passes.backward == 2 * 2 * 3 + 3 * 2 * 2
    assert told == [(0, 5), (1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert [record.get("refinement") for record in heat.history] == [None, None, 0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("settings", "seen_on"),
    [
        ({"preset": "fast", "size": 10}, [(10, 10), "coarser", (20, 20), "coarser", (20, 20)]),
        ({"preset": "fast", "size": 10, "refine_cells": None}, [(10, 10), *[(20, 20)] * 4]),
        ({"preset": "fast", "size": 10, "refine_cells": (0.5, 0.5)}, [(10, 10), *[(10, 10), (20, 20)] * 2]),
        ({"preset": "thorough", "size": 4, "iterations": 1, "refine": 2}, [(4, 4), (8, 8), (8, 8)]),
    ],
)
def test_cells_that_the_order_is_seen_on(settings: dict[str, Any], seen_on: list[Any]) -> None:
    grids: list[tuple[int, ...]] = []

    class Watching(ToyReplay):
        def score_and_grad(self, masks: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            grids.append(tuple(masks.shape[1:]))
            return super().score_and_grad(masks, *args, **kwargs)

    heat = explain(Watching(WEIGHTS, base=(0.001,)), **settings)
    assert heat.shape == grids[-1]
    coarser = {grid for grid in grids[1::2] if grid not in ((10, 10), (20, 20), (8, 8))}
    assert ["coarser" if grid in coarser else grid for grid in grids] == seen_on
    assert all(8 <= edge <= 20 for grid in coarser for edge in grid)


@pytest.mark.quick
def test_refining_raises_insertion_over_deletion() -> None:
    gains = []
    for refine in (0, 5):
        replay = ToyReplay(WEIGHTS, base=(0.001,))
        heat = explain(replay, preset="thorough", size=4, iterations=1, ig_steps=2, lr=0.05, refine=refine)
        gains.append(evaluate(heat, replay, grid=8).gain)
    assert gains[1] >= gains[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refine": -1}, "refine is not negative"),
        ({"refine_scale": 0}, "refine_scale is at least 1"),
        ({"levels": (0.0, 0.5)}, "levels are shares between 0 and 1"),
        ({"levels": ()}, "levels are shares between 0 and 1"),
        ({"softness": 0.0}, "softness is positive"),
        ({"refine_lr": 0.0}, "refine_lr is positive"),
        ({"path": "line"}, "path is 'grid' or 'stratified'"),
        ({"refine_levels": 7}, "refine_levels is 1 to the number of levels"),
        ({"refine_cells": (0.0, 1.0)}, "refine_cells are two shares above 0 and up to 1"),
        ({"refine_cells": (0.9, 0.5)}, "refine_cells are two shares above 0 and up to 1"),
        ({"refine_levels": 0}, "refine_levels is 1 to the number of levels"),
        ({"refine_pace": "second"}, "refine_pace is 'first', 'each' or 'level'"),
    ],
)
def test_refusals(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ExplainError, match=message):
        explain(ToyReplay(WEIGHTS), **settings)
