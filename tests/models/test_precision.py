"""Gradients in half precision: each row finds the scale at which it survives, whatever stands beside it."""

from __future__ import annotations

import pytest
import torch

from lvlm_probe.models.precision import differentiate_scaled

SLOPES = torch.tensor([3e-18, 1e-9, 2e-5, 1.0, 300.0, 5e4, 0.0])
CELLS = torch.linspace(0.001, 1, 50)


def backward(scales: torch.Tensor) -> torch.Tensor:
    """As a model in float16 hands on what it is given: all of it is rounded once."""
    return (scales[:, None] * SLOPES[:, None] * CELLS).half().float()


@pytest.mark.quick
def test_each_row_has_the_scale_at_which_it_survives() -> None:
    found, scales = differentiate_scaled(backward, len(SLOPES), together=False)
    assert torch.allclose(found, SLOPES[:, None] * CELLS, rtol=0.05, atol=0)
    assert not found[-1].any() and scales.log2().frac().eq(0).all()


@pytest.mark.quick
def test_rows_that_go_together_have_one_scale() -> None:
    found, scales = differentiate_scaled(backward, len(SLOPES), together=True)
    assert len(set(scales.tolist())) == 1 and found.isfinite().all()
    assert torch.allclose(found[5], SLOPES[5] * CELLS, rtol=0.05)


@pytest.mark.parametrize("together", [False, True])
def test_what_is_finite_nowhere_is_handed_on(together: bool) -> None:
    passes = []

    def never(scales: torch.Tensor) -> torch.Tensor:
        passes.append(scales)
        return torch.full((2, 3), torch.nan)

    found, _ = differentiate_scaled(never, 2, together=together)
    assert found.isnan().all() and len(passes) < 8
