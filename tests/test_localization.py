"""Localisation against hand-computed values; ties against brute force over random orders."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_probe.errors import ExplainError
from lvlm_probe.heatmap import Heatmap, resample
from lvlm_probe.metrics.localization import energy_in_region, iou, pointing_game

REGION = np.zeros((4, 4), dtype=bool)
REGION[1:3, 1:3] = True


def test_pointing_game() -> None:
    values = np.zeros((4, 4))
    values[1, 2] = 1.0
    assert pointing_game(values, REGION) == 1.0
    values[3, 3] = 2.0
    assert pointing_game(values / 2, REGION) == 0.0
    values[1, 1] = values[1, 2] = 2.0
    assert pointing_game(values / 2, REGION) == pytest.approx(2 / 3)
    assert np.isnan(pointing_game(np.full((4, 4), 0.5), REGION))


def test_pointing_game_tolerance_is_in_pixels_of_the_region() -> None:
    values, region = np.zeros((20, 20)), np.zeros((20, 20), dtype=bool)
    region[5:8, 5:8] = True
    values[10, 6] = 1.0
    assert pointing_game(values, region) == 0.0
    assert pointing_game(values, region, tolerance=2) == 0.0
    assert pointing_game(values, region, tolerance=3) == 1.0


def test_energy_in_region() -> None:
    values = np.ones((4, 4))
    assert energy_in_region(values, REGION) == 0.25
    values[REGION] = 3.0
    assert energy_in_region(values, REGION) == pytest.approx(12 / 24)
    assert np.isnan(energy_in_region(np.zeros((4, 4)), REGION))


def test_iou_at_the_regions_own_area() -> None:
    values = np.arange(16.0).reshape(4, 4)
    # The four highest are row 3, disjoint from the region.
    assert iou(values, REGION) == 0.0
    assert iou(np.where(REGION, 1.0, values / 100), REGION) == 1.0
    half = np.zeros((4, 4))
    half[1, 1:3] = half[0, :2] = 1.0
    assert iou(half, REGION) == pytest.approx(2 / 6)
    assert np.isnan(iou(values, np.zeros((4, 4), dtype=bool)))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_ties_count_by_expected_intersection(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 3, (4, 4)).astype(float)
    region = generator.random((4, 4)) < 0.4
    if not region.any():
        region[0, 0] = True
    wanted = region.sum()
    hits = []
    for _ in range(3000):
        order = np.lexsort((generator.random(16), -values.ravel()))[:wanted]
        hits.append(region.ravel()[order].sum())
    expected = np.mean(hits) / (2 * wanted - np.mean(hits))
    assert iou(values, region) == pytest.approx(expected, abs=0.03)


def test_a_coarse_heatmap_is_brought_to_the_regions_pixels() -> None:
    heat = Heatmap(np.array([[0.0, 0.0], [0.0, 1.0]]), (40, 40))
    region = np.zeros((40, 40), dtype=bool)
    region[30:, 30:] = True
    assert pointing_game(heat, region) == 1.0
    assert energy_in_region(heat, region) == pytest.approx(
        heat.upsampled()[30:, 30:].sum() / heat.upsampled().sum(), rel=1e-6
    )
    assert pointing_game(heat, ~region) == 0.0


def test_refusals() -> None:
    heat = Heatmap(np.ones((2, 2)), (80, 40))
    with pytest.raises(ExplainError, match="proportions"):
        pointing_game(heat, np.ones((80, 40), dtype=bool))
    with pytest.raises(ExplainError, match="no values: empty"):
        iou(Heatmap(None, (8, 8), reason="empty"), REGION)
    with pytest.raises(ExplainError, match=r"\(row, col\)"):
        iou(np.ones(4), REGION)


def test_resample_is_bilinear_up_and_area_down() -> None:
    row = np.array([[0.0, 1.0]])
    assert resample(row, (1, 4))[0].tolist() == pytest.approx([0.0, 0.25, 0.75, 1.0])
    assert resample(np.arange(16.0).reshape(4, 4) / 16, (2, 2)).ravel().tolist() == pytest.approx(
        [2.5 / 16, 4.5 / 16, 10.5 / 16, 12.5 / 16]
    )
