"""Calls with one replay take turns, whole calls at a time: no other caller comes between the passes of one."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import tiny_models
import torch

import lvlm_probe as probe
from lvlm_probe.explainers import Outcome, register, registry
from lvlm_probe.replaying.isolation import taking_turns


class Replica:
    """Says what happens in which order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    @contextmanager
    def use(self, *, look=False):
        self.log.append("begins")
        yield
        self.log.append("ends")


class Replayed:
    trace_id = "an answer"

    def __init__(self) -> None:
        self.replica = Replica()


@pytest.mark.parametrize("given", ["by place", "by name"])
def test_a_whole_call_holds_the_replica(given):
    replay = Replayed()

    @taking_turns
    def work(_first, replay):
        replay.replica.log.append("works")
        return 7

    assert (work(1, replay) if given == "by place" else work(1, replay=replay)) == 7
    assert replay.replica.log == ["begins", "works", "ends"]


@pytest.fixture
def held(tmp_path, monkeypatch):
    """A replay, and how many blocks of its replica the innermost code stands in."""
    model, processor = tiny_models.build("llava")
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        inputs = tiny_models.inputs("llava", model, processor, [tiny_models.picture()], "What?")
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    replay = probe.replay(recording.traces[0], model, processor)
    depth = [0]
    own = replay.replica.use

    @contextmanager
    def use(*, look=False):
        with own(look=look) as replica:
            depth[0] += 1
            try:
                yield replica
            finally:
                depth[0] -= 1

    monkeypatch.setattr(replay.replica, "use", use)
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    return replay, depth


@pytest.mark.quick
def test_explain_and_evaluate_are_whole_calls(held):
    replay, depth = held
    seen = []

    @register("test turn")
    def turn(problem):
        seen.append(depth[0])
        return Outcome(torch.eye(4))

    heat = probe.explain(replay, method="test turn", tokens=(0, 2), strengthen=False)
    probe.evaluate(heat, replay, steps=2, progress=lambda *_: seen.append(depth[0]))
    assert len(seen) >= 2 and min(seen) > 0
    assert depth == [0]
