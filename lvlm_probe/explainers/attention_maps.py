"""Raw attention of the answer's words to the image, and the same relative to a general question.

Rows are read where a word is predicted: position P + t − 1 for token t, over the image tokens. A trace that recorded
them is enough; otherwise one pass of the replay computes them, for these rows only.

**Sinks.** Some image tokens draw attention from every position whatever is asked (Kang et al., 2025). ``sinks="drop"``
looks at how much every image token gets from the answer's positions that are *not* explained; tokens more than
`SINK_DEVIATIONS` standard deviations above the mean of that are sinks, and their values become the median of the
others.

**Relative attention** divides by the attention that a general prompt gives the same token (Zhang et al., 2025): what
any question looks at, sinks first of all, cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lvlm_probe.boxes.image_tokens import ImageTokens, image_tokens
from lvlm_probe.errors import ExplainError, ReplayError
from lvlm_probe.explainers.registry import Cost, Outcome, Problem, register
from lvlm_probe.explainers.scores import of_tokens
from lvlm_probe.replaying import Replay
from lvlm_probe.trace import Trace

SINK_DEVIATIONS = 3.0
GENERAL_PROMPT = "Write a general description of the image."

Layers = Literal["all", "first", "middle", "last"] | str | int | Sequence[int]
Heads = Literal["all"] | int | str | Sequence[int] | Sequence[str]
Sinks = Literal["keep", "drop"]
Source = Literal["auto", "recorded", "replay"]


@dataclass(frozen=True)
class _Rows:
    """Attention of all answer positions to one image's tokens: ``(step, layer, head, token)``; layer numbers."""

    values: Tensor
    layers: tuple[int, ...]
    source: str


def _cost(problem: Problem, params: Mapping[str, Any]) -> Cost:
    rows = getattr(problem.trace, "attention", None)
    wanted = params.get("heads", "all")
    if params.get("source", "auto") != "replay" and rows is not None and (wanted == "all" or rows.reduce == "none"):
        # Recorded rows, and copies of the steps and of the layers that are averaged, all in double precision.
        return Cost(None, 0, 0, (), numbers=3 * 2 * rows.values.size)
    return Cost("rows", 1, 0, parts=(_read_part(problem),))


def _relative_cost(problem: Problem, params: Mapping[str, Any]) -> Cost:
    own = _cost(problem, {"heads": params.get("heads", "all")})
    more = int(params.get("reference") is None)
    # Where the answer's own rows were recorded, those of the general prompt's last position are all that is read. The
    # recorded ones are averaged by then.
    return Cost(
        "rows",
        (own.forward or 0) + more,
        0,
        numbers=own.numbers // 3,
        parts=(_read_part(problem),),
        general=(params["general"], params.get("question")) if more else None,
        queries=1 if more and not own.forward else None,
    )


def _read_part(problem: Problem) -> str:
    return "decoder" if len(problem.trace.layout.image_positions) else "cross"


@register("attention", needs=["attention"], cost=_cost, takes=("rows",), clips=True)
def attention(
    problem: Problem,
    *,
    layers: Layers = "all",
    heads: Heads = "all",
    sinks: Sinks = "keep",
    source: Source = "auto",
    size: int | tuple[int, int] | None = None,
) -> Outcome:
    """Explains by raw attention: the mean over the chosen layers and heads of the selected tokens' rows.

    Args:
        layers: ``"all"``; ``"first"``, ``"middle"`` or ``"last"`` third; a number; a range ``"10:20"``; several
            numbers.
        heads: ``"all"``; a head's number; several; or ``"layer.head"`` names such as ``["5.3", "7.0"]``, which choose
            the layers too.
        sinks: ``"drop"`` evens out image tokens that every position looks at, see the module.
        source: ``"recorded"`` reads the trace, ``"replay"`` runs one pass, ``"auto"`` reads the trace where it
            suffices.
        size: Grid of the heatmap, by default the tokens' own.

    Raises:
        ExplainError: No attention was recorded and no model is at hand, or a layer or head does not exist.
    """
    tokens = image_tokens(problem.replay, problem.target, cross=True, live=problem.live)
    rows = _rows(problem, tokens, source, heads)
    chosen = _chosen(rows, problem.selection.indices, layers, heads)
    values, dropped = chosen, 0
    if sinks == "drop":
        others = [step for step in range(len(rows.values)) if step not in set(problem.selection.indices)]
        values, dropped = _without_sinks(chosen, _chosen(rows, others, layers, heads) if others else chosen)
    elif sinks != "keep":
        raise ExplainError(f"sinks is 'keep' or 'drop'; got {sinks!r}")
    params = {"layers": layers, "heads": heads, "sinks": sinks, "source": rows.source}
    return of_tokens(problem, values, tokens.boxes, size, params, diagnostics={"sinks_dropped": dropped})


