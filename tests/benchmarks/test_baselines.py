"""What says why a baseline stands low: shares of boxes and the area under a curve, by hand and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from baselines import apart, auc, cam, inside, tables
from scipy.stats import mannwhitneyu


def test_shares_of_boxes_by_hand() -> None:
    mask = np.zeros((4, 6), dtype=bool)
    mask[1:3, 2:4] = True
    boxes = np.array([[0, 0, 2, 4], [2, 0, 4, 4], [2, 1, 4, 3], [3, 2, 6, 4]], dtype=np.float32)
    assert inside(boxes, mask).tolist() == [0, 0.5, 1, pytest.approx(1 / 6)]
    within, outside = apart(inside(boxes, mask))
    assert within.tolist() == [False, True, True, False] and outside.tolist() == [True, False, False, False]


def test_the_area_is_mann_and_whitneys() -> None:
    rng = np.random.default_rng(0)
    values, share = rng.integers(0, 5, 40).astype(float), rng.choice([0, 0.2, 0.8, 1.0], 40)
    high, low = values[share >= 0.5], values[share == 0]
    assert auc(values, share) == pytest.approx(mannwhitneyu(high, low).statistic / len(high) / len(low))
    assert np.isnan(auc(values, np.zeros(40)))


def test_maps_with_and_without_the_mean_by_hand() -> None:
    activations = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 2.0]])
    assert cam(activations, gradients, pooled=True).tolist() == [2.0, 4.0]  # weights 0 and 1
    assert cam(activations, gradients, pooled=False).tolist() == [1.0, 5.0]


def test_the_page_has_the_tables_of_what_was_measured() -> None:
    from baselines import ROOT

    page = (ROOT / "docs" / "tournament.md").read_text(encoding="utf-8")
    assert tables().strip() == page.partition("<!-- baselines -->")[2].partition("<!-- /baselines -->")[0].strip()
