"""Adaptive curves: as many points as the error bound takes, the bound itself, and what it does not cover."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_replay import ToyReplay, box_weights

from lvlm_probe.errors import ExplainError
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.metrics import Score, evaluate
from lvlm_probe.metrics.deletion_insertion import CurveRule, Curves, CurveSettings, MaskScores, area, curves
from lvlm_probe.selection import select_tokens

BOX = box_weights(16, slice(2, 6), slice(8, 12))  # 16 of 256 cells
SEEN = np.ones((16, 16), dtype=bool)
VALUES = np.random.default_rng(0).random((16, 16))


class ByCount(ToyReplay):
    """P depends on nothing but how many cells are kept: ``table[kept]``, kept from 0 to 256."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__(torch.full((16, 16), 1 / 256), original=[float(table[-1])], base=[float(table[0])])
        self.table = torch.as_tensor(table, dtype=torch.float64)
        self.scored: list[int] = []

    def log_probs(self, mask=None, **_options):  # type: ignore[no-untyped-def]
        kept = mask.flatten(1).sum(1).round().long()
        self.scored += kept.tolist()
        return self.table[kept].log()[:, None]


def run(replay: ToyReplay, **options: object) -> Curves:
    scores = MaskScores(replay, [0], image=0, mode="fast")  # type: ignore[arg-type]
    return curves(VALUES, SEEN, scores, CurveSettings(**options))  # type: ignore[arg-type]


def normalised_areas(found: Curves, span: float) -> np.ndarray:
    return np.array([area(found.fractions, curve) for curve in (found.deletion, found.insertion)]) / span


@settings(max_examples=20)
@given(
    st.lists(st.floats(0, 1), min_size=256, max_size=256),
    st.integers(1, 12),
    st.sampled_from([0.005, 0.02, 0.1]),
)
def test_the_bound_holds_for_monotone_curves(rises: list[float], power: int, tolerance: float) -> None:
    """Rises that are even (power 1), or nearly all in one place (power 12): a step."""
    steps = np.array(rises) ** power + 1e-6
    table = 0.01 + 0.98 * np.concatenate([[0.0], np.cumsum(steps)]) / steps.sum()
    replay = ByCount(table)
    full, adaptive = run(replay), run(replay, sampling="adaptive", tolerance=tolerance)
    span = table[-1] - table[0]
    off = np.abs(normalised_areas(adaptive, span) - normalised_areas(full, span))
    assert (off <= np.array(adaptive.error_bound) + 1e-12).all()
    assert max(adaptive.error_bound) <= tolerance
    assert full.error_bound == (0, 0)
    assert adaptive.turns == pytest.approx((0, 0), abs=1e-12)
    assert adaptive.images <= full.images


def test_the_bound_of_one_interval_is_attained() -> None:
    """Nine even points of 257; all that happens, happens right behind one of them, where the trapezoid cannot know."""
    table = np.full(257, 0.1)
    table[33:] = 0.9  # between 32 and 64 cells kept
    found = run(ByCount(table), steps=256, sampling="adaptive", tolerance=1.0)
    exact = run(ByCount(table), steps=256)
    # Half of the interval's 32 cells, less one of them, of 256.
    assert found.error_bound == pytest.approx((31 / 2 / 256, 31 / 2 / 256))
    off = normalised_areas(found, 0.8) - normalised_areas(exact, 0.8)
    assert np.abs(off) == pytest.approx([31 / 2 / 256, 31 / 2 / 256])
    assert found.images == 2 + 2 * 7


@pytest.mark.quick
def test_a_heatmap_that_is_right_at_once_takes_few_pictures() -> None:
    replay = ToyReplay(BOX)
    heat = Heatmap(BOX.numpy() + 1e-3 * VALUES, (64, 64), selection=select_tokens(replay), method="test")
    full = evaluate(heat, replay, grid=16)
    adaptive = evaluate(heat, replay, grid=16, curve=CurveRule(sampling="adaptive", tolerance=0.01))
    assert adaptive.params["images"] < 0.35 * (2 + 2 * 49)
    assert adaptive.deletion == pytest.approx(full.deletion, abs=0.01)
    assert adaptive.insertion == pytest.approx(full.insertion, abs=0.01)
    assert len(adaptive.fractions) == len(full.fractions)
    # Those that were scored are the full curve's points, the others lie between their neighbours.
    same = np.isclose(adaptive.deletion_curve, full.deletion_curve, atol=1e-6)
    assert same[0] and same[-1] and same.sum() >= 9
    bound = adaptive.params["error_bound"]
    assert 0 < max(bound["deletion"], bound["insertion"]) <= 0.01
    assert "error_bound" not in full.params and "sampling" not in full.params
    assert Score.from_dict(json.loads(json.dumps(adaptive.to_dict(), allow_nan=False))) == adaptive