@register("relative_attention", needs=["attention"], cost=_relative_cost, takes=("rows",), clips=True)
def relative_attention(
    problem: Problem,
    *,
    layers: Layers = "all",
    heads: Heads = "all",
    general: str = GENERAL_PROMPT,
    question: str | None = None,
    reference: Trace | Replay | None = None,
    size: int | tuple[int, int] | None = None,
) -> Outcome:
    """Explains by attention relative to a general prompt: map(question) / map(general prompt), token by token.

    Args:
        layers, heads, size: As for ``attention``.
        general: What is asked for comparison. Its map is the attention of the prompt's last position, as the method was
            published; one more pass.
        question: The question as it stands in the prompt, which ``general`` takes the place of; by default what was
            recorded as such.
        reference: Instead of ``general``: a recorded answer to a general prompt on the same image. With two traces
            that recorded attention no model is needed.

    Raises:
        ExplainError: As ``attention``; the question is not found in the prompt; or neither a model nor a reference is
            at hand.
    """
    tokens = image_tokens(problem.replay, problem.target, cross=True, live=problem.live)
    rows = _rows(problem, tokens, "auto", heads)
    above = _chosen(rows, problem.selection.indices, layers, heads)
    params: dict[str, Any] = {"layers": layers, "heads": heads}
    if isinstance(reference, str):
        raise ExplainError(f"reference is a trace or a replay; got the id {reference!r}: open its trace again")
    if reference is not None:
        trace: Any = reference if isinstance(reference, Trace) else reference.trace
        recorded = _recorded_rows(trace, tokens, problem.images, heads)
        if recorded is not None:
            general_rows = recorded
        elif isinstance(reference, Trace):
            raise ExplainError(
                f"the reference {trace.path.name} holds no attention rows{_of_heads(heads)}; or give its replay, which "
                f"computes them"
            )
        else:
            mine = trace.layout.image_positions[np.isin(trace.layout.image_index, problem.images)]
            at = tokens.positions if tokens.cross else mine.astype(np.int64)
            general_rows = _replayed_rows(reference, torch.from_numpy(at), [0], cross=tokens.cross)
        params["reference"] = trace.trace_id
    elif problem.live and "attention" in problem.replay.offers:
        try:
            asked = problem.replay.reworded(general, question=question)
        except ReplayError as error:
            raise ExplainError(str(error)) from error
        where = torch.from_numpy(tokens.positions) if tokens.cross else _positions(asked, problem)
        general_rows = _replayed_rows(asked, where, [0], cross=tokens.cross)
        params["general"] = general
    else:
        raise ExplainError(
            "relative_attention needs a general prompt's attention: give reference= (a trace of a general prompt on "
            "the same image), or explain a replay on the model itself, which can ask"
        )
    below = _chosen(general_rows, [0], layers, heads)
    if below.shape != above.shape:
        raise ExplainError(
            f"the reference has {len(below)} image tokens where this answer has {len(above)}: it is of another image"
        )
    if not bool(below.any()):
        raise ExplainError(
            f"nothing to be relative to: the general prompt's last position has no attention to image {problem.image} "
            f"(it may look at another image alone); use 'attention'"
        )
    # A floor well under any softmax weight that matters, so that a token nobody looks at does not explode.
    floor = float(below.mean()) * 1e-3
    return of_tokens(problem, above / below.clamp(min=floor), tokens.boxes, size, params)


# -- where rows come from


def _rows(problem: Problem, tokens: ImageTokens, source: Source, heads: Heads) -> _Rows:
    if source not in ("auto", "recorded", "replay"):
        raise ExplainError(f"source is 'auto', 'recorded' or 'replay'; got {source!r}")
    recorded = _recorded_rows(problem.trace, tokens, problem.images, heads) if source != "replay" else None
    if recorded is not None:
        return recorded
    if not problem.live or source == "recorded" or "attention" not in problem.replay.offers:
        raise ExplainError(
            f"the trace holds no attention rows{_of_heads(heads)}; or explain a replay, which computes them"
        )
    steps = list(range(len(problem.selection.tokens)))
    found = _replayed_rows(problem.replay, torch.from_numpy(tokens.positions), steps, cross=tokens.cross)
    problem.advance(1, 1)
    return found


def _of_heads(heads: Heads) -> str:
    if heads == "all":
        return ": record with attention=True"
    return " of single heads: record with attention=True, heads='all'"


def _recorded_rows(trace: Trace, tokens: ImageTokens, images: range, heads: Heads) -> _Rows | None:
    rows = getattr(trace, "attention", None)
    if rows is None or (heads != "all" and rows.reduce != "none"):
        return None
    mine = tokens.positions if tokens.cross else np.flatnonzero(np.isin(trace.layout.image_index, images))
    if tokens.cross and mine.max(initial=-1) >= rows.values.shape[-1]:
        raise ExplainError("the keys of cross-attention are not those that were recorded: explain with source='replay'")
    return _Rows(torch.from_numpy(rows.values[..., mine]).double(), tuple(rows.layers), "recorded")


