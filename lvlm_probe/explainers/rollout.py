"""Attention rollout (Abnar and Zuidema, 2020): how attention alone mixes the tokens, layer after layer.

R = R_L … R_1 with R_l = (mean_h A + I) / rowsum. It says nothing about one word rather than another beyond where the
word is predicted, and attention sinks show up in it; it is here because everybody compares with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lvlm_probe.explainers.attention_relevance import Scope, Walk, parts_of
from lvlm_probe.explainers.registry import Cost, Outcome, Problem, register
from lvlm_probe.explainers.scores import finish
from lvlm_probe.models.precision import sum_dtype
from lvlm_probe.replaying.capture import AttentionLayer


def _cost(_problem: Problem, params: Mapping[str, Any]) -> Cost:
    if params["scope"] == "decoder":
        return Cost("rollout", 1, 0)
    return Cost("relevance", 1, 1, parts=parts_of(params["scope"]))


@register("rollout", needs=("passes", "attention"), cost=_cost, clips=True)
def rollout(
    problem: Problem, *, scope: Scope = "decoder", encoder: int = 0, size: int | tuple[int, int] | None = None
) -> Outcome:
    """Explains by attention rollout. One forward pass; with the encoder in it a backward pass too, which tells the
    layers that the language model reads from those above them.

    Args:
        scope, encoder, size: As for ``tmm``.

    Raises:
        ExplainError: The model's attention cannot be read, or the places of its tokens are not known.
    """

    def mean_weights(layer: AttentionLayer, rows: torch.Tensor) -> torch.Tensor:
        return layer.weights(rows).mean(dim=1, dtype=sum_dtype(layer.device))

    walk = Walk(problem, scope, mean_weights, normalised=True, encoder=encoder)
    replay = problem.replay
    if scope == "decoder":
        with replay.capture(attention=walk.parts) as seen:
            with torch.no_grad():
                replay.log_probs(problem.whole, image=problem.target)
            for layer in reversed(seen.layers):
                walk(layer)
    else:
        with replay.capture(attention=walk.parts, visit=walk) as seen:
            replay.score_and_grad(problem.whole, problem.score, image=problem.target)
    problem.advance(1, 1)
    grid, met = walk.painted(size)
    params = {"scope": scope, "encoder": encoder, "size": list(grid.shape)}
    return finish(grid, met, params, diagnostics={"layers": walk.layers, "unreadable": dict(seen.unreadable)})
