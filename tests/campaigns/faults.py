"""An exception in every function of ours that runs while the user generates, and Ctrl-C at any moment.

*faults*: Which functions of the package run inside a recorded ``generate()`` is found out by watching one
(``sys.setprofile``); then each of them raises, once per kind of exception, as if its first line did. Only functions
that another function of ours calls: what torch or the user calls is the fence itself, and its first line is as safe
as any. The output is compared bit for bit with that of the model without a probe; after ``detach()`` the model is as
it was.

*interrupts*: SIGINT at a random moment of attach, record, generate, replay, explain and evaluate. Afterwards the
model is as it was, no trace is damaged, and the next recording is whole.
"""

from __future__ import annotations

import contextlib
import functools
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

import lvlm_probe as probe
from campaigns.stage import SPAN, Stage, differences, same_output, scratch, stage, state_of
from campaigns.tally import Campaign, Tally
from lvlm_probe.errors import ProbeError

__all__ = ["CAMPAIGNS", "faults", "interrupts", "places"]

PACKAGE = str(Path(probe.__file__).parent)
KINDS: tuple[type[BaseException], ...] = (
    RuntimeError, ValueError, TypeError, KeyError, AttributeError, StopIteration, RecursionError, MemoryError,
    torch.OutOfMemoryError,
)  # fmt: skip
THROUGH = ("contextlib.py", "functools.py")
"""Files of the standard library between a function of ours and the next."""
REMOVAL = ("remove", "abort", "close", "detach", "disarm", "restore", "__exit__", "release")
"""Functions that take things off the model again. Where one of them itself fails, things may stay on it."""

FENCE = (
    "_Standing.__call__", "Shadow.run", "Shadow.below", "_Hanging.__call__", "ImplementationName.__eq__",
)  # fmt: skip
"""What stands between torch or the user and every function of ours; and what these call is called by others as well."""
CATCHING = ("HookSet._fence.<locals>.fenced", "_Once.__init__")
"""What catches, and what decides whether there is anything to catch: its own first line is outside of that."""

Place = tuple[str, str]
"""File within the package, and qualified name of a function."""


def place_of(frame: FrameType) -> Place | None:
    """Which function of ours a frame runs; ``None`` for others' and for the fence: what others call."""
    name = frame.f_code.co_filename
    if not name.startswith(PACKAGE) or frame.f_code.co_name in ("<module>", "<genexpr>", "<listcomp>", "<dictcomp>"):
        return None
    above = frame.f_back
    while above is not None and above.f_code.co_filename.endswith(THROUGH):
        above = above.f_back
    if above is None or not above.f_code.co_filename.startswith(PACKAGE) or above.f_code.co_qualname in FENCE:
        return None
    if frame.f_code.co_qualname in (*FENCE, *CATCHING):
        return None
    return name[len(PACKAGE) + 1 :], frame.f_code.co_qualname


@contextlib.contextmanager
def profiled(watch: Callable[[FrameType, str, Any], None]) -> Iterator[None]:
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)


def recorded(on: Stage, k: int, around: Any) -> tuple[Any, list[str]]:
    """A recorded answer; returns the output and what was said of faults."""
    folder = scratch("faults")
    try:
        with probe.attach(on.model, on.processor) as p, p.record(folder) as recording:
            inputs = on.prepare(k)
            with around:
                output = on.generate(k, inputs)
        return output, recording.faults
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def places(name: str) -> tuple[Place, ...]:
    """The functions of ours that run inside a recorded ``generate()``, beneath the fences."""
    found: dict[Place, None] = {}

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (place := place_of(frame)) is not None:
            found[place] = None

    on = stage(name)
    recorded(on, 0, profiled(watch))
    return tuple(found)


def faults(first: int, count: int, seed: int) -> Tally:
    """Raise at cases ``first`` to ``first + count``: place by place, kind by kind, the second round at later calls."""
    tally = Tally()
    stages = {name: stage(name) for name in ("demo", "qwen2_vl")}
    cases = [(name, place, kind) for name in stages for place in places(name) for kind in KINDS]
    tally.reaches("places", len({place for _, place, _ in cases}))
    order = random.Random(seed)
    order.shuffle(cases)
    for number in range(first, first + count):
        name, place, kind = cases[number % len(cases)]
        later = number // len(cases)
        one_fault(stages[name], number % len(stages[name].pictures), place, kind, later, tally)
    return tally


