"""What each method asks of the model: how many passes, how many masks at once, and what it keeps beside them.

``plan`` turns these into bytes and seconds with what it measures on the model at hand. A method without an entry (a
plugin's, unless it calls ``declare``) is planned by what it needs alone, and its number of passes is not known.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lvlm_probe.explainers.registry import Problem, find, needs_of

if TYPE_CHECKING:
    from lvlm_probe.planning.rehearsal import Kind

__all__ = ["Cost", "cost_of", "declare"]


@dataclass(frozen=True)
class Cost:
    """What a method asks of the model.

    Attributes:
        kind: What it does with a pass, see ``planning.probes``; ``None`` where it runs none.
        forward, backward: Pictures through the model; ``None`` where that is not known.
        groups: Numbers of masks that it hands over at once.
        splits: Whether they may go through in smaller micro-batches.
        noise: Deviation of the noise on pixels.
        numbers: Numbers in single precision that it keeps itself while a pass runs.
        about: The passes depend on the picture; the figures are an estimate.
        parts: Whose attention it reads.
        grids: Sizes ``(row, col)`` of the masks it sends.
        queries: Of how many of the answer's positions it reads attention rows; by default of all.
        joined: Of attention and its gradients it multiplies means over the masks, not those of every mask.
        general: Another question that it asks, and the question in whose place; ``None`` where it asks none.
    """

    kind: Kind | None
    forward: int | None = None
    backward: int | None = None
    groups: tuple[int, ...] = (1,)
    splits: bool = True
    noise: float = 0.0
    numbers: int = 0
    about: bool = False
    parts: tuple[Any, ...] = ("decoder",)
    grids: tuple[tuple[int, int], ...] = ((1, 1),)
    queries: int | None = None
    joined: bool = False
    general: tuple[str, str | None] | None = None


Rule = Callable[[Problem, Mapping[str, Any]], Cost]
_RULES: dict[str, Rule] = {}


def declare(*names: str) -> Callable[[Rule], Rule]:
    """Registers how the cost of methods is found: a function of the problem (its picture; no selection yet) and of all
    their parameters, defaults included."""

    def decorate(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return decorate


def cost_of(method: str, problem: Problem, params: Mapping[str, Any]) -> Cost:
    """What a registered method asks of the model with these parameters. Raises ``ExplainError`` for an unknown one."""
    rule = _RULES.get(method)
    if rule is not None:
        return rule(problem, {**_defaults(method), **params})
    needs = needs_of(method)
    if "gradients" in needs:
        kind: Kind = "relevance" if "attention" in needs else "activations" if "activations" in needs else "gradient"
        return Cost(kind)
    if "attention" in needs:
        return Cost("rollout")
    return Cost("hidden" if "activations" in needs else "forward" if "passes" in needs else None)


def _defaults(method: str) -> dict[str, Any]:
    parameters = inspect.signature(find(method)).parameters.values()
    return {item.name: item.default for item in parameters if item.default is not item.empty}


def _cells(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _parts(params: Mapping[str, Any]) -> tuple[Any, ...]:
    scope = params.get("scope", "decoder")
    return ("decoder", "encoder") if scope == "both" else (scope,)


@declare("igos++")
def _igos(problem: Problem, params: Mapping[str, Any]) -> Cost:
    from lvlm_probe.explainers.igos.settings import PRESETS

    preset = PRESETS.get(str(params.get("preset")), PRESETS["default"])
    known = {item.name for item in dataclasses.fields(preset)}
    settings = dataclasses.replace(preset, **{key: value for key, value in params.items() if key in known})
    at_once = 2 * settings.masks * settings.ig_steps
    levels = 2 * (settings.refine_levels or len(settings.levels)) if settings.refine else 0
    shape = problem.grid(settings.size)
    grids = [shape]
    if levels:
        grids.insert(0, (shape[0] * settings.refine_scale, shape[1] * settings.refine_scale))
    passes = at_once * settings.iterations + levels * settings.refine
    groups = (at_once, levels) if levels else (at_once,)
    forward = None if settings.line_search else passes  # it tries steps until one is good
    return Cost(
        "gradient", forward, passes, groups, noise=settings.noise, numbers=3 * at_once * _cells(shape),
        grids=tuple(grids),
    )  # fmt: skip


@declare("igos+")
def _igos_plus(problem: Problem, params: Mapping[str, Any]) -> Cost:
    return _igos(problem, {"preset": "paper", "refine": 0, **params, "masks": 1})


@declare("integrated_gradients")
def _integrated(problem: Problem, params: Mapping[str, Any]) -> Cost:
    steps, batch = params["steps"], params["batch"]
    groups = tuple(sorted({min(batch, steps), steps % batch or batch}))
    shape = problem.grid(params["size"])
    return Cost("gradient", steps + 2, steps, groups, numbers=2 * min(batch, steps) * _cells(shape), grids=(shape,))


@declare("input_gradient")
def _slope(problem: Problem, params: Mapping[str, Any]) -> Cost:
    return Cost("gradient", 1, 1, grids=(problem.grid(params["size"]),))


@declare("tmm")
def _tmm(_problem: Problem, params: Mapping[str, Any]) -> Cost:
    return Cost("relevance", 1, 1, parts=_parts(params))


@declare("iia")
def _iia(_problem: Problem, params: Mapping[str, Any]) -> Cost:
    paper = params["variant"] == "paper"
    points = params["points"] or (11 if paper else 6)
    batch = points if paper else points * points
    extra = int(not paper and params["scope"] == "encoder")
    return Cost(
        "relevance", batch + extra, batch + extra, (batch,), splits=False, parts=_parts(params), joined=paper
    )  # fmt: skip


@declare("rollout")
def _rollout(_problem: Problem, params: Mapping[str, Any]) -> Cost:
    if params["scope"] == "decoder":
        return Cost("rollout", 1, 0)
    return Cost("relevance", 1, 1, parts=_parts(params))


@declare("gradcam")
def _gradcam(_problem: Problem, _params: Mapping[str, Any]) -> Cost:
    return Cost("activations", 1, 1)


@declare("attention")
def _attention(problem: Problem, params: Mapping[str, Any]) -> Cost:
    rows = getattr(problem.trace, "attention", None)
    wanted = params.get("heads", "all")
    if params.get("source", "auto") != "replay" and rows is not None and (wanted == "all" or rows.reduce == "none"):
        # Recorded rows, and copies of the steps and of the layers that are averaged, all in double precision.
        return Cost(None, 0, 0, (), numbers=3 * 2 * rows.values.size)
    return Cost("rows", 1, 0, parts=(_of_image(problem),))


@declare("relative_attention")
def _relative(problem: Problem, params: Mapping[str, Any]) -> Cost:
    own = _attention(problem, {"heads": params.get("heads", "all")})
    more = int(params.get("reference") is None)
    general = (params["general"], params.get("question")) if more else None
    # Where the answer's own rows were recorded, those of the general prompt's last position are all that is read. The
    # recorded ones are averaged by then.
    queries = 1 if more and not own.forward else None
    return Cost(
        "rows", (own.forward or 0) + more, 0, numbers=own.numbers // 3, parts=(_of_image(problem),), general=general,
        queries=queries,
    )  # fmt: skip


def _of_image(problem: Problem) -> str:
    return "decoder" if len(problem.trace.layout.image_positions) else "cross"


@declare("tam")
def _tam(problem: Problem, _params: Mapping[str, Any]) -> Cost:
    from lvlm_probe.replaying.hidden_states import HIDDEN, ROWS

    if {HIDDEN, ROWS} <= set(getattr(problem.trace, "points", ())):
        numbers = sum(math.prod(problem.trace.point(name).values.shape) for name in (HIDDEN, ROWS))
        return Cost(None, 0, 0, (), numbers=3 * numbers)
    return Cost("hidden", 1, 0)


@declare("rise")
def _rise(problem: Problem, params: Mapping[str, Any]) -> Cost:
    masks, batch = params["masks"], params["batch"]
    shape = problem.grid(params["size"], cells=1024)
    groups = tuple(sorted({min(batch, masks), masks % batch or batch}))
    return Cost("forward", masks, 0, groups, numbers=2 * min(batch, masks) * _cells(shape), grids=(shape,))


@declare("occlusion")
def _occlusion(problem: Problem, params: Mapping[str, Any]) -> Cost:
    shape, batch = problem.grid(params["size"]), params["batch"]
    down, right = (-(-(edge + params["patch"] - 1) // params["stride"]) for edge in shape)
    masks = 1 + down * right
    groups = tuple(sorted({min(batch, masks), masks % batch or batch}))
    return Cost("forward", masks, 0, groups, numbers=3 * masks * _cells(shape), grids=(shape,))


@declare("greedy")
def _greedy(problem: Problem, params: Mapping[str, Any]) -> Cost:
    regions, batch = params["regions"], params["batch"]
    count = regions if isinstance(regions, int) else regions[0] * regions[1]
    width, height = problem.replay.image_sizes[problem.image]
    scale = min(1.0, 224 / max(width, height)) if params["segments"] == "slic" else 0.0
    shape = (round(height * scale), round(width * scale)) if scale else problem.grid(None, cells=count)
    if params["search"] == "exact":
        passes = count * (count + 1) + 2
    else:
        left, rounds, sets = count, 0, 1
        while left > 0:
            sets += left if rounds % params["rescan"] == 0 else min(params["top"], left)
            left -= 1
            if left and params["pending"]:
                sets += min(params["pending"], left)
                left -= 1
            rounds += 1
        passes = 2 * (sets + count // 2)
    numbers = (batch // 2 + count) * _cells(shape)
    return Cost("forward", passes, 0, (min(batch, 2 * count),), numbers=numbers, about=True, grids=(shape,))


@declare("center", "random")
def _floor(_problem: Problem, _params: Mapping[str, Any]) -> Cost:
    return Cost(None, 0, 0, ())
