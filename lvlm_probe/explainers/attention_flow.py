"""Attention flow (Abnar and Zuidema, 2020): how much could flow to each image token if attention were pipes.

Tokens of every layer are nodes, and position i of a layer is joined to position j of the layer below by a pipe as wide
as ½ mean_h A_ij, and ½ more where i = j, for the residual stream. The value of an image token is the greatest flow from
the positions that predict the words, in the top layer, to that token in the lowest: what rollout multiplies, flow lets
through side by side, and no pipe carries more than it holds. It does not know which word it explains.

One maximum flow for each image token, found by ``scipy.sparse.csgraph.maximum_flow`` on whole numbers: widths are
multiples of 2⁻²⁰. The attention of all layers is in the graph, mean over heads, so memory grows with layers × tokens²,
and time with that times the image tokens: for small models, or ``layers=``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lvlm_probe.attention.layers import discover
from lvlm_probe.boxes.image_tokens import image_tokens
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.attention_relevance import query_rows, same_views, whole_sequence
from lvlm_probe.explainers.registry import Cost, Outcome, Problem, register
from lvlm_probe.explainers.scores import check_rules, of_tokens, whole_rule
from lvlm_probe.extras import require
from lvlm_probe.models.precision import sum_dtype
from lvlm_probe.replaying.capture import AttentionLayer

UNIT = 2**20
"""Whole numbers for a width of 1: a mean attention weight below a millionth is no pipe."""
MOST_PIPES = 2 * 10**9
"""Pipes times image tokens, at most: tens of minutes on one core."""
_PACE = 0.6e-6
"""Seconds for a pipe and an image token: 0.1 µs to 0.7 µs on one core, the more the less evenly attention is spread."""


def flows(maps: list[Tensor], queries: Tensor, targets: Tensor) -> Tensor:
    """The greatest flow from some tokens of the top layer to each of some tokens of the lowest.

    Args:
        maps: attention of each layer, mean over heads, lowest first, ``(token, token)``.
        queries: ``(query,)`` int64, where it comes from, as much as each lets through.
        targets: ``(target,)`` int64.

    Returns:
        ``(target,)`` float64, in units of a width of 1.

    Raises:
        ProbeError: there is no scipy.
        ExplainError: there are more pipes than ``MOST_PIPES``.
    """
    sparse = require("scipy.sparse", extra="stats", purpose="attention flow")
    graph = require("scipy.sparse.csgraph", extra="stats", purpose="attention flow")
    length, depth = len(maps[0]), len(maps)
    rows, columns, widths = [], [], []
    for level, attention in enumerate(maps, start=1):
        wide = (UNIT * (attention + torch.eye(length, dtype=attention.dtype)) / 2).round().long()
        above, below = wide.nonzero(as_tuple=True)
        rows.append(above + level * length)
        columns.append(below + (level - 1) * length)
        widths.append(wide[above, below])
    source = (depth + 1) * length
    rows.append(torch.full_like(queries, source))
    columns.append(queries + depth * length)
    widths.append(torch.full_like(queries, UNIT))
    at, to, width = (torch.cat(parts).numpy() for parts in (rows, columns, widths))
    if len(at) * len(targets) > MOST_PIPES:
        raise ExplainError(
            f"attention flow solves {len(targets)} maximum flows over {len(at)} pipes each, which takes hours: give "
            f"fewer layers=…, or use 'rollout', which follows the same attention"
        )
    pipes = sparse.csr_matrix((width.astype("int32"), (at, to)), shape=(source + 1, source + 1))
    found = [graph.maximum_flow(pipes, source, int(target)).flow_value for target in targets]
    return torch.tensor(found, dtype=torch.float64) / UNIT


def _cost(problem: Problem, params: Mapping[str, Any]) -> Cost:
    depth = params["layers"] or len(discover(problem.replay.model)[0])
    pipes = depth * problem.replay.length * (problem.replay.length + 1) // 2
    # Maps in double precision, ends and widths of pipes as 64-bit numbers, and their joined copies.
    layout = problem.replay.trace.layout
    targets = len(layout.image_positions) // max(1, problem.replay.n_images)
    numbers = 2 * depth * problem.replay.length**2 + 12 * pipes
    return Cost("rollout", 1, 0, numbers=numbers, beside=_PACE * pipes * targets)


@register("attention_flow", needs=("passes", "attention"), cost=_cost, clips=True)
def attention_flow(
    problem: Problem, *, layers: int | None = None, size: int | tuple[int, int] | None = None
) -> Outcome:
    """Explains by attention flow. One forward pass, and a maximum flow for each image token.

    Args:
        layers: How many of the decoder's layers, from the top; by default all.
        size: Grid of the heatmap, by default the tokens' own.

    Raises:
        ExplainError: The model's attention cannot be read, the places of its tokens are not known, or its graph is too
            large.
        ProbeError: There is no scipy.
    """
    check_rules("attention_flow", layers=whole_rule(layers, or_none=True))
    replay = problem.replay
    tokens = image_tokens(replay, problem.target)
    with replay.capture(attention=["decoder"]) as seen, torch.no_grad():
        replay.log_probs(problem.whole, image=problem.target)
        maps = [_mean(layer, replay.length, replay.rows) for layer in seen.layers[-layers if layers else 0 :]]
    ((_, queries),) = list(query_rows(problem))[:1]
    values = flows(maps, queries.unique(), torch.from_numpy(tokens.positions))
    problem.advance(1, 1)
    diagnostics = {"layers": len(maps), "unreadable": dict(seen.unreadable)}
    return of_tokens(problem, values, tokens.boxes, size, {"layers": layers}, diagnostics=diagnostics)


def _mean(layer: AttentionLayer, length: int, views: int) -> Tensor:
    """The first sequence's attention of a whole layer, mean over heads, ``(token, token)`` float64 on the CPU."""
    whole_sequence(layer, length)
    same_views(layer, layer.batch, views)
    wide = sum_dtype(layer.device)
    return torch.cat([layer.weights(rows)[0].mean(dim=0, dtype=wide).cpu() for rows in layer.blocks()]).double()
