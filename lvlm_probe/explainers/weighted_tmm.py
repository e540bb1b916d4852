"""T-MM whose heads, layers and words count by their relevance (after Shen, 2025, GLIMPSE).

With G_lh = ReLU(∂y/∂A_lh ⊙ A_lh), over all rows and keys of a layer::

    w_lh = softmax over h of (1/λ) · Σ G_lh / Σ ReLU(∂y/∂A_lh)     heads: how much attention falls where it helps
    E_l  = Σ_h w_lh G_lh,   S_l = Σ E_l,   α_l = S_l / Σ_l S_l      layers: their share of all relevance
    v   ← v + α_l v Ê_l                                             Ê_l: rows of E_l divided by their sums

from l = L down to 1. v starts at the positions that predict the words with g_t, the share of what is read there that is
read off the image (``gradient_attention``), so that words that come from text hardly count.

The sums of the layers have to be known before anything is carried through them, so there are two passes, one after the
other, each with one layer's attention at a time, as in T-MM. The paper's own layer and word weights could not be had:
these are what stands above.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvlm_probe.boxes.image_tokens import image_tokens
from lvlm_probe.explainers.attention_relevance import Walk, no_gradient, relu_products
from lvlm_probe.explainers.gradient_attention import Reading
from lvlm_probe.explainers.registry import Cost, Outcome, Problem, register
from lvlm_probe.explainers.scores import check_rules, finish
from lvlm_probe.models.precision import sum_dtype
from lvlm_probe.replaying.capture import AttentionLayer


def head_weights(layer: AttentionLayer, temperature: float) -> tuple[Tensor, float]:
    """w_lh, ``(view, head)`` float64 on the layer's device where it has that, and S_l; see the module."""
    wide = sum_dtype(layer.device)
    product = torch.zeros(layer.batch, layer.heads, dtype=wide, device=layer.device)
    positive = torch.zeros_like(product)
    for rows in layer.blocks():
        gradient = layer.weight_gradient(rows).clamp_(min=0)
        positive += gradient.sum(dim=(2, 3), dtype=wide)
        product += (gradient * layer.weights(rows)).sum(dim=(2, 3), dtype=wide)
    share = product / positive.clamp(min=torch.finfo(wide).tiny)
    weights = (share / temperature).softmax(dim=1)
    return weights, float((weights * product).sum())


@register(
    "weighted_tmm", needs=("passes", "gradients", "attention"), cost=lambda *_: Cost("relevance", 2, 2), clips=True
)
def weighted_tmm(problem: Problem, *, temperature: float = 1.0, size: int | tuple[int, int] | None = None) -> Outcome:
    """Explains by T-MM with weights. Two forward and two backward passes.

    Args:
        temperature: λ of the heads' softmax; small ones leave the head alone whose attention helps most.
        size: Grid of the heatmap, by default the tokens' own.

    Raises:
        ExplainError: The model's attention cannot be read, or the places of its tokens are not known.
    """
    check_rules("weighted_tmm", temperature=(temperature, 0 < temperature < float("inf"), "a number above 0"))
    replay = problem.replay
    reading = Reading(problem, image_tokens(replay, problem.target))
    heads: dict[str, Tensor] = {}
    totals: dict[str, float] = {}

    def weigh(layer: AttentionLayer) -> None:
        reading(layer)
        heads[layer.layer.module], totals[layer.layer.module] = head_weights(layer, temperature)

    with replay.capture(attention=["decoder"], visit=weigh):
        replay.score_and_grad(problem.whole, problem.score, image=problem.target)
    problem.advance(1, 2)
    total = sum(totals.values())
    if not total > 0:
        raise no_gradient("decoder")

    def bar(layer: AttentionLayer, rows: Tensor) -> Tensor:
        wide = sum_dtype(layer.device)
        product = relu_products(layer, rows).to(wide)
        fused = torch.einsum("vh,vhrk->vrk", heads[layer.layer.module].to(wide), product)
        return (
            totals[layer.layer.module] / total * fused / fused.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
        )

    walk = Walk(problem, "decoder", bar, shares=reading.shares)
    with replay.capture(attention=["decoder"], visit=walk) as seen:
        replay.score_and_grad(problem.whole, problem.score, image=problem.target)
    problem.advance(2, 2)
    grid, met = walk.painted(size)
    diagnostics = {
        "layers": walk.layers,
        "layer_weights": {module: round(own / total, 4) for module, own in totals.items()},
        "share_on_image": reading.shares.tolist(),
        "unreadable": dict(seen.unreadable),
    }
    return finish(grid, met, {"temperature": temperature, "size": list(grid.shape)}, diagnostics=diagnostics)
