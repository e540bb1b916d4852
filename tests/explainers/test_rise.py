"""RISE on scorers that are linear in the mask, whose expectation is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_replay import ToyReplay, box_weights

from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers import explain
from lvlm_probe.explainers.rise import RandomMasks, estimate

P, KNOTS, SHAPE = 0.4, (3, 4), (6, 8)


def spline(distance: np.ndarray) -> np.ndarray:
    """The cubic B-spline: what the product of two tents averages to over all shifts of the knots."""
    d = np.abs(distance)
    return np.where(d < 1, 2 / 3 - d**2 + d**3 / 2, np.where(d < 2, (2 - d) ** 3 / 6, 0.0))


def expectation_of_products() -> np.ndarray:
    """E[m(c) m(c′)] = p² + p (1 − p) B(Δrow) B(Δcol), Δ in knots; ``(cell, cell)``."""
    row, col = ((np.arange(cells) + 0.5) / cells * knots for cells, knots in zip(SHAPE, KNOTS, strict=True))
    rows, cols = (a.ravel() for a in np.meshgrid(row, col, indexing="ij"))
    near = spline(rows[:, None] - rows) * spline(cols[:, None] - cols)
    return P**2 + P * (1 - P) * near


def weights() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    drawn = torch.rand(SHAPE, generator=generator, dtype=torch.float64) ** 3
    return drawn / drawn.sum()


def draw(number: int, seed: int) -> torch.Tensor:
    return RandomMasks(number, KNOTS, P, torch.Generator().manual_seed(seed)).masks(slice(0, number), SHAPE)


def test_masks_have_the_moments_of_the_closed_form() -> None:
    masks = draw(40_000, 0).double().flatten(1)
    assert float(masks.min()) >= 0
    assert float(masks.max()) <= 1
    assert float((masks.mean(dim=0) - P).abs().max()) < 0.012
    second = (masks.T @ masks / len(masks)).numpy()
    assert np.abs(second - expectation_of_products()).max() < 0.012
    assert np.ptp(second) > 0.1  # there is something to get wrong


@pytest.mark.parametrize("centred", [False, True])
def test_is_unbiased_on_a_linear_scorer_and_its_error_bar_is_honest(centred: bool) -> None:
    base, gain, w = 0.2, 0.7, weights()
    products = torch.from_numpy(expectation_of_products())
    expected = base + gain * (products @ w.ravel()) / P  # E[f m] / p, E m = p
    if centred:
        expected = expected - (base + gain * P)  # minus E f
    found, errors = [], []
    for seed in range(60):
        masks = draw(150, 100 + seed)
        f = base + gain * (masks.double() * w).sum(dim=(1, 2))
        parts = [slice(0, 100), slice(100, 150)]
        value, error = estimate(f, lambda part, masks=masks: masks[part], parts, P, centred=centred)
        found.append(value.ravel())
        errors.append(error.ravel())
    values = torch.stack(found)
    spread = values.std(dim=0)
    z = (values.mean(dim=0) - expected) / (spread / len(found) ** 0.5)
    assert float(z.abs().max()) < 4.0
    ratio = torch.stack(errors).mean(dim=0) / spread
    assert 0.7 < float(ratio.min()) <= float(ratio.max()) < 1.4
    assert float(ratio.mean()) == pytest.approx(1.0, abs=0.12)


def test_taking_the_mean_off_changes_no_order_in_expectation_and_narrows_the_error() -> None:
    masks = draw(2000, 5)
    f = 0.5 + 0.3 * (masks.double() * weights()).sum(dim=(1, 2))
    parts = [slice(0, 2000)]
    plain, wide = estimate(f, lambda part: masks[part], parts, P, centred=False)
    centred, narrow = estimate(f, lambda part: masks[part], parts, P, centred=True)
    assert float(narrow.mean()) < 0.2 * float(wide.mean())
    # By hand: the published sum, and the sum around the mean score.
    assert torch.allclose(plain, (f[:, None, None] * masks.double()).sum(0) / (2000 * P))
    assert torch.allclose(centred, ((f - f.mean())[:, None, None] * masks.double()).sum(0) / (1999 * P), atol=1e-9)


def test_finds_the_box_and_reports_its_error() -> None:
    box = box_weights(8, slice(1, 3), slice(4, 7))
    replay = ToyReplay(box)
    before = torch.random.get_rng_state()
    heat = explain(replay, method="rise", size=8, masks=600, score="prob", batch=250, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert heat.provenance["passes"] == {"forward": 600, "backward": 0}
    inside = box.numpy() > 0
    assert set(np.argsort(-heat.values.ravel())[: inside.sum()]) == set(np.flatnonzero(inside))
    found = heat.provenance["diagnostics"]
    assert 0 < found["standard_error_mean"] < found["standard_error_max"] < 0.3
    more = explain(replay, method="rise", size=8, masks=2400, score="prob", seed=1).provenance["diagnostics"]
    assert more["standard_error_mean"] == pytest.approx(found["standard_error_mean"] / 2, rel=0.2)


def test_same_seed_same_map_whatever_the_batches() -> None:
    replay = ToyReplay(box_weights(8, slice(1, 3), slice(4, 7)))
    first = explain(replay, method="rise", masks=100, seed=3)
    torch.rand(5)
    again = explain(replay, method="rise", masks=100, seed=3, batch=7)
    assert np.allclose(first.values, again.values, atol=1e-6)
    assert first.shape == (32, 32)
    assert not np.allclose(first.values, explain(replay, method="rise", masks=100, seed=4).values, atol=1e-2)


def test_scores_and_progress() -> None:
    box = torch.stack([box_weights(8, slice(1, 3), slice(4, 7)), box_weights(8, slice(5, 7), slice(0, 2))])
    replay = ToyReplay(box, original=[0.9, 0.8], base=[0.01, 0.02])
    told: list[tuple[int, int]] = []
    options = {"masks": 300, "size": 8}
    means = {}
    for score in ("prob", "geometric", "log"):
        heat = explain(replay, method="rise", score=score, progress=lambda a, b: told.append((a, b)), **options)
        means[score] = heat.provenance["diagnostics"]["mean_score"]
    assert told[:6] == [(0, 300), (64, 300), (128, 300), (192, 300), (256, 300), (300, 300)]
    assert means["log"] < 0 < means["geometric"] < means["prob"] < 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"masks": 1}, "masks is a whole number of at least 2"),
        ({"p": 1.0}, "p is between 0 and 1"),
        ({"score": "logit"}, "score is 'log', 'prob' or 'geometric'"),
        ({"batch": 0}, "batch is"),
        ({"cells": 0}, "number of cells"),
    ],
)
def test_refusals(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ExplainError, match=message):
        explain(ToyReplay(box_weights(4, slice(0, 1), slice(0, 1))), method="rise", **wrong)


@pytest.mark.quick
def test_nothing_to_show_is_a_reason() -> None:
    box = box_weights(4, slice(0, 1), slice(0, 1))
    flat = explain(ToyReplay(torch.zeros(4, 4)), method="rise", tokens=(0, 1), masks=10)
    assert "do no better" in str(flat.reason)
    blind = explain(ToyReplay(box, seen=torch.zeros(64, 64, dtype=torch.bool)), method="rise", masks=10)
    assert "sees no part" in str(blind.reason)
