"""The forward function that captum asks for: masks of an image in, the score of the explained words out.

captum attributes what a function says of its input to the elements of that input. Here the input is a mask: 1 keeps a
cell of the image, 0 puts the baseline image in its place. So its ``baselines`` are 0, its ``inputs`` are 1, and an
attribution is one of regions of the image, whatever the model makes of them. A gradient is taken micro-batch by
micro-batch while the scores are computed, in the memory of one, and only handed over in backward; so there is no second
derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lvlm_probe.explainers import Problem, Tokens, selected
from lvlm_probe.explainers.explaining import scored_by
from lvlm_probe.explainers.scores import ScoreKind, check_rules, require_finite, score_of, score_rule
from lvlm_probe.replaying import Replay
from lvlm_probe.selection import Against

__all__ = ["Forward", "forward"]


class Forward:
    """Masks ``(batch, row, col)`` in [0, 1] to scores ``(batch,)``, differentiable once.

    Args:
        problem: the answer's tokens and the image.
        score: ``"log"`` likelihood of the tokens, nats; ``"prob"`` or ``"geometric"`` for the mean of their
            probabilities.
        total: of how many masks the caller's progress is told; 0 tells nothing.
    """

    def __init__(self, problem: Problem, score: ScoreKind = "log", *, total: int = 0) -> None:
        check_rules("captum", score=score_rule(score))
        self.problem, self.kind, self.total, self.done = problem, score, total, 0

    def __call__(self, masks: torch.Tensor) -> torch.Tensor:
        """Scores of masked images, on the device of the masks."""
        found: torch.Tensor
        if torch.is_grad_enabled() and masks.requires_grad:
            found = _Differentiated.apply(masks, self)
        else:
            with torch.no_grad():
                replay, problem = self.problem.replay, self.problem
                on = masks.to(replay.device)
                found = self.score(replay.log_probs(on, image=problem.image, steps=problem.columns)).to(masks.device)
        require_finite("captum", self.problem, found)
        self.done += len(masks)
        if self.total:
            self.problem.advance(min(self.done, self.total), self.total)
        return found

    def score(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Log-probabilities ``(batch, step)`` to scores ``(batch,)``."""
        return score_of(self.problem, log_probs, self.kind)


class _Differentiated(torch.autograd.Function):
    """Scores whose gradient was taken with them."""

    @staticmethod
    def forward(ctx: Any, masks: torch.Tensor, asked: Forward) -> torch.Tensor:
        problem = asked.problem
        on = masks.detach().to(problem.replay.device)
        scores, slopes = problem.replay.score_and_grad(on, asked.score, image=problem.image, steps=problem.columns)
        require_finite("captum", problem, slopes)
        ctx.save_for_backward(slopes.to(masks))
        return scores.to(masks.device)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * upstream.to(slopes).reshape(-1, *[1] * (slopes.ndim - 1)), None


def forward(
    replay: Replay,
    *,
    tokens: Tokens | None = None,
    against: Against | None = None,
    image: int = 0,
    score: ScoreKind = "log",
) -> Forward:
    """Return a recorded answer as the ``forward_func`` of anything in ``captum.attr`` that takes a function.

    ::

        attribution = captum.attr.Saliency(forward(replay, tokens="red")).attribute(torch.ones(1, 14, 14))

    Args:
        replay: the recorded answer on its model.
        tokens, against: what is explained, as in ``probe.explain``; ``None`` is what the image is responsible for.
        image: number of the image, when the prompt has several.
        score: ``"log"`` likelihood of the tokens, nats; ``"prob"`` or ``"geometric"`` for the mean of their
            probabilities.

    Raises:
        ExplainError: nothing is selected, there is no such image, or no such kind of score.
        SelectionError: the answer does not contain the words or span.
    """
    selection = selected(replay, tokens, against)
    check_rules(
        "captum",
        tokens=(tokens, bool(selection), f"what can be explained ({selection.reason})"),
        image=(image, 0 <= image < replay.n_images, f"one of the prompt's {replay.n_images} image(s), counted from 0"),
    )
    return Forward(Problem(scored_by(replay, selection), selection, image), score)
