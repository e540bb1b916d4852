"""Localisation against hand-computed values; ties against brute force over random orders."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_probe.errors import ExplainError
from lvlm_probe.heatmap import Heatmap, resample
from lvlm_probe.metrics.localization import (
    average_precision,
    boxes_to_mask,
    energy_in_region,
    iou,
    pointing_game,
    soft_iou,
    temporal_pointing,
    tube_mask,
    tube_pointing,
)

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


@settings(max_examples=15)
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


@pytest.mark.quick
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


METRICS = (pointing_game, energy_in_region, iou, soft_iou, average_precision)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("values", [np.nan, np.inf, 1j, "x", None])
def test_arrays_that_are_no_heatmap(metric, values) -> None:
    heat = np.where(REGION, values, np.zeros((4, 4), dtype=np.asarray(values).dtype))
    with pytest.raises(ExplainError, match="finite numbers"):
        metric(heat, REGION)
    with pytest.raises(ExplainError, match="finite numbers"):
        metric(np.zeros((0, 4)), REGION)


@pytest.mark.parametrize("metric", METRICS)
def test_what_looks_at_the_order_alone_takes_values_below_zero(metric) -> None:
    values = np.random.default_rng(0).random((4, 4))
    if metric in (energy_in_region, soft_iou):
        with pytest.raises(ExplainError, match="not negative"):
            metric(values - 2, REGION)
    else:
        assert metric(values - 2, REGION) == metric(values, REGION)


@pytest.mark.parametrize("metric", METRICS)
def test_an_array_that_stands_for_a_region_has_two_values(metric) -> None:
    region, values = np.pad(REGION, 1), np.random.default_rng(0).random((6, 6))
    for mask in (region.astype(np.uint8) * 255, region.astype(np.float32), region.astype(int)):
        assert metric(values, mask) == metric(values, region)
    graded, labels = np.where(region, 0.7, 0.1), np.where(region, 2, 0) + np.eye(6, dtype=int)
    for none, said in ((graded, "mask > 0.5"), (labels, "labels == 3"), (np.where(region, 1, np.nan), "mask of bools")):
        with pytest.raises(ExplainError, match=said):
            metric(values, none)
    with pytest.raises(ExplainError, match="shape"):
        metric(values, np.zeros((0, 0), dtype=bool))


def test_no_heatmap_points_into_no_region() -> None:
    values = np.random.default_rng(0).random((4, 4))
    assert np.isnan(pointing_game(values, np.zeros((4, 4), dtype=bool)))
    assert np.isnan(temporal_pointing(values[0], []))
    assert np.isnan(tube_pointing(values[None], np.zeros((1, 4, 4), dtype=bool)))


@pytest.mark.parametrize("size", [(8,), (0, 8), (-1, 8), (8, 8, 3)])
def test_a_size_is_width_and_height(size) -> None:
    with pytest.raises(ExplainError, match=r"size is \(width, height\), both at least 1"):
        boxes_to_mask([(0, 0, 1, 1)], size)
    with pytest.raises(ExplainError, match=r"size is \(width, height\), both at least 1"):
        tube_mask({0: [(0, 0, 1, 1)]}, 3, size)
    with pytest.raises(ExplainError, match="frames is a whole number of at least 1"):
        tube_mask({}, 0, (8, 8))


@pytest.mark.parametrize("tolerance", [-1, True])
def test_a_tolerance_is_a_count_of_pixels(tolerance) -> None:
    with pytest.raises(ExplainError, match="tolerance is a whole number of at least 0"):
        pointing_game(np.eye(4), REGION, tolerance=tolerance)


def test_resample_is_bilinear_up_and_area_down() -> None:
    row = np.array([[0.0, 1.0]])
    assert resample(row, (1, 4))[0].tolist() == pytest.approx([0.0, 0.25, 0.75, 1.0])
    assert resample(np.arange(16.0).reshape(4, 4) / 16, (2, 2)).ravel().tolist() == pytest.approx(
        [2.5 / 16, 4.5 / 16, 10.5 / 16, 12.5 / 16]
    )


# ---------------------------------------------------------------- boxes


def test_boxes_become_masks() -> None:
    mask = boxes_to_mask([(1, 0, 3, 2), (2, 1, 4, 3)], (5, 4))
    assert mask.astype(int).tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]
    # Every pixel that is touched; the rest is cut off at the picture's border.
    assert boxes_to_mask([(1.2, 0.9, 1.3, 1.1)], (3, 3)).astype(int).tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert boxes_to_mask([(-5, -5, 1, 1)], (3, 2)).sum() == 1
    assert not boxes_to_mask([], (3, 2)).any()


@pytest.mark.parametrize("metric", [pointing_game, energy_in_region, iou, soft_iou, average_precision])
def test_boxes_work_wherever_a_mask_does(metric) -> None:
    heat = Heatmap(np.random.default_rng(0).random((6, 8)), (40, 30))
    boxes = [(4, 3, 20, 21), [10, 10, 39, 30]]
    assert metric(heat, boxes) == metric(heat, boxes_to_mask(boxes, (40, 30)))
    assert metric(heat, boxes[0]) == metric(heat, boxes_to_mask(boxes[:1], (40, 30)))


def test_boxes_that_are_none() -> None:
    heat = Heatmap(np.eye(4), (40, 30))
    for boxes, message in [
        ([(3, 0, 3, 2)], "left < right"),
        ([(0, 5, 3, 2)], "left < right"),
        ([(0, 0, float("nan"), 2)], "left < right"),
        ([(0, 0, float("inf"), 2)], "left < right"),
        ([(0, 0, 3)], r"a box is \(left, top, right, bottom\)"),
        ([(50, 0, 60, 2)], "outside the image of 40 × 30"),
        ([(0.25, 0.5, 0.75, 1.0), (0, 0, 0.5, 0.5)], r"looks like shares of it: .* 40 and 30"),
    ]:
        with pytest.raises(ExplainError, match=message):
            iou(heat, boxes)
    with pytest.raises(ExplainError, match=r"boxes_to_mask\(boxes, \(width, height\)\)"):
        iou(np.eye(4), [(0, 0, 2, 2)])
    with pytest.raises(ExplainError, match=r"boxes\.tolist\(\)"):
        iou(heat, np.array([[0, 0, 20, 20]]))


# ---------------------------------------------------------------- soft IoU, average precision


def test_soft_iou_by_hand() -> None:
    values, region = np.array([[0.4, 0.1], [0.2, 0.0]]), np.array([[True, False], [True, False]])
    # Scaled: 1, ¼, ½, 0: Σ min = 1 + ½, Σ max = 1 + ¼ + 1.
    assert soft_iou(values, region) == pytest.approx(1.5 / 2.25)
    assert soft_iou(values / 4, region) == pytest.approx(1.5 / 2.25)
    assert soft_iou(region * 0.3, region) == pytest.approx(1.0)
    assert soft_iou(~region * 1.0, region) == 0.0
    assert np.isnan(soft_iou(values, np.zeros((2, 2), dtype=bool)))
    assert np.isnan(soft_iou(values * 0, region))


@given(st.integers(0, 2**31 - 1))
def test_soft_iou_of_binary_maps_is_iou(seed: int) -> None:
    generator = np.random.default_rng(seed)
    first, second = generator.random((5, 5)) < 0.5, generator.random((5, 5)) < 0.5
    first[0, 0] = second[0, 0] = True
    assert soft_iou(first.astype(float), second) == pytest.approx((first & second).sum() / (first | second).sum())


def test_average_precision_by_hand() -> None:
    # The example of scikit-learn's documentation: truth 0 0 1 1, scores 0.1 0.4 0.35 0.8 give 0.8333.
    values = np.array([[0.1, 0.4], [0.35, 0.8]])
    region = np.array([[False, False], [True, True]])
    assert average_precision(values, region) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert average_precision(region * 0.7, region) == 1.0
    assert average_precision(np.full((4, 4), 0.5), REGION) == pytest.approx(0.25)
    # A tie of one inside and one outside enters as a whole: precision ½ for both.
    tied = np.array([[0.9, 0.9], [0.1, 0.2]])
    assert average_precision(tied, np.array([[True, False], [True, False]])) == pytest.approx(0.5 * 0.5 + 0.5 * 2 / 4)
    assert np.isnan(average_precision(values, np.zeros((2, 2), dtype=bool)))


@settings(max_examples=60)
@given(st.integers(0, 2**31 - 1), st.integers(2, 9))
def test_average_precision_is_its_definition(seed: int, levels: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.integers(0, levels, (5, 6)) / levels
    region = generator.random((5, 6)) < 0.3
    region[0, 0] = True
    expected, recall_before = 0.0, 0.0
    for threshold in sorted(set(values.ravel().tolist()), reverse=True):
        taken = values >= threshold
        recall = (taken & region).sum() / region.sum()
        expected += (recall - recall_before) * (taken & region).sum() / taken.sum()
        recall_before = recall
    assert average_precision(values, region) == pytest.approx(expected)


def test_average_precision_of_chance_is_the_regions_share() -> None:
    generator = np.random.default_rng(0)
    region = np.zeros((60, 60), dtype=bool)
    region[10:30, 20:50] = True
    values = [average_precision(generator.random((60, 60)), region) for _ in range(20)]
    assert np.mean(values) == pytest.approx(region.mean(), abs=0.01)
