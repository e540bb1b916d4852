"""T-MM: gradient-weighted attention, propagated through all layers (Chefer et al., 2021; the paper's §3.1, Eq. 2).

Per layer Ā = mean over heads of ReLU(∂y/∂A ⊙ A), y the log-likelihood of the selected tokens; relevance of the image
tokens to the positions that predict them is the sum of those rows of (I + Ā_L) … (I + Ā_1). Computed in one backward
pass, one layer at a time (``relevance``), under any attention backend that can be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lvlm_probe.explainers.attention_relevance import Scope, Walk, parts_of, relu_product
from lvlm_probe.explainers.registry import Cost, Outcome, Problem, register
from lvlm_probe.explainers.scores import finish


def _cost(_problem: Problem, params: Mapping[str, Any]) -> Cost:
    return Cost("relevance", 1, 1, parts=parts_of(params["scope"]))


@register("tmm", needs=("passes", "gradients", "attention"), cost=_cost, clips=True)
def tmm(
    problem: Problem,
    *,
    scope: Scope = "decoder",
    last_factor: Literal["identity", "bare"] = "identity",
    encoder: int | str = 0,
    size: int | tuple[int, int] | None = None,
) -> Outcome:
    """Explains by T-MM. One forward and one backward pass.

    Args:
        scope: Layers to go through: the language model's (``"decoder"``), the vision encoder's (``"encoder"``, from all
            of its tokens alike), or ``"both"``, one after the other. The paper does not say which it used.
        last_factor: ``"bare"`` is the paper's wording, whose product ends in Ā_1 instead of I + Ā_1.
        encoder: Number or name of the vision encoder, where there are several.
        size: Grid of the heatmap, by default the tokens' own.

    Raises:
        ExplainError: The model's attention cannot be read, or the places of its tokens are not known.
    """
    walk = Walk(problem, scope, relu_product, last_factor=last_factor, encoder=encoder)
    replay = problem.replay
    with replay.capture(attention=walk.parts, visit=walk) as seen:
        walk.starts_at(next(iter(seen.tapped.get(walk.lowest_part, [])), ""))
        replay.score_and_grad(problem.whole, problem.score, image=problem.target)
    problem.advance(1, 1)
    grid, met = walk.painted(size)
    params = {"scope": scope, "last_factor": last_factor, "encoder": encoder, "size": list(grid.shape)}
    return finish(grid, met, params, diagnostics={"layers": walk.layers, "unreadable": dict(seen.unreadable)})
