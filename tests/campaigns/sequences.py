"""One replay asked many things, in any order, and one process after the other: the same answers, bit for bit.

*determinism*: Sequences of explain, evaluate, verify, log_probs and plan, drawn from the seed, on one replay. Each
result is compared with what a fresh replay gives. What fresh replays give is compared between all processes of the
campaign.

*soak*: A thousand answers through every public verb in one process. Tensors, hooks, registered attention functions,
open files and threads must not become more; memory must not grow.

*soak_card*: The same on a pretended accelerator, by the counter of its memory.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lvlm_probe as probe
from campaigns.stage import METHODS, SPAN, Stage, differences, same_output, scratch, stage, state_of
from campaigns.tally import Campaign, Tally

__all__ = ["CAMPAIGNS", "determinism", "soak", "soak_card"]

Operation = Callable[[Stage, int, Any], str]
LENGTH = 8
"""Calls on one replay."""


def digest(*things: Any) -> str:
    """16 hex digits over arrays, bit for bit, and JSON-ready values."""
    found = hashlib.sha256()
    for thing in things:
        if isinstance(thing, torch.Tensor):
            thing = thing.detach().numpy()
        if isinstance(thing, np.ndarray):
            found.update(f"{thing.dtype}{thing.shape}".encode() + np.ascontiguousarray(thing).tobytes())
        else:
            found.update(json.dumps(thing, sort_keys=True, default=str).encode())
    return found.hexdigest()[:16]


def _explained(method: str, tokens: Any) -> Operation:
    def operation(on: Stage, k: int, replay: Any) -> str:
        heat = probe.explain(replay, method=method, tokens=tokens, **METHODS[method])
        selection = [list(heat.selection.indices), heat.reason, dict(heat.provenance["baseline"])]
        return digest(np.zeros(0) if heat.values is None else heat.values, selection)

    return operation


def _evaluated(method: str, **options: Any) -> Operation:
    def operation(on: Stage, k: int, replay: Any) -> str:
        score = probe.evaluate(on.quiet_map(k, method)[0], replay, steps=8, **options).to_dict()
        score["provenance"].pop("trace_id")  # every process records traces of its own
        return digest(score)

    return operation


def _log_probs(on: Stage, k: int, replay: Any) -> str:
    mask = torch.ones(8, 8)
    mask[3:, :4] = 0.25
    return digest(replay.log_probs(mask))


def _llr(on: Stage, k: int, replay: Any) -> str:
    return digest(replay.llr)


def _gradient(on: Stage, k: int, replay: Any) -> str:
    mask = torch.full((1, 8, 8), 0.5, requires_grad=True)
    replay.log_probs(mask).sum().backward()
    return digest(mask.grad)


def _verified(on: Stage, k: int, replay: Any) -> str:
    return digest(probe.verify(on.traces[k], on.model, on.processor).largest_difference)


def _planned(on: Stage, k: int, replay: Any) -> str:
    probe.plan(replay, method="occlusion", seconds=False)
    return digest("a plan depends on what is free")


def operations() -> dict[str, Operation]:
    found: dict[str, Operation] = {"log_probs": _log_probs, "llr": _llr, "gradient": _gradient}
    found |= {"verify": _verified, "plan": _planned}
    for method in METHODS:
        found[f"explain {method}"] = _explained(method, SPAN)
        found[f"explain {method}, the picture's words"] = _explained(method, None)
    for method in ("tmm", "occlusion"):
        found[f"evaluate {method}"] = _evaluated(method)
        found[f"evaluate {method} on the mean"] = _evaluated(method, baseline="mean")
    return found


def determinism(first: int, count: int, seed: int) -> Tally:
    """Ask calls number ``first`` to ``first + count``, ``LENGTH`` on each replay."""
    tally = Tally()
    asked = operations()
    stages = {name: stage(name) for name in ("demo", "qwen2_vl")}

    def fresh(on: Stage, k: int, name: str) -> str:
        key = f"{on.name} {k}: {name}"
        if key not in tally.equal:
            tally.equal[key] = _outcome(asked[name], on, k, on.replay(k))
        return tally.equal[key]

    for begin in range(first, first + count, LENGTH):
        rng = random.Random(f"{seed}/{begin // LENGTH}")
        on = stages[rng.choice(list(stages))]
        k = rng.randrange(2)
        replay = on.replay(k)
        before: list[str] = []
        for _ in range(min(LENGTH, first + count - begin)):
            name = rng.choice(list(asked))
            wanted = fresh(on, k, name)
            tally.tried += 1
            if (found := _outcome(asked[name], on, k, replay)) != wanted:
                said = f"{found} against {wanted}" if "Error" in found + wanted else "another result"
                tally.breaks(
                    "not what a fresh replay gives", f"{name}, {on.name} {k}, after {', '.join(before)}: {said}"
                )
            before.append(name)
    return tally


def _outcome(operation: Operation, on: Stage, k: int, replay: Any) -> str:
    """A digest; of a refusal, its words."""
    try:
        return operation(on, k, replay)
    except probe.ProbeError as error:
        return f"{type(error).__name__}: {error}"


# ----------------------------------------------------------------------------------------------------------------- soak

WARM = 0.2
"""Share of the answers before the first measurement: caches fill, the allocator finds its size."""
GROWTH = 20_000.0
"""Bytes of memory per answer that are taken for the allocator's own unrest: 20 MB in a thousand answers."""

