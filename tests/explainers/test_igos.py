"""iGOS++: each term against hand-computed values and finite differences, then the whole on an analytic replay."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_replay import ToyReplay, box_weights

import lvlm_probe as probe
from lvlm_probe import explainers
from lvlm_probe.errors import ExplainError, SelectionError
from lvlm_probe.explainers import Outcome, Problem, registry
from lvlm_probe.explainers.curve_points import QUICK_PASSES
from lvlm_probe.explainers.igos.descent import PRESETS, IgosSettings, Optimisation, nesterov, path_masks
from lvlm_probe.explainers.igos.regularizers import bilateral_weights, btv, gnc, guide, l1, tv
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.metrics import pointing_game
from lvlm_probe.selection import select_tokens


def explain(replay: ToyReplay, *, method: str = "igos++", **settings: object) -> Heatmap:
    """These tests are about the mask; what its order is refined to is in test_order.py."""
    return explainers.explain(replay, method=method, **({"preset": "paper"} if method == "igos++" else {}) | settings)


def finite_difference(
    function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, step: float = 1e-6
) -> torch.Tensor:
    gradient = torch.zeros_like(at)
    for index in range(at.numel()):
        shift = torch.zeros_like(at).reshape(-1)
        shift[index] = step
        shift = shift.reshape(at.shape)
        gradient.view(-1)[index] = (function(at + shift) - function(at - shift)) / (2 * step)
    return gradient


def gradient_of(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    leaf = at.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    return gradient


MASK = torch.tensor([[1.0, 0.5, 0.25], [0.75, 0.0, 1.0]], dtype=torch.float64)


# ---------------------------------------------------------------- terms


def test_l1_is_the_mean_removed() -> None:
    # |1 − M| sums to 0 + .5 + .75 + .25 + 1 + 0 = 2.5 over 6 cells
    assert float(l1(MASK)) == pytest.approx(2.5 / 6)
    inner = MASK * 0.5 + 0.1
    assert torch.allclose(gradient_of(l1, inner), torch.full_like(inner, -1 / 6))


@pytest.mark.parametrize(
    ("form", "iteration", "value"),
    [
        # Σ (1 − M)² = .25 + .5625 + .0625 + 1 = 1.875
        ("sum_sq", 0, 1.875),
        ("sum_sq", 3, 1.875 * math.exp(-0.6)),
        ("norm", 0, math.sqrt(1.875)),
        ("norm", 2, math.sqrt(1.875) * math.exp(-0.4)),
    ],
)
def test_gnc_by_hand(form: str, iteration: int, value: float) -> None:
    assert float(gnc(MASK, iteration=iteration, gamma=0.2, form=form)) == pytest.approx(value, rel=1e-12)


def test_gnc_gradient_of_a_cell_is_two_times_what_is_removed() -> None:
    gradient = gradient_of(lambda mask: gnc(mask, iteration=0, gamma=1.0), MASK)
    assert torch.allclose(gradient, -2 * (1 - MASK))
    at_one = gradient_of(lambda mask: gnc(mask, iteration=0, gamma=1.0, form="norm"), torch.ones_like(MASK))
    assert torch.equal(at_one, torch.zeros_like(MASK))


def test_total_variation_by_hand() -> None:
    # vertical: (.75−1)², (0−.5)², (1−.25)² = .0625, .25, .5625, mean of 3; horizontal: .25, .0625, .5625, 1, mean of 4
    assert float(tv(MASK)) == pytest.approx(0.875 / 3 + 1.875 / 4)
    assert float(tv(MASK, beta=1.0)) == pytest.approx((0.25 + 0.5 + 0.75) / 3 + (0.5 + 0.25 + 0.75 + 1.0) / 4)
    assert float(tv(torch.ones(1, 1))) == 0.0
    assert float(tv(torch.tensor([[0.0, 1.0]]))) == 1.0


def test_bilateral_weights_by_hand() -> None:
    picture = torch.zeros(3, 2, 2, dtype=torch.float64)
    picture[:, 1, 0] = torch.tensor([0.1, 0.0, -0.1])  # vertical step in column 0, and horizontal one in row 1
    down, right = bilateral_weights(picture, sigma=0.01)
    expected = math.exp(-((0.01 + 0.0 + 0.01) / 3) / 0.01)
    assert float(down[0, 0]) == pytest.approx(expected)
    assert float(right[1, 0]) == pytest.approx(expected)
    assert float(down[0, 1]) == 1.0
    release_down, release_right = bilateral_weights(picture, sigma=0.01, form="igos_release")
    # Vertically the channel differences are averaged before squaring: +.1 and −.1 cancel; horizontally each counts.
    assert float(release_down[0, 0]) == pytest.approx(1.0)
    assert float(release_right[1, 0]) == pytest.approx((1 + 2 * math.exp(-1.0)) / 3)


def test_symmetric_weights_commute_with_transposing_the_picture() -> None:
    picture = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.2
    down, right = bilateral_weights(picture)
    turned_down, turned_right = bilateral_weights(picture.transpose(1, 2))
    assert torch.allclose(turned_down, right.T)
    assert torch.allclose(turned_right, down.T)
    skewed, _ = bilateral_weights(picture.transpose(1, 2), form="igos_release")
    _, straight = bilateral_weights(picture, form="igos_release")
    assert not torch.allclose(skewed, straight.T)


def test_btv_by_hand() -> None:
    # At the guide's own size U = M, so the four means are those of test_total_variation, weighted.
    vertical = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)
    horizontal = torch.tensor([[1.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    weighted = (0.0625 + 0.125 + 0) / 3 + (0.25 + 0.0625 + 0 + 0.5) / 4
    assert float(btv(MASK, (vertical, horizontal))) == pytest.approx(0.5 * (0.875 / 3 + 1.875 / 4 + weighted))
    assert float(btv(MASK)) == pytest.approx(0.5 * float(tv(MASK)))
    assert float(btv(torch.ones(4, 4), (torch.ones(7, 8), torch.ones(8, 7)))) == 0.0


@pytest.mark.parametrize("form", ["symmetric", "igos_release"])
def test_gradients_equal_finite_differences(form: str) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(4, 5, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    picture = torch.rand(3, 12, 10, generator=generator, dtype=torch.float64) * 0.3
    weights = bilateral_weights(picture, form=form)
    for function in (
        l1,
        tv,
        lambda m: btv(m, weights),
        lambda m: gnc(m, iteration=2, gamma=0.3),
        lambda m: gnc(m, iteration=2, gamma=0.3, form="norm"),
    ):
        assert torch.allclose(gradient_of(function, mask), finite_difference(function, mask), atol=1e-7)


def test_a_border_along_an_edge_of_the_picture_costs_less() -> None:
    picture = Image.new("RGB", (64, 64), (20, 20, 20))
    picture.paste((240, 240, 240), (32, 0, 64, 64))
    weights = bilateral_weights(guide(picture, size=64))
    on_edge, off_edge = torch.ones(8, 8), torch.ones(8, 8)
    on_edge[:, 4:] = 0
    off_edge[:, 2:] = 0
    assert float(btv(on_edge, weights)) < float(btv(off_edge, weights))
    assert float(btv(on_edge)) == pytest.approx(float(btv(off_edge)))


def test_guide_is_normalised_as_published_for_clip() -> None:
    values = guide(Image.new("RGB", (50, 20), (255, 0, 128)), size=8)
    assert values.shape == (3, 8, 8)
    assert values[:, 3, 3].tolist() == pytest.approx(
        [(1 - 0.48145466) / 0.26862954, (0 - 0.4578275) / 0.26130258, (128 / 255 - 0.40821073) / 0.27577711], abs=1e-5
    )


# ---------------------------------------------------------------- path and step


def test_masks_of_one_iteration() -> None:
    state = torch.tensor([[[1.0, 0.5]]])
    masks, signs = path_masks(state, 2)
    assert masks.tolist() == [[[0.5, 0.25]], [[1.0, 0.5]], [[0.5, 0.75]], [[0.0, 0.5]]]
    assert signs.tolist() == [1, 1, -1, -1]
    two = torch.tensor([[[0.8]], [[0.5]]])  # Mx, My; M = 0.4
    masks, signs = path_masks(two, 1)
    assert masks.flatten().tolist() == pytest.approx([0.8, 0.4, 0.5, 0.6])
    assert signs.tolist() == [1, 1, -1, -1]


def test_nesterov_by_hand() -> None:
    start, gradient = torch.tensor([0.9, 0.5]), torch.tensor([0.1, -1.0])
    first, point = nesterov(start, gradient, start, rate=0.4, iteration=0, momentum=5)
    assert point.tolist() == pytest.approx([0.86, 0.9])
    assert torch.equal(first, point)  # no weight at iteration 0
    second, after = nesterov(first, gradient, point, rate=0.4, iteration=1, momentum=5)
    # point = [.82, 1.3]; e = 1/6; .82 + (.82−.86)/6 and 1.3 + .4/6, clamped; the point itself stays unclamped
    assert after.tolist() == pytest.approx([0.82, 1.3])
    assert second.tolist() == pytest.approx([0.82 - 0.04 / 6, 1.0])


def _problem(replay: ToyReplay, seed: int = 0) -> Problem:
    return Problem(replay, select_tokens(replay), 0, seed)


def _optimisation(replay: ToyReplay, **settings: object) -> Optimisation:
    return Optimisation(_problem(replay), IgosSettings(**settings), "test")


@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_gradient_of_the_whole_objective_equals_finite_differences(masks: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(2, 3, 4, generator=generator)
    weights /= weights.sum(dim=(1, 2), keepdim=True)
    replay = ToyReplay(weights, original=[0.9, 0.8], base=[0.05, 0.02])
    run = _optimisation(replay, masks=masks, size=(3, 4), ig_steps=3, noise=noise, l2=0.3, l3=2.0)
    state = torch.rand(masks, 3, 4, generator=generator) * 0.8 + 0.1
    record, from_scores, from_mask = run.gradient(state, 2)
    numeric = torch.zeros_like(state)
    for index in range(state.numel()):
        shift = torch.zeros_like(state).view(-1)
        shift[index] = 1e-2
        shift = shift.view_as(state)
        numeric.view(-1)[index] = (run.objective(state + shift, 2) - run.objective(state - shift, 2)) / 2e-2
    assert torch.allclose(from_scores + from_mask, numeric, rtol=0.02, atol=2e-3)
    assert record["objective"] == pytest.approx(run.objective(state, 2), abs=1e-4)


def test_objective_is_equation_8_by_hand() -> None:
    # One token, one cell, P(m) = .02 + .88 m, mask .5, n = 2:
    # deletion masks .25, .5; insertion masks .75, .5; λ1 · .5 + λ2 e^(−γ) · .25; one cell has no BTV.
    replay = ToyReplay(torch.ones(1, 1), original=[0.9], base=[0.02])
    run = _optimisation(replay, size=1, ig_steps=2, noise=0.0, l1=1.0, l2=0.1, gamma=1.0, l3=10.0)

    def f(m: float) -> float:
        return math.log(0.02 + 0.88 * m)

    expected = (f(0.25) + f(0.5)) / 2 - (f(0.75) + f(0.5)) / 2 + 0.5 + 0.1 * math.exp(-1) * 0.25
    assert run.objective(torch.tensor([[[0.5]]]), 1) == pytest.approx(expected, abs=1e-5)


def test_two_mask_objective_is_equation_4_by_hand() -> None:
    replay = ToyReplay(torch.ones(1, 1), original=[0.9], base=[0.02])
    run = _optimisation(replay, masks=2, size=1, ig_steps=1, noise=0.0, l1=1.0)

    def f(m: float) -> float:
        return math.log(0.02 + 0.88 * m)

    mx, my = 0.8, 0.5
    expected = f(mx) - f(1 - my) + f(mx * my) - f(1 - mx * my) + (1 - mx * my)
    assert run.objective(torch.tensor([[[mx]], [[my]]]), 0) == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------- the method


BOX = box_weights(16, slice(3, 6), slice(9, 13))


@pytest.mark.parametrize("settings", [{}, {"masks": 2}, {"line_search": True}])
def test_finds_the_cells_that_carry_the_answer(settings: dict[str, object]) -> None:
    heat = explain(ToyReplay(BOX), **settings)
    assert heat.values is not None
    inside = BOX.numpy() > 0
    assert heat.values.dtype == np.float32
    assert heat.values.min() >= 0
    assert heat.values.max() <= 1
    assert heat.values[inside].min() > heat.values[~inside].max()
    assert set(np.argsort(-heat.values.ravel())[: inside.sum()]) == set(np.flatnonzero(inside))


def test_first_step_is_lr_whatever_the_scale_of_the_scores() -> None:
    settings = {"iterations": 1, "noise": 0.0, "tie_break": 0.0, "lr": 0.25}
    plain = explain(ToyReplay(BOX), **settings)
    loud = explain(ToyReplay(BOX, gain=50.0), **settings)
    assert plain.values.max() == pytest.approx(0.25, abs=1e-6)
    assert np.allclose(plain.values, loud.values, atol=1e-5)
    saturated = explain(ToyReplay(BOX, gain=50.0), **settings | {"step": "absolute", "lr": 10.0})
    assert saturated.values.max() == 1.0


def test_tie_break_orders_equal_cells_by_the_summed_gradient_and_stays_small() -> None:
    weights = torch.linspace(1, 2, 64, dtype=torch.float64).reshape(8, 8)
    replay = ToyReplay(weights / weights.sum(), gain=40.0)
    clamped = explain(replay, size=8, step="absolute", lr=10.0, noise=0.0, l3=0.0, tie_break=0.0)
    assert (clamped.values == 1.0).all()
    ordered = explain(replay, size=8, step="absolute", lr=10.0, noise=0.0, l3=0.0)
    assert np.abs(ordered.values - clamped.values).max() <= 1e-3 + 1e-6
    assert ordered.values.max() <= 1.0
    assert (np.diff(ordered.values.ravel()) > 0).all()


def test_seed_decides_and_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = explain(ToyReplay(BOX), seed=1, noise=2.0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    assert np.array_equal(first.values, explain(ToyReplay(BOX), seed=1, noise=2.0).values)
    assert not np.array_equal(first.values, explain(ToyReplay(BOX), seed=2, noise=2.0).values)


def test_stratified_paths_are_unbiased_and_the_grid_is_the_end_of_every_part() -> None:
    state = torch.rand(1, 3, 4, generator=torch.Generator().manual_seed(0))
    grid, signs = path_masks(state, 4)
    ends, _ = path_masks(state, 4, torch.zeros(2, 4))
    assert torch.equal(grid, ends)
    # f(m) = Σ m²: ∫ f(r M) dr = Σ M² / 3, whatever n is, in the mean over u.
    generator = torch.Generator().manual_seed(1)
    found = [
        path_masks(state, 2, torch.rand(2, 2, generator=generator))[0][signs[:2].repeat_interleave(2)[:4] > 0]
        for _ in range(4000)
    ]
    means = torch.stack([masks[:2].square().sum(dim=(1, 2)).mean() for masks in found])
    assert float(means.mean()) == pytest.approx(float(state.square().sum() / 3), rel=0.02)
    for index in range(2):
        drawn = torch.stack([masks[index] for masks in found[:200]]) / state
        assert index / 2 <= float(drawn.min())
        assert float(drawn.max()) <= (index + 1) / 2 + 1e-6


def test_two_masks_draw_their_own_places_on_the_path() -> None:
    state = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    offsets = torch.tensor([[0.1], [0.2], [0.3], [0.4]])
    masks, signs = path_masks(state, 1, offsets)
    both = state[0] * state[1]
    expected = torch.stack([0.9 * state[0], 0.8 * both, 1 - 0.7 * state[1], 1 - 0.6 * both])
    assert torch.allclose(masks, expected)
    assert signs.tolist() == [1, 1, -1, -1]


def test_presets_and_their_passes() -> None:
    # The default takes a second round: no map of a box of twelve cells has what is enough, as they count alike.
    for preset, passes in (("default", 48), ("fast", 24), ("thorough", 196), ("paper", 100), ("release", 100)):
        replay = ToyReplay(BOX)
        heat = explain(replay, preset=preset)
        assert replay.passes.backward == passes, preset
        assert heat.params["preset"] == preset
    assert PRESETS["thorough"] == IgosSettings()
    assert dataclasses.replace(PRESETS["thorough"], refine=0) == PRESETS["paper"]


@pytest.mark.quick
def test_the_default_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    first, second, other = (explain(ToyReplay(BOX), preset="default", seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first.values, second.values)
    assert first.history == second.history
    assert first.history != other.history  # on this toy the order comes out the same, the scores on the way do not


def test_release_preset_is_the_published_arithmetic() -> None:
    settings = PRESETS["release"]
    assert (settings.lr, settings.step, settings.iterations, settings.ig_steps) == (10.0, "absolute", 5, 10)
    assert (settings.noise, settings.size, settings.momentum, settings.gamma) == (0.2, 32, 5.0, 1.0)
    assert (settings.l1, settings.gnc_weight, settings.l3, settings.l2_form) == (1.0, 0.1, 10.0, "sum_sq")
    assert (settings.btv_form, settings.beta, settings.sigma) == ("igos_release", 2.0, 0.01)
    assert (settings.masks, settings.init, settings.tie_break, settings.line_search) == (1, 1.0, 0.0, False)
    # The recipe itself, written out once more on a problem small enough to do by hand: one cell, no noise.
    replay = ToyReplay(torch.ones(1, 1), original=[0.9], base=[0.02])
    heat = explain(replay, preset="release", size=1, noise=0.0, iterations=3, lr=0.01)
    mask, previous = 1.0, 1.0
    for i in range(3):
        slope = 0.0
        for step in range(1, 11):
            r = step / 10
            slope += r * 0.88 / (0.02 + 0.88 * r * mask) / 10 + r * 0.88 / (0.02 + 0.88 * (1 - r * mask)) / 10
        # |1 − M| has no slope at M = 1; (1 − M)² pulls back towards 1, ever less.
        slope -= 1.0 if mask < 1 else 0.0
        slope -= 0.1 * math.exp(-1.0 * i) * 2 * (1 - mask)
        point = mask - 0.01 * slope
        mask = min(1.0, max(0.0, point + i / (i + 5) * (point - previous)))
        previous = point
    assert float(heat.values[0, 0]) == pytest.approx(1 - mask, abs=1e-5)
    assert 0.05 < 1 - mask < 0.95


def test_line_search_never_climbs() -> None:
    replay = ToyReplay(BOX, gain=5.0)
    stiff = {"l2": 0.0, "l3": 3000.0, "noise": 0.1, "iterations": 6}
    plain = explain(replay, **stiff).history
    assert any(after["objective"] > before["objective"] for before, after in pairwise(plain))
    heat = explain(replay, line_search=True, **stiff)
    unsearched = plain[0]["rate"]
    assert min(record["rate"] for record in heat.history) < unsearched  # it did have to shorten steps
    run = _optimisation(replay, line_search=True, noise=0.0, l2=0.0, l3=3000.0)
    state = torch.ones(1, 16, 16)
    previous, rate = state, 3.0
    for iteration in range(5):
        record, scores, penalty = run.gradient(state, iteration)
        after, previous, _ = run.move(state, scores + penalty, previous, rate, iteration, record["objective"])
        assert run.objective(after, iteration) <= record["objective"] + 1e-6
        state = after


def test_history_passes_and_progress_are_exact() -> None:
    replay = ToyReplay(BOX)
    seen: list[tuple[int, int]] = []
    heat = explain(replay, iterations=3, ig_steps=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert len(heat.history) == 3
    assert heat.provenance["passes"] == {"forward": 3 * 8, "backward": 3 * 8}
    objective = [record["objective"] for record in heat.history]
    assert objective[-1] < objective[0]
    assert heat.history[0]["l1"] == heat.history[0]["l2"] == heat.history[0]["btv"] == 0.0
    assert heat.provenance["baseline"]["verified"] is True
    assert heat.provenance["trace_id"] == "toy"
    assert heat.params["l2"] == 0.1
    assert heat.params["size"] == [16, 16]


def test_interrupt_passes_through() -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explain(ToyReplay(BOX), progress=interrupt)


def test_cells_out_of_sight_are_zero_and_marked() -> None:
    seen = torch.ones(64, 64, dtype=torch.bool)
    seen[:, :16] = False
    heat = explain(ToyReplay(BOX, seen=seen))
    assert not heat.seen[:, :4].any()
    assert heat.seen[:, 4:].all()
    assert (heat.values[:, :4] == 0).all()
    blind = explain(ToyReplay(BOX, seen=torch.zeros(64, 64, dtype=torch.bool)))
    assert blind.values is None
    assert "sees no part" in str(blind.reason)


def test_grid_follows_the_picture() -> None:
    heat = explain(ToyReplay(BOX, size=(400, 100)), iterations=1)
    assert heat.shape == (8, 32)
    assert explain(ToyReplay(BOX, size=(400, 100)), iterations=1, size=7).shape == (7, 7)
    assert explain(ToyReplay(BOX), iterations=1, size=(3, 9)).shape == (3, 9)
    for bad in (0, (3, 0), (1, 2, 3), 2.5):
        with pytest.raises(ExplainError, match="size is a number of cells"):
            explain(ToyReplay(BOX), iterations=1, size=bad)


def test_nothing_selected_is_a_result() -> None:
    replay = ToyReplay(BOX, original=[0.5], base=[0.4])
    heat = explain(replay)
    assert heat.values is None
    assert "no token gains more than 1 nats" in str(heat.reason)
    assert replay.passes.forward == replay.passes.backward == 0


def test_a_picture_without_a_say_is_a_result() -> None:
    heat = explain(ToyReplay(BOX, original=[0.5], base=[0.5]), tokens=(0, 1))
    assert heat.values is None
    assert "does not change with the image" in str(heat.reason)


def test_not_a_number_is_refused_with_a_way_out() -> None:
    class Broken(ToyReplay):
        def score_and_grad(self, mask, score, **options):  # type: ignore[no-untyped-def]
            scores, gradient = super().score_and_grad(mask, score, **options)
            return scores, gradient * float("nan")

    with pytest.raises(ExplainError, match=r"not finite in iteration 0 on toy: load the model in float32"):
        explain(Broken(BOX))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "quick"}, "no preset 'quick'.*'default', 'fast', 'thorough', 'paper', 'release'"),
        ({"lambda1": 2.0}, "takes no parameter 'lambda1'.*'l1'"),
        ({"iterations": 0}, "iterations is at least 1; got iterations=0"),
        ({"budget": 2.5}, "budget is a whole number; got budget=2.5"),
        ({"budget": True}, "budget is a whole number; got budget=True"),
        ({"budget": np.float64(40)}, "budget is a whole number"),
        ({"iterations": 1.5}, "iterations is a whole number; got iterations=1.5"),
        ({"refine_levels": 2.0}, "refine_levels is a whole number"),
        ({"masks": 3}, "masks is 1"),
        ({"lr": -1.0}, "lr is positive"),
        ({"init": 0.0}, "init is in"),
        ({"method": "igos"}, r"no explainer 'igos'.*closest first.*'igos\+\+'"),
        ({"image": 1}, "image=1, but the prompt has 1 image"),
        ({"tokens": 3.5}, "tokens is a word"),
    ],
)
def test_refusals(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ExplainError, match=message):
        explain(ToyReplay(BOX), **settings)


def test_tokens_in_all_their_forms() -> None:
    weights = torch.stack([BOX, BOX.T, BOX])
    replay = ToyReplay(weights, original=[0.9] * 3, base=[0.01] * 3, tokens=["red", " cat", "."])
    fast = {"iterations": 1, "ig_steps": 2}
    assert explain(replay, tokens="cat", **fast).selection.indices == (1,)
    assert explain(replay, tokens=["red", "cat"], **fast).selection.indices == (0, 1)
    assert explain(replay, tokens=(1, 3), **fast).selection.indices == (1, 2)
    chosen = select_tokens(replay, words="red")
    assert explain(replay, tokens=chosen, **fast).selection is chosen
    with pytest.raises(SelectionError, match="'dog' is not in the answer"):
        explain(replay, tokens="dog")
    other = ToyReplay(BOX, tokens=["blue"])
    with pytest.raises(ExplainError, match="another answer"):
        explain(other, tokens=chosen)


def test_a_method_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))

    @explainers.register("corner")
    def corner(problem: Problem, *, value: float = 1.0) -> Outcome:
        values = torch.zeros(problem.grid(4))
        values[0, 0] = value
        return Outcome(values, {"value": value})

    heat = explain(ToyReplay(BOX), method="corner", value=0.5)
    assert isinstance(heat, Heatmap)
    assert heat.values[0, 0] == 0.5
    assert heat.params == {"value": 0.5}
    assert {"corner", "igos++"} <= set(explainers.methods())
    with pytest.raises(ExplainError, match="takes no parameter 'size'"):
        explain(ToyReplay(BOX), method="corner", size=3)
    with pytest.raises(ExplainError, match="outside"):
        explain(ToyReplay(BOX), method="corner", value=2.0)
    with pytest.raises(ExplainError, match="is taken"):
        explainers.register("igos++")(corner)


# ---------------------------------------------------------------- on a trained model


def test_marks_the_object_that_decides_a_word(demo: tuple[object, object], tmp_path: Path) -> None:
    model, processor = demo
    (scene,) = probe.demo.scenes(1, split="tune", kinds=["colour"])
    attached = probe.attach(model, processor)
    try:
        inputs = processor.apply_chat_template(
            scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with attached.record(tmp_path, images=[scene.image]):
            model.generate(**inputs, max_new_tokens=16)
    finally:
        attached.detach()
    replay = probe.replay(probe.open_store(tmp_path)[-1], model, processor)
    heat = probe.explain(replay)
    score = probe.evaluate(heat, replay)
    assert pointing_game(heat, scene.mask) == 1.0
    assert score.gain > 0.6
    assert score.verdict.trusted, score.verdict
    assert probe.explain(replay).provenance["passes"] == {"forward": 24 + QUICK_PASSES, "backward": 24}
    assert heat.save(tmp_path / "heat.png").stat().st_size > 1000
    again = probe.Heatmap.read(heat.write(tmp_path / "explanations.h5"))
    assert again.trace.trace_id == heat.trace.trace_id  # found beside the file
    assert again.overlay().tobytes() == heat.overlay().tobytes()
