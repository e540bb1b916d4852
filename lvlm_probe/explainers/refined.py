"""Any method's map, averaged over scales and less what earlier words' maps account for (after Liang et al., 2025, MSEA
and ARC).

Single cells stand out of maps for no reason, and a word's map has in it what the words before it have. So the map m of
``of=`` is averaged with itself in windows of s × s cells, s in ``scales``, and, with ``earlier=n``, the combination of
the maps m_j of the last n earlier words that comes closest to it is taken away::

    m̃ = mean over s of (mean of m in the window of s × s cells around each)
    m ← ReLU(m̃ − Σ_j s_j m̃_j),   s = argmin ‖m̃ − Σ_j s_j m̃_j‖², s_j ≥ 0

It is what TAM does for its own maps, for those of any method. The published scales are of the model's input, and the
published weights of earlier words compare the model's predictions; here both are made of maps alone, so that scales
cost nothing and each earlier word costs a map. Where earlier words name the same object, taking their maps away takes
the object away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.registry import (
    METHODS,
    Cost,
    Outcome,
    Problem,
    check_parameters,
    cost_of,
    follows_score,
    needs_of,
    register,
    resolve,
)
from lvlm_probe.explainers.scores import check_rules, finish, whole_rule
from lvlm_probe.selection import select_tokens


def over_scales(values: Tensor, scales: Sequence[int]) -> Tensor:
    """The mean of moving averages over windows of these sizes, edges repeated.

    Args:
        values: ``(row, col)``, or of a clip ``(t, row, col)``, step by step.
        scales: sides of the windows, cells.
    """
    frames = values.reshape(-1, 1, *values.shape[-2:])
    total = torch.zeros_like(frames)
    for side in scales:
        before, after = (side - 1) // 2, side // 2
        padded = functional.pad(frames, (before, after, before, after), mode="replicate")
        total += functional.avg_pool2d(padded, side, stride=1)
    return (total / len(scales)).reshape(values.shape)


def accounted_for(values: Tensor, others: Tensor) -> Tensor:
    """s of the module: the nonnegative combination of other maps that comes closest to a map, by coordinate descent.

    Args:
        values: ``(cell,)`` float64.
        others: ``(map, cell)``.

    Returns:
        ``(map,)`` float64. Convex, so that where it stands still is where it is least.
    """
    products, onto = others @ others.T, others @ values
    weights = torch.zeros_like(onto)
    for _ in range(10_000):
        before = weights.clone()
        for j in range(len(weights)):
            if products[j, j] > 0:
                rest = onto[j] - products[j] @ weights + products[j, j] * weights[j]
                weights[j] = (rest / products[j, j]).clamp(min=0)
        if float((weights - before).abs().max()) <= 1e-12:
            break
    return weights


def _cost(problem: Problem, params: Mapping[str, Any]) -> Cost:
    own = cost_of(params["of"], problem, params["params"] or {})
    times = 1 + params["earlier"]
    return dataclasses.replace(
        own,
        forward=None if own.forward is None else own.forward * times,
        backward=None if own.backward is None else own.backward * times,
        about=own.about or times > 1,
    )


@register("refined", cost=_cost, clips=True)
def refined(
    problem: Problem,
    *,
    of: str = "attention",
    scales: Sequence[int] = (1, 3),
    earlier: int = 0,
    params: Mapping[str, Any] | None = None,
) -> Outcome:
    """Explains by another method's map, refined. As many passes as that takes, times one more than the earlier words.

    Args:
        of: The method whose maps are refined.
        scales: Windows to average in, cells; 1 is the map itself.
        earlier: How many words in front of the explained ones to take the maps of away, at most.
        params: Parameters of that method.

    Raises:
        ExplainError: That method does not exist, cannot run here or made no map, or a parameter is out of range.
    """
    check_rules(
        "refined",
        of=(of, isinstance(of, str) and of != "refined", "the name of another method"),
        scales=(scales, _are_sides(scales), "a list of window sizes, whole numbers of at least 1"),
        earlier=whole_rule(earlier, 0),
        params=(params, params is None or isinstance(params, Mapping), "parameters by name"),
    )
    given = dict(params or {})
    _check(problem, of, given)
    words = _earlier(problem, earlier)
    maps: list[Tensor] = []
    own: Outcome | None = None
    for done, indices in enumerate((None, *words), start=1):
        selection = problem.selection if indices is None else select_tokens(problem.replay, indices=indices)
        outcome = resolve(of)(dataclasses.replace(problem, selection=selection, progress=None), **given)
        own = own or outcome
        if outcome.values is None and indices is None:
            return dataclasses.replace(outcome, params=_params(of, scales, earlier, outcome))
        if outcome.values is not None:
            maps.append(over_scales(outcome.values.double(), scales))
        problem.advance(done, 1 + len(words))
    assert own is not None
    values, others = maps[0], maps[1:]
    weights = torch.zeros(0, dtype=torch.float64)
    if others:
        stacked = torch.stack(others).flatten(1)
        weights = accounted_for(values.flatten(), stacked)
        values = (values.flatten() - weights @ stacked).clamp(min=0).reshape(values.shape)
    seen = problem.seen(tuple(values.shape))
    diagnostics = {"of": dict(own.diagnostics), "earlier_words": len(others), "taken_away": weights.tolist()}
    return finish(values, seen, _params(of, scales, earlier, own), diagnostics=diagnostics)


def _are_sides(scales: object) -> bool:
    return isinstance(scales, (list, tuple)) and len(scales) > 0 and all(whole_rule(side)[1] for side in scales)


def _params(of: str, scales: Sequence[int], earlier: int, own: Outcome) -> dict[str, Any]:
    return {"of": of, "scales": list(scales), "earlier": earlier, "params": dict(own.params)}


def _check(problem: Problem, of: str, given: Mapping[str, Any]) -> None:
    check_parameters(of, resolve(of), given)
    missing = sorted(needs_of(of) - problem.replay.offers)
    if missing:
        raise ExplainError(f"{of} needs {' and '.join(missing)} of the model, which is not at hand: give another of=…")
    if problem.clip is not None and not METHODS[of].clips:
        raise ExplainError(f"{of} takes no video: give another of=…")
    if problem.selection.score is not None and not follows_score(of):
        raise ExplainError(f"{of} follows no score, so it has no map of {problem.selection.score.name!r}")
    if "gradients" in needs_of(of):
        problem.replay.require_gradients()


def _earlier(problem: Problem, most: int) -> list[list[int]]:
    """Tokens of the words in front of the first explained one that are not written as one of those is."""
    first, words = min(problem.selection.indices), problem.replay.words
    mine = {word.text for word in words if not set(range(word.start, word.stop)).isdisjoint(problem.selection.indices)}
    before = [word for word in words if word.stop <= first and word.text not in mine]
    return [list(range(word.start, word.stop)) for word in before[max(0, len(before) - most) :]] if most else []
