"""The planner: how much memory a method will take on this model, and the settings under which it fits.

Nothing is looked up per family. ``plan`` runs one or two masks of the recorded answer through the model at hand, meters
them (``rehearsal``, ``meter``), and scales what it finds by the cost that the method's file declares (``costs``).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.explaining import Tokens, frame_of, scored_by, selected, target_of
from lvlm_probe.explainers.registry import Cost, Problem, check_parameters, cost_of, resolve
from lvlm_probe.explainers.scores import no_effect
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.models.exhaustion import told_out_of_memory
from lvlm_probe.planning.meter import Meter, parse_bytes, show_bytes, weight_bytes
from lvlm_probe.planning.plans import MOST, Plan, choose, default_budget, passes_text, table
from lvlm_probe.planning.rehearsal import timed
from lvlm_probe.replaying import Replay
from lvlm_probe.replaying import replay as open_replay
from lvlm_probe.replaying.isolation import outside_modes
from lvlm_probe.replaying.reduced_precision import told_by_kernels

if TYPE_CHECKING:
    from lvlm_probe.selection import Against
    from lvlm_probe.trace import Trace

__all__ = [
    "Meter",
    "Pace",
    "Plan",
    "cost_for",
    "expected",
    "pace",
    "parse_bytes",
    "passes_text",
    "plan",
    "plan_for",
    "show_bytes",
    "table",
    "weight_bytes",
]


@naming_arguments
@outside_modes
@told_out_of_memory
def plan(
    model: torch.nn.Module | Replay,
    trace: Trace | None = None,
    processor: object | None = None,
    *,
    method: str = "igos++",
    memory: int | str | None = None,
    image: int = 0,
    seconds: bool = True,
    tokens: Tokens | None = None,
    against: Against | None = None,
    search_dtype: str | None = None,
    **params: Any,
) -> Plan:
    """Predicts what explaining a recorded answer will take, and chooses settings under which it fits.

    Measured on this model: at most two passes over one mask and two over two, none over more. Where gradients of the
    whole pass do not fit, the same with gradient checkpointing.

    Args:
        model: The model, or a replay of the answer on it, which ``explain(replay)`` then finds already measured.
        trace: The recorded answer.
        processor: The model's processor, as for ``replay``.
        method: Name of a registered explainer.
        memory: What there is for weights and all else: bytes, ``"24GB"`` (10⁹) or ``"24GiB"`` (2³⁰). By default what
            the model's device has free now, beside the weights. It may be that of another machine.
        image: Number of the image; a frame stands for its video.
        seconds: Also time a few passes on this machine, for ``Plan.seconds``.
        tokens, against: A contrast, or a score of your own, as for ``explain``. Each alternative of more than one token
            is a sequence more for every mask. Plain words change nothing: a plan is for all words of the answer.
        search_dtype: As for ``explain``: memory counts the weights that a search in it keeps, seconds are those of
            passes in it, also for the few that measure.
        params: Parameters of the method, as ``explain`` takes them.

    Returns:
        the plan.

    Raises:
        OutOfMemory: It does not fit, whatever is chosen; the message says what it would take.
        ExplainError: Unknown method or parameter, one that follows no score, or the model cannot be computed in
            ``search_dtype``.
        SelectionError: As ``explain``.
        ProbeError: ``memory`` is no size.
    """
    if isinstance(model, Replay):
        replay = model
    elif trace is None:
        raise ExplainError("plan(model, trace, processor) needs the recorded answer; or give a replay: plan(replay)")
    else:
        replay = open_replay(trace, model, processor)
    if tokens is not None or against is not None:
        selection = selected(replay, tokens, against)
        replay = scored_by(replay, selection, method)
        if selection.score is not None:
            no_effect(Problem(replay, selection, image, clip=frame_of(replay, image)))  # its ends, which are kept
    with _searching(replay, search_dtype) as replay:
        found = plan_for(replay, method, params, memory=memory, image=image)
        if seconds:
            found = _with_seconds(replay, found, image, cost_for(replay, method, params, image=image).beside)
    return dataclasses.replace(found, search_dtype=search_dtype)


@contextlib.contextmanager
def _searching(replay: Replay, dtype: str | None) -> Iterator[Replay]:
    """The replay that a method searches by; in the block weights that it casts are kept, as they are in ``explain``."""
    if dtype is None:
        yield replay
        return
    replay = replay.computed_in(dtype)
    with told_by_kernels(replay.model), replay.shortcuts.caching():
        yield replay


def plan_for(
    replay: Replay, method: str, params: Mapping[str, Any], *, memory: int | str | None = None, image: int = 0
) -> Plan:
    """``plan`` of a replay, in the number format of its passes, without timing."""
    size = None if memory is None else parse_bytes(memory)
    if not 0 <= image < replay.n_images:
        raise ExplainError(f"image={image}, but the prompt has {replay.n_images} image(s), counted from 0")
    check_parameters(method, resolve(method), params)
    cost = cost_for(replay, method, params, image=image)
    found = choose(replay, method, cost, default_budget(replay, size), target=target_of(replay, image))
    least = found.at_least
    return dataclasses.replace(
        found,
        forward=None if found.forward is None else found.forward * replay.rows,
        backward=None if found.backward is None else found.backward * replay.rows,
        at_least=None if least is None else (least[0] * replay.rows, least[1] * replay.rows),
    )


def cost_for(replay: Replay, method: str, params: Mapping[str, Any] | None = None, *, image: int = 0) -> Cost:
    """Return what a method says that it asks of the model for a replay; nothing is run."""
    selection: Any = None  # no words are needed to say how much a method takes
    clip = frame_of(replay, image)
    return cost_of(method, Problem(replay, selection, image if clip is None else clip.first, clip=clip), params or {})


def _with_seconds(replay: Replay, found: Plan, image: int, beside: float) -> Plan:
    """With seconds, from timed calls with one mask and with three, or as many as go through at once, and ``beside``."""
    if found.forward is None or found.backward is None or found.peak is None or found.offloaded:
        return found
    at_once = found.micro_batch or 1
    forward, backward = found.forward // replay.rows, found.backward // replay.rows  # masks, as they are timed
    least = None if found.at_least is None else [images // replay.rows for images in found.at_least]
    replay = replay.with_settings(gradient_checkpointing=found.gradient_checkpointing)

    def taken(images: int, *, gradient: bool) -> tuple[float, float]:
        masks = min(3, at_once, images)
        target = target_of(replay, image)
        return timed(replay, gradient=gradient, target=target, masks=masks) if images > 0 else (0.0, 0.0)

    both = taken(backward, gradient=True)
    measured = Pace(taken(forward - backward, gradient=False), both)
    all_passes = measured.of(forward, backward, at_once=at_once)
    return dataclasses.replace(
        found,
        seconds=None if all_passes is None else all_passes + beside,
        seconds_at_least=None if least is None else measured.of(*least, at_once=at_once),
    )


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds that passes over a recorded answer take on this machine: (of a call, of each mask in it).

    Attributes:
        forward: forward passes.
        gradient: forward and backward; ``None`` where the model gives no gradient.
    """

    forward: tuple[float, float]
    gradient: tuple[float, float] | None

    def of(self, forward: int | None, backward: int | None = 0, *, at_once: int = 1) -> float | None:
        """Return the seconds of so many passes; ``None`` where nobody knows how many, or there are no gradients.

        Args:
            forward, backward: images through the model; each backward pass has its forward pass in ``forward``.
            at_once: masks in a call.
        """
        if forward is None or backward is None or (backward and self.gradient is None):
            return None
        parts = ((backward, self.gradient or (0.0, 0.0)), (forward - backward, self.forward))
        return sum((images * each + -(-images // at_once) * call for images, (call, each) in parts if images > 0), 0.0)


def pace(replay: Replay, *, search_dtype: str | None = None) -> Pace:
    """Time a few passes, of a search in ``search_dtype``, over one mask and over three. Raises what a forward pass
    raises."""
    target = target_of(replay, 0)
    with _searching(replay, search_dtype) as replay:
        forward = timed(replay, gradient=False, target=target)
        try:
            gradient = timed(replay, gradient=True, target=target)
        except Exception:  # whatever is wrong with gradients: methods that need none go on
            return Pace(forward, None)
    return Pace(forward, gradient)


def expected(replay: Replay, methods: Iterable[str], found: Pace) -> dict[str, float | None]:
    """Return about how many seconds methods take with their defaults; ``None`` where a method does not say.

    Args:
        found: ``pace(replay)``.
    """
    said: dict[str, float | None] = {}
    for method in methods:
        cost = cost_for(replay, method)
        at_once = min(MOST, max(cost.groups, default=1))
        most = 0.0 if cost.kind is None else found.of(cost.forward, cost.backward, at_once=at_once)
        least = most if cost.at_least is None else found.of(*cost.at_least, at_once=at_once)
        # Of a method that stops when its map is good enough nobody knows when: half-way.
        said[method] = None if most is None or least is None else (most + least) / 2 + cost.beside
    return said
