"""Agreement with human attention maps: against hand-computed values, brute force and scipy."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_probe.errors import ExplainError
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.metrics import HumanAgreement, auc_judd, human_agreement, mean_and_error, nss, rank_correlation


def judd_by_hand(values: np.ndarray, looked_at: np.ndarray) -> float:
    """The definition, one threshold after the other."""
    points = [(0.0, 0.0)]
    for threshold in sorted(set(values[looked_at].tolist()), reverse=True):
        above = values >= threshold
        points.append(((above & ~looked_at).sum() / (~looked_at).sum(), (above & looked_at).sum() / looked_at.sum()))
    points.append((1.0, 1.0))
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(points))


def test_auc_judd_by_hand() -> None:
    values = np.array([[0.9, 0.8], [0.4, 0.1]])
    both = np.array([[True, False], [True, False]])
    # Thresholds 0.9 and 0.4: points (0, ½), (½, 1), (1, 1); area ½ · ¾ + ½ · 1.
    assert auc_judd(values, both) == pytest.approx(7 / 8)
    assert auc_judd(values, np.array([[True, False], [False, False]])) == 1.0
    assert auc_judd(values, np.array([[False, False], [False, True]])) == pytest.approx(0.5)
    assert auc_judd(np.full((2, 2), 0.3), both) == pytest.approx(0.5)
    assert np.isnan(auc_judd(values, np.zeros((2, 2), dtype=bool)))
    assert np.isnan(auc_judd(values, np.ones((2, 2), dtype=bool)))


@settings(max_examples=50)
@given(st.integers(0, 2**31 - 1), st.integers(2, 12))
def test_auc_judd_is_its_definition(seed: int, levels: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.integers(0, levels, (6, 5)) / levels
    looked_at = generator.random((6, 5)) < 0.3
    looked_at[0, 0], looked_at[0, 1] = True, False
    assert auc_judd(values, looked_at) == pytest.approx(judd_by_hand(values, looked_at))


def test_auc_judd_is_close_to_the_area_under_the_whole_curve() -> None:
    from scipy.stats import mannwhitneyu

    generator = np.random.default_rng(0)
    values, looked_at = generator.random((40, 40)), generator.random((40, 40)) < 0.2
    values[looked_at] += 0.3
    stored = np.float32(values / values.max())
    whole = mannwhitneyu(stored[looked_at], stored[~looked_at]).statistic / looked_at.sum() / (~looked_at).sum()
    # Straight lines between fixated pixels cut off at most half a step of the hit rate.
    assert 0 <= auc_judd(values, looked_at) - whole < 0.5 / looked_at.sum()
    assert whole > 0.7


def test_nss_by_hand() -> None:
    values = np.array([[1.0, 0.0], [0.0, 0.0]])
    # Mean ¼, standard deviation √3/4.
    assert nss(values, np.array([[True, False], [False, False]])) == pytest.approx(np.sqrt(3))
    assert nss(values, np.array([[True, True], [True, True]])) == pytest.approx(0.0)
    assert nss(values, np.array([[False, True], [False, False]])) == pytest.approx(-1 / np.sqrt(3))
    assert np.isnan(nss(np.ones((2, 2)), np.eye(2, dtype=bool)))
    assert np.isnan(nss(values, np.zeros((2, 2), dtype=bool)))


def test_rank_correlation_is_spearmans_on_the_common_grid() -> None:
    from scipy.stats import spearmanr

    generator = np.random.default_rng(1)
    heat, human = generator.random((28, 28)), generator.random((42, 42))
    pooled = [heat.reshape(14, 2, 14, 2).mean(axis=(1, 3)), human.reshape(14, 3, 14, 3).mean(axis=(1, 3))]
    expected = spearmanr(pooled[0].ravel(), pooled[1].ravel()).statistic
    assert rank_correlation(heat, human) == pytest.approx(expected, abs=1e-6)
    assert rank_correlation(heat, human, grid=(7, 14)) != pytest.approx(expected, abs=1e-3)
    ties = np.round(heat, 1)
    assert rank_correlation(ties, human, grid=28) == pytest.approx(
        spearmanr(
            np.float32(ties).ravel(),
            human_on(28, human).ravel(),
        ).statistic,
        abs=1e-4,
    )
    assert np.isnan(rank_correlation(np.full((14, 14), 0.5), human))


def human_on(cells: int, human: np.ndarray) -> np.ndarray:
    import torch

    grid = torch.from_numpy(np.float32(human / human.max()))[None, None]
    return torch.nn.functional.adaptive_avg_pool2d(grid, cells)[0, 0].numpy()


def test_inverted_masks_turn_the_sign() -> None:
    """Why a raw mask (low = important) must not be compared: the paper's ρ = −0.20 may be +0.20."""
    generator = np.random.default_rng(2)
    human = generator.random((14, 14))
    heat = 0.3 * human + 0.7 * generator.random((14, 14))
    straight = rank_correlation(heat, human)
    assert straight > 0.2
    assert rank_correlation(1 - heat, human) == pytest.approx(-straight, abs=0.01)


