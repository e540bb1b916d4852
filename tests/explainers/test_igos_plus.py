"""iGOS+ is iGOS++ with one mask, without the graduated term and with the mask's own order."""

from __future__ import annotations

import numpy as np
import pytest
from toy_replay import ToyReplay, box_weights

from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers import explain

BOX = box_weights(16, slice(3, 6), slice(9, 13))


@pytest.mark.quick
def test_is_the_one_mask_objective_without_the_graduated_term_in_the_masks_own_order() -> None:
    heat = explain(ToyReplay(BOX), method="igos+")
    assert (heat.params["masks"], heat.params["l2"]) == (1, 0.0)
    assert all(record["l2"] == 0.0 for record in heat.history)
    assert np.array_equal(heat.values, explain(ToyReplay(BOX), method="igos++", preset="paper", masks=1, l2=0.0).values)
    inside = BOX.numpy() > 0
    assert heat.values[inside].min() > heat.values[~inside].max()
    graduated = explain(ToyReplay(BOX), method="igos+", l2=0.5, iterations=2)
    assert graduated.params["l2"] == 0.5
    assert graduated.history[1]["l2"] > 0


def test_refusals() -> None:
    with pytest.raises(ExplainError, match=r"igos\+ has one mask; for masks=2 use method='igos\+\+'"):
        explain(ToyReplay(BOX), method="igos+", masks=2)
    with pytest.raises(ExplainError, match="takes no parameter 'lambda1'"):
        explain(ToyReplay(BOX), method="igos+", lambda1=1.0)