def one_fault(on: Stage, k: int, place: Place, kind: type[BaseException], later: int, tally: Tally) -> None:
    """Raise at the call number ``1 + 3 · later`` of a function, and look at the answer and the model."""
    label = f"{kind.__name__} in {place[0]} {place[1]}, {on.name}"
    calls = 0

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        if event == "call" and place_of(frame) == place:
            calls += 1
            if calls == 1 + 3 * later:
                raise kind("made up by the campaign")

    before = state_of(on.model, on.processor)
    tally.tried += 1
    try:
        output, said = recorded(on, k, profiled(watch))
        tally.counts["bit-equal"] += (equal := same_output(output, on.plain[k]))
        tally.counts["said in Recording.faults"] += bool(said)
        tally.counts["the function was not called that often"] += calls < 1 + 3 * later
        if not equal:
            tally.breaks("the answer changed", label)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        tally.breaks("generate() raised", f"{label}: {type(error).__name__}: {error}")
    if changed := differences(before, state_of(on.model, on.processor)):
        if place[1].rpartition(".")[2] in REMOVAL:
            tally.counts["left something on the model: the fault was in its removal"] += 1
        else:
            tally.breaks("the model is not as it was", f"{label}: {changed}")
        stage.cache_clear()  # so that the next case begins with a clean model
    if not same_output(on.generate(k), on.plain[k]):
        tally.breaks("the model is broken for good", label)


# ----------------------------------------------------------------------------------------------------------- interrupts


def life(on: Stage, k: int, folder: Path) -> None:
    """What a user does."""
    with probe.attach(on.model, on.processor) as p, p.record(folder) as recording:
        on.generate(k)
    replay = probe.replay(recording.traces[0], on.model, on.processor)
    for method, settings in (("igos++", {}), ("tmm", {}), ("occlusion", {"patch": 3, "stride": 3})):
        heat = probe.explain(replay, method=method, tokens=SPAN, **settings)
    probe.evaluate(heat, replay, steps=8)


def interrupts(first: int, count: int, seed: int) -> Tally:
    """Press Ctrl-C at moments ``first`` to ``first + count``."""
    tally = Tally()
    on = stage("qwen2_vl")
    folder = scratch("interrupts")
    life(on, 0, folder)
    started = time.perf_counter()
    life(on, 0, folder)
    longest = time.perf_counter() - started
    before = state_of(on.model, on.processor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in range(first, first + count):
        rng = random.Random(f"{seed}/{number}")
        k = rng.randrange(len(on.pictures))
        where = "after it had ended"
        try:
            # The moment is inside of the user's work, so that the signal never meets the campaign itself.
            signal.setitimer(signal.ITIMER_REAL, max(1e-4, rng.uniform(0, longest)))
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            life(on, k, folder)
        except KeyboardInterrupt as stop:
            where = _where(stop)
            tally.tried += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if changed := differences(before, state_of(on.model, on.processor)):
            tally.breaks("the model is not as it was", f"moment {number}, {where}: {changed}")
            torch.set_grad_enabled(True)
            stage.cache_clear()
            on = stage(on.name)
            before = state_of(on.model, on.processor)
        if not same_output(on.generate(k), on.plain[k]):
            tally.breaks("the model is broken for good", f"moment {number}, {where}")
        if number % 20 == 0 or number == first + count - 1:
            _look_at(folder, on, tally)
            folder = scratch("interrupts")
    return tally


def _where(stop: BaseException) -> str:
    """The innermost function of ours in which it struck."""
    found = "outside of the package"
    trace = stop.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(PACKAGE):
            found = f"{trace.tb_frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _look_at(folder: Path, on: Stage, tally: Tally) -> None:
    """Every trace there is whole, nothing lies beside them, and a recording made now is what it always was."""
    store = probe.open_store(folder)
    for place in range(len(store)):
        try:
            store[place].verify()
            tally.counts["finished traces"] += 1
        except ProbeError as error:
            tally.breaks("damaged trace", str(error))
    for part in folder.rglob("*.part"):
        tally.breaks("an unfinished file stays", part.name)
    output, said = recorded(on, 0, contextlib.nullcontext())
    if said or not np.array_equal(output.sequences, on.plain[0].sequences):
        tally.breaks("the next recording is not whole", "; ".join(said))
    shutil.rmtree(folder, ignore_errors=True)


CAMPAIGNS = (
    Campaign(
        "faults",
        "Whatever raises inside the probe while the user generates, the answer is the same, bit for bit.",
        "exceptions",
        4_000,
        500,
        faults,
    ),
    Campaign(
        "interrupts",
        "Ctrl-C at any moment leaves the model as it was and no damaged file.",
        "interrupts",
        1_000,
        250,
        interrupts,
    ),
)
