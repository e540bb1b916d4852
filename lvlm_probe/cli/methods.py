"""``lvlm-probe methods``: the explainers there are, and what each takes to run."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from lvlm_probe.cli.shared.options import Json
from lvlm_probe.cli.shared.terminal import one_line, print_json, quiet_libraries, say

__all__ = ["RUNS_BARE", "methods"]

RUNS_BARE = True

_ORDER = ("passes", "gradients", "attention", "activations")


def methods(as_json: Json = False) -> None:
    """List the methods that explain and evaluate take, those of plugins included, and what each needs.

    Passes: forward passes of the model. Gradients: backward passes. Attention, activations: what is read inside it.
    "Trace alone": it also runs without the model, where the trace holds what it reads.

    Example:  lvlm-probe methods --json
    """
    quiet_libraries()
    from lvlm_probe.explainers import methods as known

    rows = [_describe(name) for name in known()]
    if as_json:
        print_json(rows)
        return
    width = max(len(row["method"]) for row in rows) + 2
    for row in rows:
        needs = ", ".join(row["needs"]) or "nothing"
        alone = ("  trace alone", "green") if row["trace_alone"] else ""
        say((one_line(row["method"]).ljust(width), "bold"), ("needs ", "dim"), needs, alone)
        say(" " * width, (row["summary"], "dim"))
    say("")
    say(("With the parameters of each:  lvlm-probe methods --json", "dim"))


def _describe(name: str) -> dict[str, Any]:
    from lvlm_probe.explainers import needs_of
    from lvlm_probe.explainers.registry import find

    function, needs = find(name), needs_of(name)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a plugin's, in C
        parameters = []
    return {
        "method": name,
        "needs": sorted(needs, key=_ORDER.index),
        "trace_alone": not {"passes", "gradients"} & needs,
        "summary": _summary(function),
        "parameters": [item.name for item in parameters if item.kind is inspect.Parameter.KEYWORD_ONLY],
    }


def _summary(function: Callable[..., Any]) -> str:
    """The first sentence of a method's documentation.

    Our own modules say at the top what their method is, and the function what it takes; where several methods share a
    module, each function says it, unless it points to the module.
    """
    from lvlm_probe.explainers import registry

    own = inspect.getdoc(function) or ""
    home = str(getattr(function, "__module__", ""))
    module = sys.modules.get(home)
    alone = sum(getattr(registry.find(name), "__module__", "") == home for name in registry.names()) == 1
    ours = home.startswith("lvlm_probe.")
    if ours and (alone or "module's docstring" in own.split("\n\n")[0]):
        own = inspect.getdoc(module) or own
    paragraph = own.split("\n\n")[0].replace("\n", " ").replace("``", "").strip()
    # Not at "Eq. 2" or "et al. (2021)": a sentence goes on with a capital.
    return re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[0] or "(no description)"
