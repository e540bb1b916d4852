"""The occlusion explainer against a model whose answer can be computed by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lvlm_probe_template.occlusion import cover_masks, mean_over_patches, occlusion

from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers import Problem


class LinearReplay:
    """log P of the one token = Σ weight · mask: the drop of a patch is the sum of the weights under it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.image_sizes = [(64, 64)]
        self.calls: list[int] = []

    def log_probs(self, mask: torch.Tensor | None = None, *, image: int | None = None) -> torch.Tensor:
        mask = torch.ones(1, *self.weight.shape) if mask is None else mask
        self.calls.append(len(mask))
        return (mask * self.weight).sum(dim=(1, 2))[:, None]


def problem(weight: torch.Tensor, **more: object) -> Problem:
    selection = SimpleNamespace(indices=(0,))
    return Problem(LinearReplay(weight), selection, **more)  # type: ignore[arg-type]


def test_every_cell_is_covered_equally_often() -> None:
    masks = cover_masks(5, 7, 3)
    assert masks.shape == ((5 + 2) * (7 + 2), 5, 7)
    assert torch.equal((1 - masks).sum(dim=0), torch.full((5, 7), 9.0))
    assert set(masks.unique().tolist()) == {0.0, 1.0}


def test_a_patch_of_one_cell_gives_the_weights_back() -> None:
    weight = torch.tensor([[0.0, 2.0], [1.0, 4.0]])
    outcome = occlusion(problem(weight), size=2, patch=1)
    assert outcome.values is not None
    assert torch.allclose(outcome.values, weight / 4.0)


def test_larger_patches_average_by_hand() -> None:
    # One weight in the corner of a 1 x 3 grid, patch 2: patches start at -1, 0, 1, 2 and cover {0}, {0,1}, {1,2}, {2}.
    drops = torch.tensor([6.0, 6.0, 0.0, 0.0])
    masks = torch.tensor([[[0, 1, 1]], [[0, 0, 1]], [[1, 0, 0]], [[1, 1, 0]]]).float()
    assert torch.allclose(mean_over_patches(drops, masks), torch.tensor([[6.0, 3.0, 0.0]]))


def test_what_speaks_against_the_words_is_not_important() -> None:
    outcome = occlusion(problem(torch.tensor([[-5.0, 1.0], [0.0, 0.0]])), size=2, patch=1)
    assert outcome.values is not None
    assert outcome.values.tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_no_effect_is_a_reason_and_not_a_picture() -> None:
    outcome = occlusion(problem(torch.zeros(3, 3)), size=3, patch=2)
    assert outcome.values is None
    assert "no less likely" in str(outcome.reason)


def test_batches_and_progress_cover_everything() -> None:
    seen: list[tuple[int, int]] = []
    asked = problem(torch.rand(4, 4), progress=lambda done, total: seen.append((done, total)))
    occlusion(asked, size=4, patch=2, batch=10)
    assert asked.replay.calls == [1, 10, 10, 5]  # type: ignore[attr-defined]
    assert seen == [(10, 25), (20, 25), (25, 25)]


@pytest.mark.parametrize("wrong", [{"patch": 0}, {"batch": 0}])
def test_bad_parameters_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ExplainError, match="at least 1"):
        occlusion(problem(torch.zeros(2, 2)), **wrong)
