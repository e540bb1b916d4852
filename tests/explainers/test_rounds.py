"""The default of iGOS++ goes on while its map is poor and passes help: rounds, reasons to stop, what is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_replay import ToyReplay, box_weights

import lvlm_probe as probe
from lvlm_probe import explainers
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers import Problem
from lvlm_probe.explainers.curve_points import QUICK_PASSES, quick_areas
from lvlm_probe.explainers.igos import PRESETS, IgosSettings
from lvlm_probe.explainers.igos import rounds as going_on
from lvlm_probe.explainers.igos.rounds import Judge, Round, budget_of, rounds
from lvlm_probe.metrics import evaluate
from lvlm_probe.selection import select_tokens

ON_MASK, ON_ORDER = Round(1, 4, 4, 2), Round(0, 4, 6, 2)
LONG = Round(3, 8, 5, None)
"""108 passes, 4.5 times those of a first round."""
BOX = box_weights(8, slice(2, 4), slice(5, 7))


def explain(replay: Any, **settings: Any) -> probe.Heatmap:
    return explainers.explain(replay, strengthen=False, **settings)


def problem_of(replay: ToyReplay) -> Problem:
    return Problem(replay, select_tokens(replay, rule="joint"))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def recorded() -> Callable[[], probe.Replay]:
    model, processor = probe.demo.load()
    (scene,) = probe.demo.scenes(1, split="eval", start=3)
    answer = probe.ask(model, processor, scene.image, scene.question)
    return lambda: probe.replay(answer.trace, model, processor)


@pytest.mark.parametrize("budget", [24, 40, 63, 64, 100, 196, 1000])
@pytest.mark.parametrize("own", [{}, {"refine": 0}, {"masks": 2, "ig_steps": 3}, {"iterations": 9}])
def test_rounds_and_their_checks_stay_within_the_budget(budget: int, own: dict[str, Any]) -> None:
    settings = IgosSettings(**{"iterations": 1, "ig_steps": 4, "refine": 4, "refine_levels": 2, "budget": budget} | own)
    planned = rounds(settings)
    assert (planned[0].iterations, planned[0].steps) == (settings.iterations, settings.refine)
    taken = [one.passes(settings) for one in planned]
    assert all(later > 0 for later in taken[1:])
    if len(planned) > 1:
        assert sum(taken) + QUICK_PASSES * (len(planned) + 1) <= budget
        assert taken[1] <= taken[0]
        assert all(later <= 4 * sum(taken[:number]) for number, later in enumerate(taken) if number)
        assert not (settings.refine and planned[1].iterations)  # what most maps lack is order
    assert not (own.get("refine") == 0 and any(one.steps for one in planned))


@pytest.mark.parametrize("budget", [64, 100, 120, 196, 400, 1000])
def test_the_budget_of_the_rounds_taken_gives_just_these(budget: int) -> None:
    settings = dataclasses.replace(PRESETS["default"], budget=budget)
    planned = rounds(settings)
    for number in range(1, len(planned) + 1):
        used = budget_of(settings, planned[:number])
        assert (used is None) == (number == 1) and (used or 0) <= budget
        assert rounds(dataclasses.replace(settings, budget=used)) == planned[:number]


def test_without_a_budget_there_is_one_round() -> None:
    for name, settings in PRESETS.items():
        assert (len(rounds(settings)) > 1) == (name == "default")
    assert sum(one.passes(PRESETS["default"]) for one in rounds(PRESETS["default"])) <= 196


def test_the_quick_areas_by_hand() -> None:
    """A quarter of 10 × 10 cells carries all: what is gone of it at 2, 6, 16 and 40 % is 8, 24, 64 and 100 %."""
    weights = box_weights(10, slice(0, 5), slice(0, 5))
    replay = ToyReplay(weights, size=(100, 100))
    ranked = weights.float() + torch.rand(10, 10, generator=torch.Generator().manual_seed(0)) * 1e-3
    deletion = 0.02 * 0.96 + 0.04 * 0.84 + 0.10 * 0.56 + 0.24 * 0.18
    insertion = 0.02 * 0.04 + 0.04 * 0.16 + 0.10 * 0.44 + 0.24 * 0.82 + 0.60
    found = quick_areas(problem_of(replay), ranked, torch.ones(10, 10, dtype=torch.bool))
    assert found == pytest.approx((deletion, insertion), abs=1e-5)
    assert replay.passes.forward == QUICK_PASSES


def test_a_good_map_is_the_fast_one_and_costs_a_look_more() -> None:
    replay, fast = ToyReplay(BOX), ToyReplay(BOX)
    heat, first = explain(replay, enough=0.85), explain(fast, preset="fast")
    assert np.array_equal(heat.values, first.values) and heat.history == first.history
    assert (replay.passes.forward, replay.passes.backward) == (24 + QUICK_PASSES, 24)
    said = heat.provenance["diagnostics"]
    assert [one["passes"] for one in said["rounds"]] == [24] and "enough" in said["stopped"]
    assert said["rounds"][0]["gain"] == pytest.approx(evaluate(heat, ToyReplay(BOX)).gain, abs=0.1)
    assert "diagnostics" not in first.provenance
    exact = explain(ToyReplay(BOX), budget=24)
    assert np.array_equal(exact.values, first.values) and exact.provenance["passes"] == first.provenance["passes"]


def test_it_goes_on_to_the_limit_where_nothing_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(going_on, "HELP", -9.0)
    replay = ToyReplay(BOX)
    told: list[tuple[int, int]] = []
    heat = explain(replay, enough=9.0, budget=150, progress=lambda done, total: told.append((done, total)))
    assert 24 < replay.passes.backward <= replay.passes.forward <= 150
    said = heat.provenance["diagnostics"]
    assert said["rounds"][-1]["passes"] == replay.passes.backward and len(said["rounds"]) == 3
    assert said["stopped"] == "the budget of 150 passes is spent"
    assert all(done <= total for done, total in told) and told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_the_best_map_of_all_rounds_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    gains = iter([0.5, 0.6, 0.4, 0.3])
    monkeypatch.setattr(going_on, "quick_areas", lambda *_: (0.0, next(gains)))
    judge = Judge(problem_of(ToyReplay(BOX)), PRESETS["default"])
    seen = torch.ones(2, 2, dtype=torch.bool)
    for number in range(3):
        judge.take(torch.full((2, 2), float(number)), seen, [ON_MASK, ON_MASK])
        assert float(judge.best[0, 0]) == min(number, 1)
    assert judge.stopped == "more passes did not help"  # 0.3, the last of the gains, was the blob's in the middle


@pytest.mark.parametrize(
    ("gains", "following", "stopped"),
    [
        ([0.96], ON_MASK, "enough"),
        ([0.94], ON_MASK, None),
        ([0.6, 0.38, 0.1], LONG, "about 0.60, and the next round would be long"),  # 4.5² · (0.98 − 0.95) is 0.61
        ([0.3, 0.41, 0.1], LONG, "about 0.41, and the next round would be long"),
        ([0.3, 0.36, -0.4], LONG, None),
        ([0.6, 0.7, 0.66], LONG, None),  # not clear of the middle
        ([0.3, 0.39, 0.1], LONG, None),  # nor of chance
        ([0.5, 0.51, 0.1], ON_MASK, "did not help"),
        ([0.5, 0.53], ON_MASK, None),
        ([0.2, 0.2, 0.1], ON_MASK, None),  # chance is not beaten: on, though passes did not help
        ([0.5, 0.5, 0.48], ON_MASK, None),  # nor is the middle
        ([0.2], None, "budget of 196"),
        ([0.96], None, "budget of 196"),
        ([float("nan")], ON_MASK, "nothing to measure"),
    ],
)
def test_reasons_to_stop(
    monkeypatch: pytest.MonkeyPatch, gains: list[float], following: Round | None, stopped: str | None
) -> None:
    """The third number is the gain of the blob in the middle, which is asked for only where it decides."""
    met = iter(gains)
    monkeypatch.setattr(going_on, "quick_areas", lambda *_: (0.0, next(met)))
    judge = Judge(problem_of(ToyReplay(BOX)), PRESETS["default"])
    for _ in gains[:2]:
        judge.take(
            torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool), [ON_MASK, *([following] if following else [])]
        )
    assert (judge.stopped is None) == (stopped is None)
    assert stopped is None or stopped in str(judge.stopped)


@pytest.mark.parametrize(
    ("deletion", "insertion", "enough"), [(0.02, 0.98, True), (0.5, 1.6, False), (-0.3, 0.7, False)]
)
def test_an_insertion_above_1_does_not_make_up_for_a_poor_deletion(
    monkeypatch: pytest.MonkeyPatch, deletion: float, insertion: float, enough: bool
) -> None:
    monkeypatch.setattr(going_on, "quick_areas", lambda *_: (deletion, insertion))
    judge = Judge(problem_of(ToyReplay(BOX)), PRESETS["default"])
    judge.take(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool), [ON_MASK, ON_ORDER])
    assert (judge.stopped is not None) is enough
    assert judge.gains == [insertion - deletion]


def test_a_round_on_the_order_alone_says_nothing_of_what_the_mask_may_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    following = iter([0.6, 0.6, 0.6, 0.1])
    monkeypatch.setattr(going_on, "quick_areas", lambda *_: (0.0, next(following)))
    judge = Judge(problem_of(ToyReplay(BOX)), PRESETS["default"])
    for one, stopped in ((ON_MASK, None), (ON_ORDER, None), (ON_MASK, "more passes did not help")):
        judge.take(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool), [one, ON_MASK])
        assert judge.stopped == stopped
    assert [round_["passes"] for round_ in judge.told()["rounds"]] == [24, 48, 72]


@pytest.mark.parametrize(("settings", "message"), [
    ({"budget": 23}, "a budget of 23 passes is less than the 24 of the first round"),
    ({"budget": 30, "iterations": 2}, "less than the 32 of the first round; a smaller one has fewer ig_steps"),
    ({"budget": 0}, "budget is at least 1"),
    ({"enough": float("nan")}, "enough is a number"),
])  # fmt: skip
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ExplainError, match=message):
        explain(ToyReplay(BOX), **settings)


def test_the_plan_says_a_range_that_holds_what_is_taken(recorded: Callable[[], probe.Replay]) -> None:
    replay = recorded()
    replay.llr  # noqa: B018 - a plan is of what comes after the words are chosen
    planned = probe.plan(replay, seconds=False)
    assert planned.at_least == (24 + QUICK_PASSES, 24) and planned.forward <= 196
    assert f"{planned.at_least[0]}–{planned.forward} + 24–{planned.backward} passes" in planned.sentence()
    explain(replay, preset="fast")  # what is found out once about a model is
    heat = explain(replay)
    taken = heat.provenance["passes"]
    assert planned.at_least[0] <= taken["forward"] <= planned.forward
    assert planned.at_least[1] <= taken["backward"] <= planned.backward
    assert probe.plan(replay, preset="fast", seconds=False).at_least is None


def test_the_settings_that_a_map_says_make_it_again(recorded: Callable[[], probe.Replay], tmp_path: Path) -> None:
    replay = recorded()
    first = explain(replay, enough=9.0, budget=70, seed=5)
    first.write(tmp_path / "map.h5")
    stored = probe.Heatmap.read(tmp_path / "map.h5")
    assert stored.params["budget"] <= 70 and stored.params["enough"] == 9.0
    again = explain(recorded(), seed=5, **stored.params)
    assert np.array_equal(again.values, first.values)
    assert again.params == stored.params
    assert again.provenance["diagnostics"]["rounds"] == stored.provenance["diagnostics"]["rounds"]
    assert len(stored.provenance["diagnostics"]["rounds"]) == 2
    once = explain(recorded(), enough=-1.0)
    assert once.params["budget"] is None, "one round was enough, and is what these settings make"
    assert np.array_equal(explain(recorded(), **once.params).values, once.values)
