"""Token activation map (Li et al., 2025): what the final hidden states of the image tokens say of a word's own class.

The map of a token k is m = ReLU(w_k · h_i) over the image tokens i, w_k its row of the LM head and h the decoder's
final hidden states. What earlier tokens of the context have in common with it interferes, and is taken away::

    I = Σ_j u_j m_j          over earlier tokens j of another text, u_j = ReLU(w_k · h_j) / Σ_j ReLU(w_k · h_j)
    m ← ReLU(m − s I)        s = ⟨m, I⟩ / ⟨I, I⟩, the minimiser of ‖m − s I‖²

A rank-Gaussian filter then takes out single cells: in every 3 × 3 window the values are sorted and averaged with
Gaussian weights around the middle rank, whose width in ranks is the window's coefficient of variation (standard
deviation over mean), so that an even window gives its median.

No gradient and one pass, or none: ``record(points=["hidden"])`` keeps the hidden states and the rows of the head, and
the trace alone is enough. Several selected tokens: the mean of their maps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lvlm_probe.boxes.image_tokens import image_tokens
from lvlm_probe.boxes.painting import paint, pitch
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.registry import Cost, Outcome, Problem, register
from lvlm_probe.explainers.scores import finish
from lvlm_probe.replaying.hidden_states import HIDDEN, ROWS, head_rows, hidden_states, text_tokens


def _cost(problem: Problem, _params: Mapping[str, Any]) -> Cost:
    if {HIDDEN, ROWS} <= set(getattr(problem.trace, "points", ())):
        numbers = sum(math.prod(problem.trace.point(name).values.shape) for name in (HIDDEN, ROWS))
        return Cost(None, 0, 0, (), numbers=3 * numbers)
    return Cost("hidden", 1, 0)


@register("tam", needs=["activations"], cost=_cost, clips=True)
def tam(
    problem: Problem, *, interference: bool = True, filtered: bool = True, size: int | tuple[int, int] | None = None
) -> Outcome:
    """Explains by the token activation map. One forward pass, or none on a trace with ``points=["hidden"]``.

    Args:
        interference: Take away what the map shares with those of earlier tokens.
        filtered: Rank-Gaussian filter.
        size: Grid of the heatmap, by default the tokens' own, which is also the one that is filtered.

    Raises:
        ExplainError: Nothing was recorded and no model is at hand, the model has no plain LM head, or the places of its
            image tokens are not known.
    """
    tokens = image_tokens(problem.replay, problem.target, live=problem.live)
    states = _states(problem)
    own = pitch(tokens.boxes, tokens.size)
    shape = own if size is None else problem.shape(size)
    total = torch.zeros(own, dtype=torch.float64)
    scales: list[float] = []
    met = torch.ones(own, dtype=torch.bool)
    for step in problem.selection.indices:
        values, scale = _map(states, torch.from_numpy(tokens.positions), step, interference)
        scales.append(scale)
        grid, met = paint(values, tokens.boxes, tokens.size, own)
        total += _filtered(grid, met) if filtered else grid
    if shape != own:
        mode = "bilinear" if problem.clip is None else "trilinear"
        total = functional.interpolate(total[None, None], size=shape, mode=mode, align_corners=False)[0, 0]
        met = problem.seen(shape)
    params = {"interference": interference, "filtered": filtered, "size": list(shape)}
    return finish(total / len(scales), met, params, diagnostics={"interference_scale": scales, "source": states.source})


@dataclass(frozen=True)
class _States:
    """Hidden states ``(position, channel)``; the head's rows of the text tokens ``(text_token, channel)``, their
    positions in prompt + answer, and their ids."""

    hidden: Tensor
    rows: Tensor
    positions: Tensor
    ids: Tensor
    prompt_length: int
    source: str


def _states(problem: Problem) -> _States:
    trace = problem.trace
    positions, ids = text_tokens(trace.input_ids, trace.layout.image_positions, trace.token_ids)
    prompt = len(trace.input_ids)
    if {HIDDEN, ROWS} <= set(getattr(trace, "points", ())):
        hidden, rows = (torch.as_tensor(trace.point(name).values).double() for name in (HIDDEN, ROWS))
        if hidden.shape[0] != prompt + len(trace.token_ids) - 1 or rows.shape[0] != len(ids):
            raise ExplainError(f"{trace.path.name}: its hidden states do not fit its tokens; record it again")
        return _States(hidden, rows, positions, ids, prompt, "recorded")
    if not problem.live:
        raise ExplainError(
            "this trace holds no hidden states: record with points=['hidden'], or explain a replay, which computes them"
        )
    hidden = hidden_states(problem.replay).double()
    rows = head_rows(problem.replay.model, ids).double()
    problem.advance(1, 1)
    return _States(hidden, rows, positions, ids, prompt, "replay")


def _map(states: _States, image: Tensor, step: int, interference: bool) -> tuple[Tensor, float]:
    """The map of answer token ``step`` over the image tokens, and s."""
    at = states.prompt_length + step
    mine = int((states.positions == at).nonzero()[0, 0])
    visual = states.hidden[image]
    values = (visual @ states.rows[mine]).clamp(min=0)
    earlier = (states.positions < at) & (states.ids != states.ids[mine])
    if not interference or not bool(earlier.any()):
        return values, 0.0
    share = (states.hidden[states.positions[earlier]] @ states.rows[mine]).clamp(min=0)
    if float(share.sum()) <= 0:
        return values, 0.0
    others = (visual @ states.rows[earlier].T).clamp(min=0)
    shared = others @ (share / share.sum())
    scale = interference_scale(values, shared)
    return (values - scale * shared).clamp(min=0), scale


def _filtered(grid: Tensor, met: Tensor) -> Tensor:
    """The filter within the part of the image that has tokens: the margins of a crop are no values of 0. Of a clip step
    by step, since neighbours in time need not show the same."""
    if grid.ndim == 3:
        return torch.stack([_filtered(*step) if step[1].any() else step[0] for step in zip(grid, met, strict=True)])
    rows, cols = (met.any(dim=axis).nonzero()[:, 0] for axis in (1, 0))
    inside = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1)
    smooth = torch.zeros_like(grid)
    smooth[inside] = rank_gaussian(grid[inside])
    return smooth


def interference_scale(values: Tensor, interference: Tensor) -> float:
    """s = ⟨m, I⟩ / ⟨I, I⟩, which makes ‖m − s I‖² smallest; 0 where there is no interference."""
    power = float(interference @ interference)
    return float(values @ interference) / power if power > 0 else 0.0


def rank_gaussian(grid: Tensor) -> Tensor:
    """The rank-Gaussian filter over 3 × 3 windows, edges repeated; ``(row, col)`` → ``(row, col)`` float64."""
    padded = functional.pad(grid.double()[None, None], (1, 1, 1, 1), mode="replicate")
    windows = functional.unfold(padded, 3)[0].T.sort(dim=1).values  # (cell, 9)
    mean = windows.mean(dim=1, keepdim=True)
    width = windows.std(dim=1, unbiased=False, keepdim=True) / mean.clamp(min=1e-12)
    rank = torch.arange(-4, 5, dtype=torch.float64)
    weights = torch.exp(-0.5 * (rank / width.clamp(min=1e-6)) ** 2)
    smooth: Any = (weights * windows).sum(dim=1) / weights.sum(dim=1)
    return smooth.reshape(grid.shape)
