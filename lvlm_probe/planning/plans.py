"""A plan: what a method will take on this model, and the settings under which that fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lvlm_probe.errors import ExplainError, OutOfMemory, ReplayError
from lvlm_probe.files import record_of
from lvlm_probe.models.exhaustion import out_of_memory, ran_out
from lvlm_probe.planning.meter import available, show_bytes, weight_bytes
from lvlm_probe.planning.rehearsal import CostModel, cost_model
from lvlm_probe.replaying.micro_batches import CPU_BYTES, weights_on_cards

if TYPE_CHECKING:
    from lvlm_probe.explainers.registry import Cost
    from lvlm_probe.replaying import Replay
    from lvlm_probe.trace.clips import Clip

MOST = 64
"""Beyond this many masks at once nothing gets faster."""
_INSIDE = ("relevance", "rollout", "rows", "activations", "hidden")
"""Kinds that look inside the pass, which must not run its layers twice."""


@dataclass(frozen=True)
class Budget:
    """Bytes there are: ``limit`` for everything beside the weights; up to ``comfortable`` masks are put together.

    ``device`` is the size that was asked for, weights included, or ``None`` where it is what the model's device has.
    """

    limit: int
    comfortable: int
    device: int | None = None


@dataclass(frozen=True, repr=False)
class Plan:
    """What a method takes on this model, image and answer, measured on a small probe and scaled.

    Attributes:
        method: Its name.
        peak: Most bytes of tensors alive at once beyond weights; ``None`` where it cannot be told (``notes`` say why).
        weights: Bytes of the model's weights, those kept elsewhere (``offloaded``) included.
        budget: Bytes there are beside the weights.
        forward, backward: Images through the model, at most; ``None`` where the method does not say.
        seconds: Estimate from timed passes, when it was asked for; of all that it may take.
        micro_batch: Masks per pass.
        gradient_checkpointing: Layers are run again in backward, which takes about a third more time.
        offloaded: Bytes of weights that have to be kept off the device to make room.
        load_with: Arguments for ``from_pretrained`` that do so.
        attention: Where attention comes from: ``"recorded"`` rows of the trace, or ``"recomputed"`` one layer at a time
            from queries and keys; ``None`` where it is not read.
        fixed, per_mask: A pass over b masks takes ``fixed + b · per_mask`` bytes, besides what the method keeps.
        notes: Sentences worth knowing.
        at_least: Forward and backward images where a method that may stop early does so at once; ``None`` where it
            always takes the same.
        seconds_at_least: ``seconds`` of these.
        search_dtype: The number format that the method searches in; ``None`` is the model's own.
    """

    method: str
    peak: int | None
    weights: int
    budget: int
    forward: int | None = None
    backward: int | None = None
    seconds: float | None = None
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    offloaded: int = 0
    load_with: Mapping[str, Any] = field(default_factory=dict)
    attention: str | None = None
    fixed: int = 0
    per_mask: int = 0
    notes: tuple[str, ...] = ()
    at_least: tuple[int, int] | None = None
    seconds_at_least: float | None = None
    search_dtype: str | None = None

    @property
    def total(self) -> int | None:
        """Bytes on the device: weights that stay there, and the peak beyond them."""
        return None if self.peak is None else self.weights - self.offloaded + self.peak

    def __repr__(self) -> str:
        return f"<Plan {table([self])}>" if self.peak is None else f"<Plan {self.method}: {self.sentence()}>"

    def sentence(self) -> str:
        """The plan in one line."""
        if self.peak is None:
            return "; ".join(self.notes) or "not known"
        words = [f"peak {show_bytes(self.peak)} + weights {show_bytes(self.weights - self.offloaded)}"]
        if self.forward is not None:
            words.append(f"{passes_text(self.forward, self.backward, self.at_least)} passes")
        if self.seconds is not None:
            words.append(f"about {_range(self.seconds, self.seconds_at_least)} s")
        if self.micro_batch:
            words.append(f"{self.micro_batch} mask{'s' * (self.micro_batch > 1)} at once")
        if self.gradient_checkpointing:
            words.append("gradient checkpointing")
        if self.offloaded:
            words.append(f"{show_bytes(self.offloaded)} of weights offloaded")
        if self.attention:
            words.append(f"attention {self.attention}")
        if self.search_dtype:
            words.append(f"searched in {self.search_dtype}")
        return ", ".join([*words, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**record_of(self), "total": self.total}


def passes_text(forward: int | None, backward: int | None, at_least: tuple[int, int] | None = None) -> str:
    """Forward and backward passes as tables show them, ``32–196 + 24–156`` where they depend on the map."""
    if forward is None:
        return "–"
    least = at_least or (None, None)
    return f"{_range(forward, least[0], ',.0f')} + {_range(backward, least[1], ',.0f')}"


def _range(most: float | None, least: float | None, form: str = ".3g") -> str:
    return f"{most:{form}}" if least is None else f"{least:{form}}–{most:{form}}"


def table(plans: Sequence[Plan]) -> str:
    """Plans side by side, as text."""
    head = ("method", "peak", "total", "passes", "seconds", "at once", "settings")
    rows = [head]
    for one in plans:
        settings = [name for name, on in (("checkpointing", one.gradient_checkpointing),) if on]
        settings += [f"offload {show_bytes(one.offloaded)}"] if one.offloaded else []
        settings += [f"attention {one.attention}"] if one.attention else []
        settings += [f"searched in {one.search_dtype}"] if one.search_dtype else []
        rows.append(
            (
                one.method,
                "–" if one.peak is None else show_bytes(one.peak),
                "–" if one.total is None else show_bytes(one.total),
                passes_text(one.forward, one.backward, one.at_least),
                "–" if one.seconds is None else _range(one.seconds, one.seconds_at_least),
                str(one.micro_batch or "–"),
                "; ".join([*settings, *one.notes]),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


def default_budget(replay: Replay, memory: int | None) -> Budget:
    """What there is: ``memory`` bytes for weights and all else, or what the model's device has free now.

    By default half of an accelerator's free memory is filled (its allocator fragments), of several the one with least,
    and on the CPU 30 % of what is available, ``micro_batches.CPU_BYTES`` at most.
    """
    if memory is not None:
        left = memory - weight_bytes(replay.model)
        return Budget(left, left, memory)
    if replay.device.type == "cuda":
        free = min(map(_free_on, weights_on_cards(replay.model, replay.device)))
        return Budget(int(0.95 * free), free // 2)
    free = available()
    return Budget(free, min(int(0.3 * free), CPU_BYTES))


def _free_on(card: torch.device) -> int:
    """Bytes that a card has, and those that torch holds there for nothing yet."""
    idle = torch.cuda.memory_reserved(card) - torch.cuda.memory_allocated(card)
    return torch.cuda.mem_get_info(card)[0] + idle


def choose(replay: Replay, method: str, cost: Cost, budget: Budget, *, target: int | Clip = 0) -> Plan:
    """The settings under which a method fits, cheapest first: whole groups of masks at once, fewer, checkpointing,
    weights elsewhere.

    Raises:
        OutOfMemory: Nothing of that makes one mask fit; the message says how much it would take.
    """
    weights = weight_bytes(replay.model)
    attention = {"rows": "recomputed", "rollout": "recomputed", "relevance": "recomputed"}.get(cost.kind or "")
    if cost.kind is None:
        attention = "recorded" if cost.numbers else None
        plan = Plan(method, 4 * cost.numbers, weights, budget.limit, cost.forward, cost.backward, attention=attention)
        return plan
    notes: tuple[str, ...] = ("passes: about, it depends on the image",) if cost.about else ()
    base = Plan(
        method, None, weights, budget.limit, cost.forward, cost.backward, attention=attention, notes=notes,
        at_least=cost.at_least,
    )  # fmt: skip
    most, own = max(cost.groups, default=1), 4 * cost.numbers
    replay = _asked(replay, cost)
    failure: BaseException | None = None
    smallest: list[tuple[int, bool]] = []
    given = replay.limits.micro_batch
    checkpointings = [replay.gradient_checkpointing]
    if cost.kind == "gradient" and not replay.gradient_checkpointing:
        checkpointings.append(True)
    for checkpoint in checkpointings:
        try:
            found = cost_model(replay, cost, target=target, checkpoint=checkpoint)
        except ExplainError as error:
            return dataclasses.replace(base, notes=(str(error),))
        except Exception as error:
            if checkpoint and not replay.gradient_checkpointing and "not supported" in str(error):
                continue
            if not (ran_out(error) or isinstance(error, OutOfMemory)):
                raise
            failure = error
            continue
        least = found.at(1 if cost.splits else most) + own
        smallest.append((least, checkpoint))
        if least <= budget.limit:
            return _fitted(base, cost, found, budget, own, checkpoint, given)
    if not smallest:
        raise out_of_memory(
            f"{method}: one mask does not go through {type(replay.model).__name__} on {replay.device}, not even with "
            f"gradient checkpointing, so it cannot be said how much it takes; load the model in bfloat16, or with "
            f"device_map='auto' and less of it on {replay.device}, or use a smaller image",
            failure,
        ) from failure
    return _elsewhere(replay, base, cost, budget, smallest, own, target)


def _asked(replay: Replay, cost: Cost) -> Replay:
    """The replay that the method runs: after another question, where it asks one."""
    if cost.general is None:
        return replay
    try:
        return replay.reworded(cost.general[0], question=cost.general[1])
    except ReplayError:
        return replay  # the method says itself why it cannot


def _fitted(
    base: Plan, cost: Cost, found: CostModel, budget: Budget, own: int, checkpoint: bool, given: int | None
) -> Plan:
    most = max(cost.groups, default=1)
    size = most
    if cost.splits:
        room = max(1, found.fit(min(budget.comfortable, budget.limit) - own))
        size = min(most, MOST, room if given is None else given)
    # Groups are cut into micro-batches of equal size, so that the largest may stay under the limit.
    at_once = max((math.ceil(group / math.ceil(group / size)) for group in cost.groups), default=1)
    return dataclasses.replace(
        base,
        peak=found.at(at_once) + own,
        micro_batch=size if cost.splits else None,
        gradient_checkpointing=checkpoint,
        fixed=found.fixed,
        per_mask=found.per_mask,
    )


def _elsewhere(
    replay: Replay,
    base: Plan,
    cost: Cost,
    budget: Budget,
    smallest: Sequence[tuple[int, bool]],
    own: int,
    target: int | Clip,
) -> Plan:
    """With weights kept off the device, brought one layer at a time; or the error that says what it would take."""
    least, checkpoint = min(smallest)
    largest = _largest_layer(replay.model)
    room = budget.device if budget.device is not None else budget.limit + base.weights
    inside = cost.kind in _INSIDE
    if least + largest > room:
        advice = "a smaller image or a shorter answer" if cost.splits else "fewer points=… or a smaller image"
        raise OutOfMemory(
            f"{base.method} takes {show_bytes(least)} for "
            f"{'one mask' if cost.splits else f'its {max(cost.groups)} masks, which go through at once'}"
            f"{' with gradient checkpointing' if checkpoint else ''}"
            f"{', which cannot be lowered by gradient checkpointing as it looks inside the pass,' if inside else ''} "
            f"beside {show_bytes(base.weights)} of weights, and there are {show_bytes(room)} for both: it would take "
            f"{show_bytes(least + base.weights)}, or {show_bytes(least + largest)} with all weights offloaded; load "
            f"the model in bfloat16, or use {advice}"
        )
    kept = room - least
    offloaded = base.weights - kept
    found = cost_model(replay, cost, target=target, checkpoint=checkpoint)
    there = 0 if replay.device.type != "cuda" else replay.device.index or 0
    load_with = {"device_map": "auto", "max_memory": {there: kept, "cpu": offloaded + largest}}
    plan = _fitted(base, cost, found, Budget(least, least), own, checkpoint, 1 if cost.splits else None)
    note = (
        f"weights do not fit beside it: load with device_map='auto', max_memory={{{there}: {kept}, "
        f"'cpu': {offloaded + largest}}} (needs accelerate)"
    )
    if next(replay.model.parameters()).dtype == torch.float32:
        note += f", or in bfloat16, whose weights take {show_bytes(base.weights / 2)}"
    return dataclasses.replace(plan, offloaded=offloaded, load_with=load_with, notes=(*base.notes, note))


def _largest_layer(model: torch.nn.Module) -> int:
    """Bytes of the largest part that has to be on the device as a whole: a block of a stack, or a layer outside one."""
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    blocks = [block for stack in stacks for block in stack]
    inside = {id(module) for block in blocks for module in block.modules()}
    alone = [
        module
        for module in model.modules()
        if id(module) not in inside and any(True for _ in module.parameters(recurse=False))
    ]
    sizes = [sum(weight.numel() * weight.element_size() for weight in block.parameters()) for block in blocks]
    sizes += [
        sum(weight.numel() * weight.element_size() for weight in module.parameters(recurse=False)) for module in alone
    ]
    return max(sizes, default=0)