def _replayed_rows(replay: Replay, positions: Tensor, steps: Sequence[int], *, cross: bool) -> _Rows:
    """``positions`` are places in the prompt, or among the keys of cross-attention."""
    at = torch.tensor([replay.prompt_length - 1 + step for step in steps])
    found: list[Tensor] = []
    with replay.capture(attention=["cross" if cross else "decoder"]) as seen:
        with torch.no_grad():
            replay.log_probs(torch.ones(1, replay.n_images, 1, 1, dtype=torch.float32))
        for layer in seen.layers:
            weights = layer.weights(at.to(layer.device))[0].cpu().double()  # (head, step, key)
            found.append(weights[:, :, positions].transpose(0, 1))
        numbers = tuple(layer.layer.index for layer in seen.layers)
    if len({len(rows[0]) for rows in found}) > 1:
        raise ExplainError("layers of this decoder differ in their number of heads: use 'rollout' or 'tmm' instead")
    return _Rows(torch.stack(found, dim=1), numbers, "replay")


def _positions(replay: Replay, problem: Problem) -> Tensor:
    """Image-token positions of a reworded prompt: the same tokens, which a question in front of them may have moved."""
    layout = problem.trace.layout
    where = torch.isin(
        replay.input_ids, problem.replay.input_ids[torch.tensor(layout.image_positions)].unique()
    ).nonzero()[:, 0]
    return where[torch.tensor(np.isin(layout.image_index, problem.images))]


# -- which layers and heads


def _chosen(rows: _Rows, steps: Sequence[int], layers: Layers, heads: Heads) -> Tensor:
    """Mean over steps, layers and heads, ``(token,)``."""
    values = rows.values[list(steps)]
    names = [heads] if isinstance(heads, str) and heads != "all" else heads
    if not isinstance(names, (str, int)) and any(isinstance(name, str) for name in names):
        if layers != "all":
            raise ExplainError(f"heads named 'layer.head' choose the layers too; leave layers={layers!r} out")
        picked = [values[:, *_named(str(name), rows)] for name in names]
        return torch.stack(picked).mean(dim=(0, 1))
    values = values[:, _layer_places(rows.layers, layers)]
    if names == "all":
        return values.mean(dim=(0, 1, 2))
    wanted = [names] if isinstance(names, int) else [int(name) for name in names]
    missing = [head for head in wanted if not 0 <= head < values.shape[2]]
    if missing or not wanted:
        raise ExplainError(f"heads={heads!r}, but there are {values.shape[2]}, counted from 0")
    return values[:, :, wanted].mean(dim=(0, 1, 2))


def _named(name: str, rows: _Rows) -> tuple[int, int]:
    layer, dot, head = name.partition(".")
    if not (dot and layer.isdigit() and head.isdigit()):
        raise ExplainError(f"a head is named 'layer.head', as in '5.3'; got {name!r}")
    if int(layer) not in rows.layers or int(head) >= rows.values.shape[2]:
        raise ExplainError(
            f"there is no head {name!r}: layers {min(rows.layers)} to {max(rows.layers)} have {rows.values.shape[2]} "
            f"heads each, counted from 0"
        )
    return rows.layers.index(int(layer)), int(head)


def _layer_places(known: tuple[int, ...], layers: Layers) -> list[int]:
    count = len(known)
    thirds = {"first": (0, count / 3), "middle": (count / 3, 2 * count / 3), "last": (2 * count / 3, count)}
    wanted: list[int]
    if layers == "all":
        return list(range(count))
    if isinstance(layers, str) and layers in thirds:
        low, high = thirds[layers]
        return [place for place in range(count) if low <= place + 0.5 < high] or [min(round(low), count - 1)]
    if isinstance(layers, str):
        start, colon, stop = layers.partition(":")
        if not colon or not all(part.strip().removeprefix("-").isdigit() for part in (start, stop) if part):
            raise ExplainError(
                f"layers is 'all', 'first', 'middle', 'last', a range '10:20' or numbers; got {layers!r}"
            )
        within = range(max(known) + 1)[slice(int(start) if start else None, int(stop) if stop else None)]
        wanted = [layer for layer in within if layer in known]
    else:
        wanted = [layers] if isinstance(layers, int) else [int(layer) for layer in layers]
    missing = [layer for layer in wanted if layer not in known]
    if missing or not wanted:
        raise ExplainError(f"layers={layers!r}: attention is known of layers {', '.join(map(str, known))}")
    return [known.index(layer) for layer in wanted]


def _without_sinks(values: Tensor, by_others: Tensor) -> tuple[Tensor, int]:
    """Values with those of the sinks evened out, and the number of sinks."""
    limit = by_others.mean() + SINK_DEVIATIONS * by_others.std(unbiased=False)
    sink = by_others > limit
    return torch.where(sink, values[~sink].median(), values), int(sink.sum())
