"""What stays alive after an answer was asked everything: for tests, and for a campaign over many answers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lvlm_probe as probe
from lvlm_probe import causal

METHODS: dict[str, dict[str, Any]] = {
    "igos++": {"preset": "fast"},
    "gradcam": {},
    "tmm": {},
    "iia": {"points": 2},
    "input_gradient": {},
    "rise": {"masks": 8},
    "rollout": {},
    "attention": {},
    "tam": {},
}


def alive() -> tuple[int, int]:
    """Tensors that Python knows of, and bytes of their storages, each counted once."""
    gc.collect()
    # Only what has storage of its own: graphs that other tests have compiled leave stand-ins without any.
    found = (item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter))
    tensors = [item for item in found if item.layout == torch.strided and not torch._is_functional_tensor(item)]
    storages = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in tensors}
    return len(tensors), sum(storages.values())


def ask(trace: Any, model: torch.nn.Module, processor: Any, folder: Path) -> list[weakref.ref[Any]]:
    """Every public verb once, on one answer. References to what should not outlive it."""
    held: list[weakref.ref[Any]] = []
    noted = model.register_forward_hook(lambda _m, _a, output: held.append(weakref.ref(output.logits)))
    with probe.attach(model, processor) as p, p.record(folder / "again", images=[trace.image]) as recording:
        given = {name: value.to(model.device) for name, value in trace.model_kwargs.items() if torch.is_tensor(value)}
        prompt = torch.tensor(trace.input_ids).long()[None].to(model.device)
        model.generate(input_ids=prompt, **given, max_new_tokens=3, do_sample=False)
    assert len(recording.traces) == 1 and not recording.faults
    replay = probe.replay(trace, model, processor)
    mask = torch.full((2, 3, 3), 0.5, device=replay.device)
    heats = [
        probe.explain(replay, method=method, strengthen=method == "igos++", **params)
        for method, params in METHODS.items()
    ]
    scores = [probe.evaluate(heat, replay, steps=3) for heat in heats[:3]]
    probe.report(heats[:3], scores=scores, out=folder / "report.html", overwrite=True)
    probe.compare([replay], methods=["center"], out=folder / "compare.html", overwrite=True, steps=3)
    probe.plan(replay, method="rise", seconds=False)
    probe.verify(trace, model, processor)
    replay.log_probs(mask.clone().requires_grad_(True)).sum().backward()
    replay.score_and_grad(mask, lambda log_probs: log_probs.sum(dim=1))
    causal.knockout(replay, heats[0], top=0.2, draws=1)
    causal.patch(replay, heats[0], top=0.2, draws=1)
    probe.sanity.seeds(replay, heats[list(METHODS).index("rise")], seeds=2)
    probe.sanity.weights(replay, heats[list(METHODS).index("gradcam")], stages=1, draws=1)
    noted.remove()
    return [*held, weakref.ref(replay)]


def cycles(
    trace: Any,
    model: torch.nn.Module,
    processor: Any,
    folder: Path,
    *,
    count: int,
    alive: Callable[[], Any] = alive,
) -> list[Any]:
    """What ``alive`` says after each of some rounds of ``ask``, each on a replay of its own.

    Raises:
        AssertionError: something of a round outlives it: a pass's logits, and so its graph, or the replay.
    """
    found = []
    for number in range(count):
        left = ask(trace, model, processor, folder)
        found.append(alive())
        kept = [reference() for reference in left if reference() is not None]
        assert not kept, f"round {number}: {len(kept)} of {len(left)} objects are still alive"
    return found


def collected(trace: Any, load: Callable[[], torch.nn.Module], processor: Any, folder: Path) -> bool:
    """Whether a model is gone after it was asked everything and dropped."""
    model = load()
    ask(trace, model, processor, folder)
    weight, whole = weakref.ref(next(model.parameters())), weakref.ref(model)
    del model
    gc.collect()
    return weight() is None and whole() is None