def test_a_linear_curve_takes_nearly_all_points() -> None:
    """There is nothing to skip: the bound of m even intervals is 1 / (2 m), less what the outer cells fix."""
    found = run(ByCount(np.linspace(0.1, 0.9, 257)), sampling="adaptive", tolerance=0.01)
    assert found.images > 0.5 * (2 + 2 * 49)
    few = run(ByCount(np.linspace(0.1, 0.9, 257)), sampling="adaptive", tolerance=0.1)
    assert few.images == 2 + 2 * 7


def test_a_curve_that_turns_says_so_and_its_figure_is_an_estimate() -> None:
    table = np.linspace(0.1, 0.9, 257)
    table[100:160] += 0.3
    found = run(ByCount(table), sampling="adaptive", tolerance=0.05)
    assert found.turns[0] > 0.1 and found.turns[1] > 0.1
    # A spike between two points of the first pass: nobody can see it, and nothing claims to.
    table = np.full(257, 0.1)
    table[200:] = 0.9
    table[70:90] = 0.8
    spiked, hidden = run(ByCount(table)), run(ByCount(table), sampling="adaptive", tolerance=0.05)
    assert np.abs(normalised_areas(spiked, 0.8) - normalised_areas(hidden, 0.8)).max() > max(hidden.error_bound)
    assert hidden.turns == (0, 0)


def test_every_different_mask_is_scored_once() -> None:
    replay = ByCount(np.linspace(0.1, 0.9, 257))
    known = MaskScores(replay, [0], image=0, mode="fast")  # type: ignore[arg-type]
    masks = torch.zeros(4, 16, 16)
    masks[1, 0, 0] = masks[2, 0, 0] = masks[3, 1, 1] = 1
    first, again = known(masks), known(masks.flip(0))
    assert replay.scored == [0, 1, 1]  # the two masks with one cell elsewhere are different ones
    assert torch.equal(first, again.flip(0))
    assert len(known) == 3


def test_random_heatmaps_do_not_score_the_ends_again() -> None:
    replay = ToyReplay(BOX)
    heat = Heatmap(VALUES, (64, 64), selection=select_tokens(replay), method="test")
    before = replay.passes.forward
    evaluate(heat, replay, chance=2, center=False)
    assert replay.passes.forward - before == 2 + 3 * 2 * 49


def test_ties_are_averaged_over_orders_under_adaptive_sampling_too() -> None:
    replay = ToyReplay(BOX)
    heat = Heatmap(np.round(VALUES, 1), (64, 64), selection=select_tokens(replay), method="test")
    full = evaluate(heat, replay, curve=CurveRule(seed=3))
    adaptive = evaluate(heat, replay, curve=CurveRule(seed=3, sampling="adaptive", tolerance=0.02))
    assert adaptive.params["tie_orders"] == 3
    assert abs(adaptive.deletion - full.deletion) <= adaptive.params["error_bound"]["deletion"] <= 0.02


def test_what_cannot_be_sampled_is_refused() -> None:
    replay = ToyReplay(BOX)
    heat = Heatmap(VALUES, (64, 64), selection=select_tokens(replay), method="test")
    for options, message in (
        ({"sampling": "adaptive", "auc": "release"}, "defined on all of its points"),
        ({"sampling": "few"}, "sampling is 'full' or 'adaptive'"),
        ({"sampling": "adaptive", "tolerance": 0.0}, "tolerance is a positive share"),
    ):
        with pytest.raises(ExplainError, match=message):
            evaluate(heat, replay, curve=CurveRule(**options))  # type: ignore[arg-type]


def test_equal_ends_take_two_pictures() -> None:
    found = run(ByCount(np.full(257, 0.5)), sampling="adaptive")
    assert found.images == 2 and found.error_bound == (0, 0)
