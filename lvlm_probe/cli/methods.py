"""``lvlm-probe methods``: the explainers there are, and what each takes to run."""

from __future__ import annotations

import inspect
from typing import Any

from lvlm_probe.cli.shared.options import Json
from lvlm_probe.cli.shared.terminal import one_line, print_json, quiet_libraries, say, wrapped

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
        for line in wrapped(row["summary"], indent=width):
            say(" " * width, (line, "dim"))
    say("")
    say(("With the parameters of each:  lvlm-probe methods --json", "dim"))


def _describe(name: str) -> dict[str, Any]:
    from lvlm_probe.explainers import needs_of
    from lvlm_probe.explainers.registry import resolve, summary_of

    function, needs = resolve(name), needs_of(name)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a plugin's, in C
        parameters = []
    return {
        "method": name,
        "needs": sorted(needs, key=_ORDER.index),
        "trace_alone": not {"passes", "gradients"} & needs,
        "summary": summary_of(name),
        "parameters": [item.name for item in parameters if item.kind is inspect.Parameter.KEYWORD_ONLY],
    }
