"""The cost of a method with given parameters: as its file declares it, or by what it needs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lvlm_probe.explainers.registry import METHODS, Cost, Kind, Problem, find

__all__ = ["Cost", "cost_of"]


def cost_of(method: str, problem: Problem, params: Mapping[str, Any]) -> Cost:
    """What a registered method asks of the model with these parameters. Raises ``ExplainError`` for an unknown one.

    Of a method that declares no cost the number of passes is not known.
    """
    function = find(method)
    rule, needs = METHODS[method].cost, METHODS[method].needs
    if rule is not None:
        parameters = inspect.signature(function).parameters.values()
        defaults = {item.name: item.default for item in parameters if item.default is not item.empty}
        return rule(problem, {**defaults, **params})
    if "gradients" in needs:
        kind: Kind = "relevance" if "attention" in needs else "activations" if "activations" in needs else "gradient"
        return Cost(kind)
    if "attention" in needs:
        return Cost("rollout")
    return Cost("hidden" if "activations" in needs else "forward" if "passes" in needs else None)
