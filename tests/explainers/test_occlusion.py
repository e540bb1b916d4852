"""Occlusion against a model whose answer can be computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_replay import ToyReplay, box_weights

from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers import explain
from lvlm_probe.explainers.occlusion import covers


def test_hard_patches_cover_every_cell_equally_often() -> None:
    cover = covers(5, 3)
    assert cover.shape == (7, 5)
    assert set(cover.unique().tolist()) == {0.0, 1.0}
    assert cover.sum(dim=0).tolist() == [3.0] * 5
    assert cover[0].tolist() == [1, 0, 0, 0, 0]
    assert cover[2].tolist() == [1, 1, 1, 0, 0]


def test_strides_by_hand() -> None:
    assert covers(4, 2, 2).tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert covers(5, 5, 5).sum(dim=0).min() == 1.0
    for cells in range(1, 9):
        for patch in range(1, 6):
            for stride in range(1, patch + 1):
                cover = covers(cells, patch, stride)
                assert float(cover.sum(dim=0).min()) >= 1
                assert float(cover.sum(dim=1).min()) >= 0


def test_soft_edges_by_hand() -> None:
    # A patch of 4 cells, ramp 2 cells wide: cell centres lie .5 and 1.5 inside the border, and .5 outside.
    cover = covers(6, 4, 1, 2.0)
    middle = cover[4]  # starts at cell 1
    assert middle.tolist() == [0.25, 0.75, 1.0, 1.0, 0.75, 0.25]


def test_a_patch_of_one_cell_gives_the_weights_back() -> None:
    weights = torch.tensor([[0.0, 0.2, 0.1], [0.1, 0.6, 0.0]], dtype=torch.float64)
    heat = explain(ToyReplay(weights), method="occlusion", size=(2, 3), patch=1, score="prob")
    assert np.allclose(heat.values, weights / 0.6, atol=1e-6 + 1e-3)
    # drop of the probability = .89 · weight
    assert heat.provenance["diagnostics"]["unit"] == pytest.approx(0.89 * 0.6, rel=1e-4)
    assert heat.provenance["passes"]["forward"] == 1 + 6


def test_larger_patches_average_by_hand() -> None:
    # All weight in the first of 3 cells; patches of 2 start at −1, 0, 1, 2 and cover {0}, {0, 1}, {1, 2}, {2}.
    # Drops 1, 1, 0, 0 of the whole: means over the patches that cover a cell 1, ½, 0.
    replay = ToyReplay(torch.tensor([[1.0, 0.0, 0.0]]))
    heat = explain(replay, method="occlusion", size=(1, 3), patch=2, score="prob")
    assert np.allclose(heat.values, [[1.0, 0.5, 0.0]], atol=1e-3)


def test_log_score_by_hand() -> None:
    heat = explain(ToyReplay(torch.tensor([[0.5, 0.5]])), method="occlusion", size=(1, 2), patch=1, score="log")
    expected = np.log(0.9) - np.log(0.01 + 0.89 * 0.5)
    assert heat.provenance["diagnostics"]["unit"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.quick
def test_what_speaks_against_the_words_comes_last() -> None:
    weights = torch.tensor([[-0.3, 1.1, 0.0, 0.2]], dtype=torch.float64)
    heat = explain(ToyReplay(weights), method="occlusion", size=(1, 4), patch=1, score="prob")
    assert heat.values[0, 0] == 0.0
    assert 0 < heat.values[0, 2] < 1e-3  # no effect: above what speaks against, by the tie-break only
    assert np.argsort(heat.values[0]).tolist() == [0, 2, 3, 1]


@pytest.mark.parametrize("options", [{}, {"soft": 2.0}, {"stride": 2}, {"patch": 4, "score": "log"}])
def test_finds_the_box(options: dict[str, object]) -> None:
    box = box_weights(16, slice(3, 7), slice(8, 12))
    heat = explain(ToyReplay(box), method="occlusion", **options)
    assert heat.shape == (16, 16)
    row, col = np.unravel_index(heat.values.argmax(), heat.shape)
    assert box[row, col] > 0


@pytest.mark.parametrize(
    ("options", "passes"), [({}, 18 * 18), ({"stride": 2}, 9 * 9), ({"patch": 3, "stride": 3}, 36)]
)
def test_passes_are_as_documented_and_progress_covers_them(options: dict[str, int], passes: int) -> None:
    told: list[tuple[int, int]] = []
    replay = ToyReplay(box_weights(16, slice(3, 7), slice(8, 12)))
    heat = explain(replay, method="occlusion", batch=50, progress=lambda a, b: told.append((a, b)), **options)
    assert heat.provenance["passes"] == {"forward": passes + 1, "backward": 0}
    assert told[0] == (0, passes + 1)
    assert told[-1] == (passes + 1, passes + 1)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patch": 0}, "patch is a whole number of at least 1"),
        ({"stride": 5}, "stride is between 1 and patch=3"),
        ({"stride": 0}, "stride is between"),
        ({"soft": -1.0}, "soft is between 0 and patch=3"),
        ({"score": "x"}, "score is"),
        ({"batch": 0}, "batch is"),
    ],
)
def test_refusals(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ExplainError, match=message):
        explain(ToyReplay(box_weights(4, slice(0, 1), slice(0, 1))), method="occlusion", **wrong)


def test_no_effect_is_a_reason_and_not_a_picture() -> None:
    box = box_weights(4, slice(0, 1), slice(0, 1))
    flat = explain(ToyReplay(box, original=[0.4], base=[0.5]), method="occlusion", tokens=(0, 1))
    assert flat.values is None
    assert "no less likely" in str(flat.reason)
    blind = explain(ToyReplay(box, seen=torch.zeros(64, 64, dtype=torch.bool)), method="occlusion")
    assert "sees no part" in str(blind.reason)
