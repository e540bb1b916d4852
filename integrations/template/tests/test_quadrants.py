"""The quadrants explainer against a model whose answer can be computed by hand."""

from __future__ import annotations

import pytest
import torch
from lvlm_probe_template.quadrants import quadrants, quarters

from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers import Problem
from lvlm_probe.selection import TokenSelection


class LinearReplay:
    """log P of the one token = Σ weight · mask: the drop of a box is the sum of the weights in it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.image_sizes = [(64, 64)]
        self.device = torch.device("cpu")
        self.calls: list[int] = []

    def log_probs(self, mask: torch.Tensor | None = None, *, image: int | None = None) -> torch.Tensor:
        mask = torch.ones(1, *self.weight.shape) if mask is None else mask
        self.calls.append(len(mask))
        return (mask * self.weight).sum(dim=(1, 2))[:, None]


def problem(weight: torch.Tensor, **more: object) -> Problem:
    selection = TokenSelection(indices=(0,), tokens=("red",), llr=(), rule="indices")
    return Problem(LinearReplay(weight), selection, **more)  # type: ignore[arg-type]


def test_quarters_tile_their_box() -> None:
    assert quarters((4, 8, 4)) == [(4, 8, 2), (4, 10, 2), (6, 8, 2), (6, 10, 2)]


def test_one_level_gives_the_weights_back() -> None:
    weight = torch.tensor([[0.0, 2.0], [1.0, 4.0]])
    outcome = quadrants(problem(weight), levels=1)
    assert outcome.values is not None
    assert torch.allclose(outcome.values, weight / 4.0)


def test_two_levels_by_hand() -> None:
    weight = torch.zeros(4, 4)
    weight[0, 0], weight[0, 1], weight[3, 3] = 6.0, 2.0, 4.0
    outcome = quadrants(problem(weight), levels=2, keep=1)
    # Level 1: drops 8, 0, 0, 4, so 1 and ½. Level 2, in the first quarter only: 6, 2, 0, 0, so 1 and ⅓. Their mean.
    expected = torch.zeros(4, 4)
    expected[:2, :2], expected[2:, 2:] = 0.5, 0.25
    expected[0, 0] += 0.5
    expected[0, 1] += 1 / 6
    assert outcome.values is not None
    assert torch.allclose(outcome.values, expected)


def test_what_speaks_against_the_words_is_not_important() -> None:
    outcome = quadrants(problem(torch.tensor([[-5.0, 1.0], [0.0, 0.0]])), levels=1)
    assert outcome.values is not None
    assert outcome.values.tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_no_effect_is_a_reason_and_not_a_picture() -> None:
    outcome = quadrants(problem(torch.zeros(4, 4)), levels=2)
    assert outcome.values is None
    assert "no less likely" in str(outcome.reason)


def test_passes_and_progress_are_as_documented() -> None:
    seen: list[tuple[int, int]] = []
    asked = problem(torch.rand(8, 8), progress=lambda done, total: seen.append((done, total)))
    quadrants(asked, levels=3, keep=2)
    assert asked.replay.calls == [1, 4, 8, 8]  # type: ignore[attr-defined]
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("wrong", [{"levels": 0}, {"levels": 9}, {"keep": 0}])
def test_bad_parameters_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ExplainError, match="levels is 1 to 8 and keep at least 1"):
        quadrants(problem(torch.zeros(2, 2)), **wrong)
