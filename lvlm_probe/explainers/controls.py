"""Floors: maps made without looking at the answer, or at the image. A method that does not beat them says nothing.

They need no pass of the model. ``random`` is the floor of deletion and insertion, ½ for both in expectation; ``center``
that of localisation: photographers put things in the middle, and a map that knows no more does well on their images.
"""

from __future__ import annotations

import torch

from lvlm_probe.explainers.registry import Cost, Outcome, Problem, Shape, register
from lvlm_probe.explainers.scores import check_rules

SIGMA = 0.25
"""Standard deviation of the blob in the middle, as a share of the image's edges."""


@register("random", needs=(), cost=lambda *_: Cost(None, 0, 0, ()), clips=True)
def random(problem: Problem, *, size: int | tuple[int, int] | None = None) -> Outcome:
    """Uniform random numbers, one per cell, from the explanation's seed.

    ``size``: cells, ``n``, ``(rows, columns)``, or ``None`` for about 256 as square as the image allows.
    """
    shape = problem.shape(size)
    problem.advance(0, 1)
    values = torch.rand(shape, generator=problem.generator(), dtype=torch.float32)
    problem.advance(1, 1)
    return Outcome(values, {"size": list(shape)})


@register("center", needs=(), cost=lambda *_: Cost(None, 0, 0, ()), clips=True)
def center(problem: Problem, *, size: int | tuple[int, int] | None = None, sigma: float = SIGMA) -> Outcome:
    """A Gaussian around the middle of the image, exp(−((x − ½)² + (y − ½)²) / 2σ²), x and y as shares of the image.

    Args:
        problem: The image.
        size: Cells, as for ``random``.
        sigma: Standard deviation as a share of the image's edges.

    Raises:
        ExplainError: ``sigma`` is not positive.
    """
    check_rules("center", sigma=(sigma, sigma > 0, "positive"))
    shape = problem.shape(size)
    problem.advance(0, 1)
    values = center_values(shape, sigma=sigma)
    problem.advance(1, 1)
    return Outcome(values, {"size": list(shape), "sigma": sigma})


def center_values(shape: Shape, *, sigma: float = SIGMA) -> torch.Tensor:
    """The map of ``center`` on a grid, with a highest value of 1; of a clip the same at all times."""
    row, col = ((torch.arange(cells, dtype=torch.float32) + 0.5) / cells - 0.5 for cells in shape[-2:])
    values = torch.exp(-(row[:, None].square() + col.square()) / (2 * sigma**2))
    return (values / values.max()).expand(shape).clone()
