"""What explainers and metrics need of a replay: a real one has it, and so has the analytic one that tests use."""

from __future__ import annotations

import inspect

import pytest
import torch
from toy_replay import ToyReplay

from lvlm_probe.replaying import Replay, ReplayLike

NAMES = sorted(name for name in vars(ReplayLike) if not name.startswith("_"))


def test_the_toy_is_one() -> None:
    assert isinstance(ToyReplay(torch.tensor([[1.0, 3.0]])), ReplayLike)


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isfunction(vars(ReplayLike)[name])])
@pytest.mark.parametrize("kind", [Replay, ToyReplay])
def test_calls_that_the_protocol_allows_are_taken(kind: type, name: str) -> None:
    wanted = inspect.signature(getattr(ReplayLike, name)).parameters
    taken = inspect.signature(getattr(kind, name)).parameters
    for parameter, one in wanted.items():
        assert parameter in taken
        assert (taken[parameter].kind, taken[parameter].default) == (one.kind, one.default)


def test_every_name_is_explained_where_replays_are() -> None:
    told = inspect.getdoc(Replay) or ""
    for name in NAMES:
        assert name in told or inspect.getdoc(getattr(Replay, name, None)), f"Replay.{name} has no docstring"
