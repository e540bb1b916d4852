"""The planner: how much memory a method will take on this model, and the settings under which it fits.

Nothing is looked up per family. ``plan`` runs one or two masks of the recorded answer through the model at hand, meters
them (``probes``, ``meter``), and scales what it finds by what the method asks for (``explainers.costs``).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lvlm_probe.errors import ExplainError, OutOfMemory
from lvlm_probe.exhaustion import ran_out
from lvlm_probe.planning.meter import Meter, parse_bytes, show_bytes, weight_bytes
from lvlm_probe.planning.plans import Plan, choose, default_budget, table
from lvlm_probe.planning.probes import quiet, timed
from lvlm_probe.player import Replay

if TYPE_CHECKING:
    from lvlm_probe.trace import Trace

__all__ = ["Plan", "Watch", "applied", "parse_bytes", "plan", "plan_for", "show_bytes", "table", "weight_bytes"]

_log = logging.getLogger("lvlm_probe")


def plan(
    model: torch.nn.Module | Replay,
    trace: Trace | None = None,
    processor: object | None = None,
    *,
    method: str = "igos++",
    memory: int | str | None = None,
    image: int = 0,
    seconds: bool = True,
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
        image: Number of the picture.
        seconds: Also time a few passes on this machine, for ``Plan.seconds``.
        params: Parameters of the method, as ``explain`` takes them.

    Returns:
        the plan.

    Raises:
        OutOfMemory: It does not fit, whatever is chosen; the message says what it would take.
        ExplainError: Unknown method or parameter.
        ProbeError: ``memory`` is no size.
    """
    if isinstance(model, Replay):
        replay = model
    elif trace is None:
        raise ExplainError("plan(model, trace, processor) needs the recorded answer; or give a replay: plan(replay)")
    else:
        from lvlm_probe.player import replay as open_replay

        replay = open_replay(trace, model, processor)
    found = plan_for(replay, method, params, memory=memory, image=image)
    return _with_seconds(replay, found, image) if seconds else found


def plan_for(
    replay: Replay, method: str, params: Mapping[str, Any], *, memory: int | str | None = None, image: int = 0
) -> Plan:
    """``plan`` of a replay, without timing."""
    from lvlm_probe import explainers
    from lvlm_probe.explainers.costs import cost_of
    from lvlm_probe.explainers.registry import Problem, check_parameters

    size = None if memory is None else parse_bytes(memory)
    if not 0 <= image < replay.n_images:
        raise ExplainError(f"image={image}, but the prompt has {replay.n_images} image(s), counted from 0")
    check_parameters(method, explainers.resolve(method), params)
    selection: Any = None  # no words are needed to say how much a method takes
    cost = cost_of(method, Problem(replay, selection, image), params)
    return choose(replay, method, cost, default_budget(replay, size), image=image)


def _with_seconds(replay: Replay, found: Plan, image: int) -> Plan:
    """With seconds, from timed calls with one mask and with three, or as many as go through at once."""
    if found.forward is None or found.backward is None or found.peak is None or found.offloaded:
        return found
    at_once = found.micro_batch or 1
    total = 0.0
    with quiet(replay, checkpoint=found.gradient_checkpointing):
        for gradient, pictures in ((True, found.backward), (False, found.forward - found.backward)):
            if pictures > 0:
                call, each = timed(replay, gradient=gradient, image=image, masks=min(3, at_once, pictures))
                total += pictures * each + -(-pictures // at_once) * call
    return dataclasses.replace(found, seconds=total)


class Watch:
    """What an explanation was planned to take and what it took."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.measured: int | None = None
        self.recovered: list[str] = []

    def record(self) -> dict[str, Any]:
        """For provenance: bytes beyond weights, predicted and measured side by side."""
        planned = self.plan
        record: dict[str, Any] = {
            "predicted_peak": None if planned is None else planned.peak,
            "measured_peak": self.measured,
        }
        if planned is not None:
            record |= {
                "weights": planned.weights,
                "micro_batch": planned.micro_batch,
                "gradient_checkpointing": planned.gradient_checkpointing,
            }
        return record | ({"recovered": self.recovered} if self.recovered else {})


@contextmanager
def applied(replay: Any, found: Plan | None, *, method: str, measure: bool = False) -> Iterator[Watch]:
    """Runs the block under a plan's settings, and watches what it takes.

    On CUDA the measured peak comes free; it is known unless something before used more, or when ``measure`` resets the
    device's own record of its peak. On the CPU it is taken with ``measure``, which slows small models down.

    Raises:
        OutOfMemory: Memory ran out in the block where no smaller micro-batch could help.
    """
    watch = Watch()
    watch.plan = found
    if not isinstance(replay, Replay):
        yield watch
        return
    kept = replay._micro_batch, replay.gradient_checkpointing, replay._recompute
    recovered = len(replay.recovered)
    # What shrank because memory ran out stays small; all else is put back.
    size = found.micro_batch if found is not None else None
    if size is not None and not _offloads(found):
        replay._micro_batch = size
        replay.gradient_checkpointing = kept[1] or bool(found and found.gradient_checkpointing)
    try:
        with _watching(replay.device, watch, measure):
            yield watch
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        took = "" if found is None or found.peak is None else f" (planned: {show_bytes(found.peak)} beyond weights)"
        raise OutOfMemory(
            f"{method} on {replay.trace_id} ran out of memory of {replay.device}{took}: give memory=… a smaller size, "
            f"a smaller size=… of the heatmap, or load the model in bfloat16; plan(replay, method={method!r}) says "
            f"what it takes"
        ) from error
    finally:
        watch.recovered = replay.recovered[recovered:]
        smaller = any("at once" in step for step in watch.recovered)
        replay._micro_batch = replay._micro_batch if smaller else kept[0]
        replay.gradient_checkpointing, replay._recompute = kept[1], kept[2]


def _offloads(found: Plan | None) -> bool:
    """Whether a plan is for a model that would be loaded another way than this one."""
    return found is not None and bool(found.offloaded)


@contextmanager
def _watching(device: torch.device, watch: Watch, measure: bool) -> Iterator[None]:
    if measure:
        meter = Meter(device)
        with meter.running():
            yield
        watch.measured = meter.reading.peak
    elif device.type == "cuda":
        before, highest = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        yield
        reached = torch.cuda.max_memory_allocated(device)
        watch.measured = reached - before if reached > highest else None
    else:
        yield
