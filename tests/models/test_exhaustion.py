"""Memory that runs out at any one operation, in any verb: the verb goes on and gives the same, or says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import inside
import numpy as np
import pytest
import torch
from marks import campaign
from torch.utils._python_dispatch import TorchDispatchMode

import lvlm_probe as probe
from lvlm_probe import causal, evidence, sanity
from lvlm_probe.errors import OutOfMemory
from lvlm_probe.models.exhaustion import ran_out
from lvlm_probe.models.fingerprint import fingerprint


class RunsOut(TorchDispatchMode):
    """Count operations that take memory, and let one of them find none."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at, self.count, self.met = at, 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        in_place = func._schema.is_mutable or any(value.alias_info is not None for value in func._schema.returns)
        if not in_place and func._schema.name != "aten::_local_scalar_dense":
            self.count += 1
            if self.count == self.at:
                self.met = True
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return func(*args, **(kwargs or {}))


@pytest.mark.quick
def test_what_it_is_told_by() -> None:
    with RunsOut(2) as mode:
        first = torch.ones(3)
        first.mul_(2.0).view(3, 1)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            torch.ones(3)
    assert mode.met and mode.count == 2 and ran_out(caught.value)


def explained(method: str, **params: Any) -> Callable[[Any, Any], Any]:
    def verb(replay: Any, _heat: Any) -> Any:
        tokens = probe.select_tokens(replay, span=(0, 3))
        return probe.explain(replay, method=method, tokens=tokens, **params).values

    return verb


def opened(replay: Any, _heat: Any) -> Any:
    return probe.replay(replay.trace, replay.model, replay.processor).original_log_probs


VERBS = [
    ("replay", lambda replay, _: probe.replay(replay.trace, replay.model, replay.processor).original_log_probs),
    ("center", explained("center")),
    ("iia", explained("iia", points=3)),
    ("evaluate", lambda replay, heat: probe.evaluate(heat, replay, steps=3).insertion),
    ("weights", lambda replay, heat: sanity.weights(replay, heat, stages=1, draws=1).rank_correlations),
    *campaign(
        ("igos++", explained("igos++", preset="fast")), ("tmm", explained("tmm")), ("gradcam", explained("gradcam")),
        ("rise", explained("rise", masks=4)), ("greedy", explained("greedy", segments="grid", regions=4)),
        ("region", lambda replay, heat: evidence.region(replay, heat).area),
        ("modalities", lambda replay, _: causal.modalities(replay, tokens=(0, 3)).both),
        ("edit", lambda replay, heat: probe.edit(replay, heat, remove=0.3).area),
        ("plan", lambda replay, _: float(probe.plan(replay, method="rise", seconds=False).forward or 0)),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "verb"), VERBS)
def test_an_operation_without_memory(name: str, verb: Callable[[Any, Any], Any]) -> None:
    """One of the first, of the last, and of those between."""
    heat = probe.explain(inside.replay("llava"), method="center", tokens=(0, 3))
    replay = inside.replay("llava")
    with RunsOut() as mode:
        expected = verb(replay, heat)
    told = 0
    for place in np.linspace(1, mode.count, 9 if name == "replay" else 7).astype(int):
        replay = inside.replay("llava")
        with RunsOut(int(place)) as mode:
            try:
                found = verb(replay, heat)
            except OutOfMemory:
                told += 1
                continue
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-4)
    assert told


def test_a_model_is_never_taken_for_another_one() -> None:
    """Whose weights cannot be looked at for want of memory; and they are looked at again when there is some."""
    replay = inside.replay("llava")
    known = fingerprint(replay.model)
    with RunsOut() as mode:
        fingerprint(replay.model)
    for place in np.linspace(1, mode.count, 9).astype(int):
        with RunsOut(int(place)), pytest.raises(torch.OutOfMemoryError):
            fingerprint(replay.model)
        assert fingerprint(replay.model) == known


def test_a_processor_without_memory_is_not_called_unable(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = inside.replay("llava")

    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(type(replay.processor.image_processor), "preprocess", full)
    with pytest.raises(OutOfMemory, match=r"does not fit into memory \(MemoryError\)"):
        probe.replay(replay.trace, replay.model, replay.processor)
