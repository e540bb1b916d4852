"""Pointing, energy and IoU over time and space, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from lvlm_probe import metrics
from lvlm_probe.errors import ExplainError
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.metrics import (
    temporal_iou,
    temporal_pointing,
    tube_energy,
    tube_iou,
    tube_mask,
    tube_pointing,
)
from lvlm_probe.trace.clips import Clip
from lvlm_probe.video import ClipHeatmap

TUBE = np.zeros((3, 2, 2), bool)
TUBE[1, 0] = True  # the upper half of the middle frame


def heat_of(values: np.ndarray, frames: int) -> ClipHeatmap:
    return ClipHeatmap(np.asarray(values, np.float32), (40, 20), Clip(2, frames))


def test_pointing_in_time_and_space() -> None:
    values = np.zeros((3, 2, 2))
    values[1, 0, 1] = 1
    assert tube_pointing(values, TUBE) == 1.0
    values[1, 1, 1] = 1  # the right time, the wrong place: a tie
    assert tube_pointing(values, TUBE) == 0.5
    values[0, 0, 1] = 2  # the right place, the wrong time
    assert tube_pointing(values, TUBE) == 0.0
    assert math.isnan(tube_pointing(np.ones((3, 2, 2)), TUBE))


def test_energy_and_iou_of_a_tube() -> None:
    values = np.arange(12.0).reshape(3, 2, 2)
    assert tube_energy(values, TUBE) == pytest.approx((4 + 5) / 66)
    assert tube_iou(values, TUBE) == 0.0  # the two highest are in the last frame
    values[1, 0, 0] = 20
    assert tube_iou(values, TUBE) == pytest.approx(1 / 3)  # 20 inside, 11 outside; union of three
    assert math.isnan(tube_energy(np.zeros((3, 2, 2)), TUBE))
    assert math.isnan(tube_iou(values, np.zeros((3, 2, 2), bool)))


def test_pointing_and_iou_in_time_alone() -> None:
    curve = np.array([0.1, 0.5, 0.5, 0.2])
    assert temporal_pointing(curve, [1]) == 0.5
    assert temporal_pointing(curve, range(1, 3)) == 1.0
    assert temporal_pointing(curve, np.array([True, False, False, True])) == 0.0
    assert math.isnan(temporal_pointing(np.ones(4), [0]))
    assert temporal_iou(curve, [1, 2]) == 1.0
    assert temporal_iou(curve, [2, 3]) == pytest.approx(1 / 3)  # frames 1 and 2 are the highest two
    assert temporal_iou(curve, [2]) == pytest.approx(0.5 / 1.5)  # one of two tied ones
    assert math.isnan(temporal_iou(curve, []))


def test_a_heatmap_is_judged_at_its_frames() -> None:
    values = np.zeros((2, 2, 2))
    values[1, 0, 1] = 1  # two steps over four frames: 0, ¼, ¾ and 1 of it
    heat = heat_of(values, 4)
    assert heat.over_time.tolist() == pytest.approx([0, 1 / 16, 3 / 16, 1 / 4])
    assert temporal_pointing(heat, [3]) == 1.0
    assert temporal_iou(heat, [1, 3]) == pytest.approx(1 / 3)
    late = np.zeros((4, 2, 2), bool)
    late[2:, 0, 1] = True
    assert tube_energy(heat, late) == pytest.approx((3 / 4 + 1) / 2)
    assert tube_pointing(heat, late) == 1.0


def test_boxes_by_frame_are_in_pixels_of_the_frames() -> None:
    mask = tube_mask({1: [(0, 0, 2, 1)], 2: [(3, 1, 4, 2)]}, 3, (4, 2))
    assert mask.sum((1, 2)).tolist() == [0, 2, 1]
    heat = heat_of(np.ones((2, 2, 4)), 2)
    assert tube_energy(heat, {0: [(0, 0, 20, 20)]}) == pytest.approx(1 / 4)
    with pytest.raises(ExplainError, match="frame 2 of a video of 2 frames"):
        tube_energy(heat, {2: [(0, 0, 20, 20)]})
    with pytest.raises(ExplainError, match="tube_mask"):
        tube_energy(np.ones((2, 2, 2)), {0: [(0, 0, 20, 20)]})
    with pytest.raises(ExplainError, match="as many frames"):
        tube_energy(heat, TUBE)
    with pytest.raises(ExplainError, match="frame 2 of"):
        temporal_pointing(heat, [2])
    with pytest.raises(ExplainError, match="one bool"):
        temporal_pointing(heat, np.ones(3, bool))


def test_maps_of_a_video_are_compared_over_time_and_space() -> None:
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    generator = np.random.default_rng(3)
    first, second = generator.random((2, 8, 7, 9)).astype(np.float32)
    same = metrics.compare_maps(heat_of(first, 8), heat_of(second, 8))
    assert same.rank_correlation == pytest.approx(spearmanr(first.ravel(), second.ravel()).statistic)
    assert same.difference == pytest.approx(np.abs(first / first.max() - second / second.max()).mean(), abs=1e-6)
    scaled = first / first.max(), second / second.max()
    steps = [structural_similarity(*pair, data_range=1.0, full=True)[1] for pair in zip(*scaled, strict=True)]
    assert same.ssim == pytest.approx(np.mean(steps), abs=1e-5)
    coarse = metrics.compare_maps(heat_of(first[:4], 8), heat_of(second, 8))  # steps of two frames each
    halved = second.reshape(4, 2, 7, 9).mean(1)
    assert coarse.rank_correlation == pytest.approx(spearmanr(first[:4].ravel(), halved.ravel()).statistic)


def test_metrics_of_images_and_of_videos_name_each_other() -> None:
    video, image = heat_of(np.ones((2, 2, 2)), 2), Heatmap(np.ones((2, 2), np.float32), (40, 20))
    region = np.ones((2, 2), bool)
    for name in ("pointing_game", "energy_in_region", "iou", "soft_iou", "average_precision"):
        with pytest.raises(ExplainError, match="tube_pointing"):
            getattr(metrics, name)(video, region)
    for name in ("tube_pointing", "tube_energy", "tube_iou"):
        with pytest.raises(ExplainError, match="pointing_game"):
            getattr(metrics, name)(image, TUBE)
    for name in ("temporal_pointing", "temporal_iou"):
        with pytest.raises(ExplainError, match="pointing_game"):
            getattr(metrics, name)(image, [0])
    for name in ("auc_judd", "nss"):
        with pytest.raises(ExplainError, match="one frame"):
            getattr(metrics, name)(video, region)
    for other in (image, heat_of(np.ones((2, 2, 2)), 3)):
        with pytest.raises(ExplainError, match=r"give one frame, heat.frame\(3\)"):
            metrics.compare_maps(video, other)
    empty = ClipHeatmap(None, (40, 20), Clip(0, 2), reason="nothing was selected")
    with pytest.raises(ExplainError, match="nothing was selected"):
        tube_pointing(empty, TUBE)
