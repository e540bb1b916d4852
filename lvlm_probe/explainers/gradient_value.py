"""Values of the vision encoder weighted by the gradient to its attention's output and by who reads them (after Zhao et
al., 2024, Grad-ECLIP).

In the last attention layer of the vision encoder that the language model reads, O_j = Σ_i A_ji V_i. The gradient of the
words' log-likelihood y to O_j says which channels of the values count, and λ_ji how much token j has of token i::

    map_i = | Σ_j Σ_c ∂y/∂O_jc λ_ji V_ic |

``weights="attention"`` has λ = A, head by head: the columns of A ⊙ ∂y/∂A. ``weights="cosine"`` is Grad-ECLIP's
loosened attention: the cosine of the query of token j and the key of token i, all heads as one vector, from the least
over i as 0 to the greatest as 1, because softmax leaves a few keys and nothing of the others. Grad-ECLIP also cuts
negative sums to 0 (``sign="positive"``), and is written for CLIP's class token, the one query that its score reads; a
language model reads every token of the encoder, so all are summed. (Cui and Fan, 2026, show that it can be written as a
method over attention, and doubt the loosened weights: they are not the model's.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from lvlm_probe.boxes.encoder_tokens import tokens_that_read
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.attention_relevance import one_sequence, same_views, whole_sequence
from lvlm_probe.explainers.registry import Cost, Outcome, Problem, register
from lvlm_probe.explainers.scores import Sign, check_rules, of_tokens, sign_rule
from lvlm_probe.models.precision import sum_dtype
from lvlm_probe.replaying.capture import AttentionLayer

Weights = Literal["attention", "cosine"]


def columns_of(layer: AttentionLayer, live: Tensor, weights: Weights) -> Tensor:
    """Σ_j Σ_c ∂y/∂O_jc λ_ji V_ic of one layer, one call, before any sign, ``(view, key)``; see the module.

    Args:
        live: ``(view, key)`` bool, tokens that stand for a part of the image; the least and the greatest cosine are
            looked for among them.
    """
    wide = sum_dtype(layer.device)
    total = torch.zeros(layer.batch, layer.keys, dtype=wide, device=layer.device)
    query, key = (_as_one(part, layer.heads) for part in (layer.query, layer.key))
    there = live.to(layer.device)[:, None]
    for rows in layer.blocks():
        gradient = layer.weight_gradient(rows)
        if weights == "attention":
            total += (gradient * layer.weights(rows)).sum(dim=(1, 2), dtype=wide)
            continue
        alike = query[:, rows] @ key.transpose(1, 2)  # (view, row, key)
        low = alike.masked_fill(~there, torch.inf).amin(dim=-1, keepdim=True)
        high = alike.masked_fill(~there, -torch.inf).amax(dim=-1, keepdim=True)
        loose = ((alike - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        total += (gradient.sum(dim=1) * loose).sum(dim=1, dtype=wide)
    return total


def _as_one(part: Tensor, heads: int) -> Tensor:
    """Queries or keys, ``(view, head, token, channel)``, of all heads as one vector of length 1."""
    each = part.float().repeat_interleave(heads // part.shape[1], dim=1)
    return functional.normalize(each.transpose(1, 2).flatten(2), dim=-1)


def _cost(_problem: Problem, _params: Mapping[str, Any]) -> Cost:
    return Cost("relevance", 1, 1, parts=("encoder",))


@register("gradient_value", needs=("passes", "gradients", "attention"), cost=_cost, clips=True)
def gradient_value(
    problem: Problem,
    *,
    weights: Weights = "attention",
    sign: Sign = "absolute",
    encoder: int | str = 0,
    size: int | tuple[int, int] | None = None,
) -> Outcome:
    """Explains by values, weighted. One forward and one backward pass.

    Args:
        weights: ``"attention"`` or ``"cosine"``, see the module.
        sign: ``"absolute"``, or ``"positive"``, which cuts what speaks against the words to 0.
        encoder: Number or name of the vision encoder, where there are several.
        size: Grid of the heatmap, by default the tokens' own.

    Raises:
        ExplainError: The encoder's attention cannot be read, or the places of its tokens are not known.
    """
    check_rules(
        "gradient_value",
        weights=(weights, weights in get_args(Weights), "'attention' or 'cosine'"),
        sign=sign_rule(sign),
    )
    replay = problem.replay
    one_sequence(problem, "give alternatives of a single token")
    tokens = tokens_that_read(replay, encoder, problem.target)
    shape = tokens.shape if len(tokens.shape) == 2 else (1, *tokens.shape)
    live = torch.from_numpy(tokens.live).reshape(shape)
    total = torch.zeros(shape, dtype=torch.float64)
    read: list[str] = []

    def visit(layer: AttentionLayer) -> None:
        # Backward arrives at the last layer first; it comes once for each window.
        if layer.part != tokens.encoder or (read and layer.layer.module != read[0]):
            return
        whole_sequence(layer, shape[1])
        same_views(layer, layer.batch, shape[0])
        read.append(layer.layer.module)
        mine = slice(layer.start, layer.start + layer.keys)
        total[:, mine] += columns_of(layer, live[:, mine], weights).cpu().double()

    with replay.capture(attention=["encoder"], visit=visit):
        replay.score_and_grad(problem.whole, problem.score, image=problem.target)
    problem.advance(1, 1)
    if not read:
        raise ExplainError(f"no gradient of the score reaches the attention of {tokens.encoder}")
    values = total.abs() if sign == "absolute" else total.clamp(min=0)
    params = {"weights": weights, "sign": sign, "encoder": encoder}
    return of_tokens(problem, values[live], tokens.boxes[tokens.live], size, params, diagnostics={"layer": read[0]})
