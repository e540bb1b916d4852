"""What a whole number is, and that whoever is given a count goes by it: NumPy's are numbers, truth values are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_replay import ToyReplay

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError, ProbeError
from lvlm_probe.kinds import is_whole, told_by_kind
from lvlm_probe.planning import parse_bytes
from lvlm_probe.replaying.micro_batches import Limits


@pytest.mark.quick
def test_whole_numbers_are_those_of_any_library() -> None:
    assert all(map(is_whole, (0, -3, 2**70, np.int64(4), np.uint8(1))))
    assert not any(map(is_whole, (True, np.bool_(True), 1.0, np.float32(2), "1", None, [1])))


def test_who_is_given_a_count_goes_by_it() -> None:
    assert parse_bytes(np.int64(5)) == 5 and Limits(np.int64(4)).micro_batch == 4
    for asked in (lambda: parse_bytes(True), lambda: Limits(True)):
        with pytest.raises(ProbeError, match="number of"):
            asked()
    replay = ToyReplay(torch.full((2, 4, 4), 1 / 16), original=[0.9, 0.8], base=[0.1, 0.1], tokens=["a", "b"])
    heat = probe.explain(replay, method="occlusion", tokens=[np.int64(1)], size=(np.int64(4), 2), patch=1)
    assert heat.selection.indices == (1,) and heat.shape == (4, 2)
    for wrong in ({"tokens": [True]}, {"size": (True, 2)}):
        with pytest.raises(ProbeError, match=r"token numbers|number of cells"):
            probe.explain(replay, method="occlusion", **{"tokens": [1], **wrong})


def test_a_value_of_another_kind_is_told_by_the_parameters_name() -> None:
    def method(problem: object, *, count: int = 1, names: list[str] | None = None) -> object: ...

    for params, error, said in (
        ({"count": "4"}, ExplainError, "mine: count is a whole number; got count='4'"),
        ({"count": np.int64(4), "names": [1]}, ExplainError, "mine: names is a list, each a text or None; got"),
        ({"count": 4, "names": None}, TypeError, "of its own"),
    ):
        with pytest.raises(error, match=said), told_by_kind("mine", method, params):
            raise TypeError("of its own")