def test_all_four_at_once_on_maps_of_any_resolution_and_scale() -> None:
    rows, cols = np.mgrid[0:30, 0:40]
    human = 255.0 * np.exp(-((rows - 8) ** 2 + (cols - 30) ** 2) / 40)
    there = Heatmap(
        np.exp(-((np.mgrid[0:15, 0:20][0] - 4) ** 2 + (np.mgrid[0:15, 0:20][1] - 15) ** 2) / 10), (400, 300)
    )
    elsewhere = Heatmap(there.values[::-1, ::-1], (400, 300))
    good, bad = human_agreement(there, human), human_agreement(elsewhere, human)
    assert good.soft_iou > 0.85 > 0.1 > bad.soft_iou
    assert good.rank_correlation > 0.95 > 0 > bad.rank_correlation
    assert good.auc_judd > 0.95 > 0.3 > bad.auc_judd
    assert good.nss > 1 > 0 > bad.nss
    assert good.fixated == pytest.approx(0.2, abs=0.01)
    scaled = human_agreement(there, human / 1000)
    assert dataclasses.astuple(scaled)[:4] == pytest.approx(dataclasses.astuple(good)[:4], rel=1e-4)
    record = json.loads(json.dumps(good.to_dict(), allow_nan=False))
    assert record["grid"] == [14, 14]
    assert set(record) == set(HumanAgreement.__dataclass_fields__)


def test_soft_iou_of_two_graded_maps_by_hand() -> None:
    heat, human = np.array([[0.2, 0.1], [0.0, 0.1]]), np.array([[3.0, 0.0], [6.0, 3.0]])
    # Scaled: 1, ½, 0, ½ and ½, 0, 1, ½: Σ min = ½ + 0 + 0 + ½, Σ max = 1 + ½ + 1 + ½.
    assert human_agreement(heat, human, grid=2).soft_iou == pytest.approx(1 / 3)
    assert np.isnan(human_agreement(np.zeros((2, 2)), human, grid=2).soft_iou)


@pytest.mark.quick
def test_fixations_of_a_graded_map() -> None:
    heat = np.random.default_rng(3).random((10, 10))
    sparse = np.zeros((10, 10))
    sparse[2, 3] = sparse[5, 5] = 1.0
    # Zeros are not fixated, however few pixels are not zero; nor is half a picture of ones left out.
    assert human_agreement(heat, sparse).fixated == 0.02
    half = np.zeros((10, 10))
    half[:5] = 1.0
    assert human_agreement(heat, half).fixated == 0.5
    own = np.zeros((20, 20), dtype=bool)
    own[3, 3] = True
    assert human_agreement(heat, half, fixations=own).nss == pytest.approx(nss(heat, own))


def test_error_over_pictures() -> None:
    assert mean_and_error([0.1, 0.2, 0.6]).standard_error == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1) / np.sqrt(3))
    result = mean_and_error([-0.2, float("nan"), -0.1])
    assert (result.mean, result.n, result.missing) == (pytest.approx(-0.15), 2, 1)
    assert str(result) == "-0.150 ± 0.050"
    assert np.isnan(mean_and_error([1.0]).standard_error)
    with pytest.raises(ValueError, match="all NaN"):
        mean_and_error([float("nan")])


def test_refusals() -> None:
    heat, square = Heatmap(np.eye(4), (80, 40)), np.ones((14, 14))
    human_agreement(heat, square)  # a square grid stands for any picture
    with pytest.raises(ExplainError, match="proportions"):
        human_agreement(heat, np.ones((80, 40)))
    with pytest.raises(ExplainError, match="not negative"):
        rank_correlation(heat, square - 2)
    with pytest.raises(ExplainError, match="finite"):
        rank_correlation(heat, square * np.nan)
    with pytest.raises(ExplainError, match="fixations are a mask"):
        auc_judd(heat, square)
    with pytest.raises(ExplainError, match="grid is"):
        rank_correlation(heat, square, grid=0)
    with pytest.raises(ExplainError, match="share"):
        human_agreement(heat, square, share=1.0)
    with pytest.raises(ExplainError, match="no values: empty"):
        nss(Heatmap(None, (8, 8), reason="empty"), np.eye(8, dtype=bool))


def test_without_scipy_the_error_names_the_extra(monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    from lvlm_probe.errors import ProbeError

    with pytest.raises(ProbeError, match=r"needs scipy.*lvlm-probe\[stats\]"):
        rank_correlation(np.eye(4), np.eye(4))
    assert auc_judd(np.eye(4), np.eye(4, dtype=bool)) == 1.0  # needs none