LONG = 200
"""Answers below which the allocator's unrest hides any slope."""


def everything(on: Stage, number: int, folder: Path) -> None:
    """One answer through every public verb."""
    k = number % len(on.pictures)
    method = list(METHODS)[number % len(METHODS)]
    with probe.attach(on.model, on.processor) as p:
        with p.record(folder) as recording:
            on.generate(k)
        if number % 5 == 0:
            with p.masked(torch.full((4, 4), 0.5)):
                on.generate(k)
    (trace,) = recording.traces
    replay = probe.replay(trace, on.model, on.processor)
    heat = probe.explain(replay, method=method, tokens=SPAN, **METHODS[method])
    score = probe.evaluate(heat, replay, steps=8)
    probe.verify(trace, on.model, on.processor)
    probe.report([heat], scores=[score], out=folder / "page.html", overwrite=True)
    repr(heat), heat._repr_html_(), trace._repr_html_()
    heat.write(folder / "explanations" / "heat.h5")
    probe.Heatmap.read(folder / "explanations" / "heat.h5")
    if number % 10 == 0:
        probe.plan(replay, method="tmm", seconds=False)
        probe.causal.knockout(replay, heat)
        probe.compare(replay, methods=["attention", "center"], out=folder / "compare.html", overwrite=True, tokens=SPAN)
    probe.open_store(folder).find(status="complete")
    Path(trace.path).unlink()


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The memory of a tensor, which others may share; ``None`` where it has none of its own."""
    try:
        return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return None


def holdings(on: Stage) -> dict[str, float]:
    """What a process holds."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return {
        "live tensors": len(tensors),
        "bytes of live tensors": sum({s.data_ptr(): s.nbytes() for s in map(_storage, tensors) if s}.values()),
        "hooks": state_of(on.model)["hooks"],
        "registered attention functions": len(ALL_ATTENTION_FUNCTIONS.valid_keys()),
        "open files": len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0,
        "threads": threading.active_count(),
        "resident bytes": pages * os.sysconf("SC_PAGE_SIZE"),
    }


def soak(first: int, count: int, seed: int) -> Tally:
    """Take ``count`` answers through every verb."""
    tally = Tally()
    on = stage("qwen2_vl")
    folder = scratch("soak")
    before = state_of(on.model, on.processor)
    measured: list[tuple[int, dict[str, float]]] = []
    warm = max(len(METHODS), round(WARM * count))
    for number in range(count):
        everything(on, number, folder)
        tally.tried += 1
        if number >= warm and (number - warm) % max(1, count // 20) == 0:
            measured.append((number, holdings(on)))
    measured.append((count, holdings(on)))
    start, end = measured[0][1], measured[-1][1]
    for name in start:
        if name == "resident bytes":
            slope = float(np.polyfit([n for n, _ in measured], [held[name] for _, held in measured], 1)[0])
            tally.reaches("bytes of memory per answer", slope)
            tally.reaches("resident MB at the end", end[name] / 1e6)
            if slope > GROWTH and count >= LONG:
                tally.breaks("memory grows", f"{slope:.0f} bytes per answer, {start[name]:.0f} to {end[name]:.0f}")
            continue
        tally.reaches(f"{name} more at the end", end[name] - start[name])
        if end[name] > start[name]:
            tally.breaks(f"{name} become more", f"{start[name]:g} to {end[name]:g} over {count - warm} answers")
    if changed := differences(before, state_of(on.model, on.processor)):
        tally.breaks("the model is not as it was", changed)
    if not all(same_output(on.generate(k), quiet) for k, quiet in enumerate(on.plain)):
        tally.breaks("the model is broken for good", "after the soak")
    shutil.rmtree(folder, ignore_errors=True)
    return tally


def soak_card(first: int, count: int, seed: int) -> Tally:
    """Take ``count`` answers through every verb on a pretended accelerator."""
    sys.path.append(str(Path(__file__).parents[1] / "device"))
    from pretend import Card  # before this process first runs backward

    tally = Tally()
    on = stage("qwen2_vl")
    folder = scratch("soak-card")
    warm = max(len(METHODS), round(WARM * count))
    held: list[int] = []
    with Card() as card:
        on.model.to("cuda")
        for number in range(count):
            everything(on, number, folder)
            tally.tried += 1
            if number >= warm and (number - warm) % max(1, count // 20) == 0:
                held.append(card.held())
        held.append(card.held())
        on.model.to("cpu")
    tally.reaches("bytes on the card at the end", held[-1])
    tally.reaches("bytes on the card more at the end", held[-1] - held[0])
    if held[-1] > held[0]:
        tally.breaks("memory of the card grows", f"{held[0]} to {held[-1]} over {count - warm} answers")
    shutil.rmtree(folder, ignore_errors=True)
    return tally


CAMPAIGNS = (
    Campaign(
        "determinism",
        "A call gives the same bits whatever was asked of the same replay before, and in every process.",
        "calls",
        4_000,
        500,
        determinism,
    ),
    Campaign("soak", "A thousand answers leave nothing behind.", "answers", 1_000, 1_000, soak, 3600, whole=True),
    Campaign(
        "soak_card",
        "A thousand answers leave nothing on an accelerator (a pretended one).",
        "answers",
        1_000,
        1_000,
        soak_card,
        7200,
        whole=True,
    ),
)
