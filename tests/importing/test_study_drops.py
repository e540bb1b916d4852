"""How far an answer's probability falls without the picture, against the definition, and what follows from it."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm_probe.errors import ExplainError
from lvlm_probe.importing.drops import band_of, drop_of
from lvlm_probe.study.run import unit_work as working


@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0), st.booleans()), min_size=1, max_size=8))
def test_it_is_the_fall_of_the_product_and_of_the_geometric_mean(tokens: list[tuple[float, float, bool]]) -> None:
    kept = [(seen, blind) for seen, blind, special in tokens if not special]
    if not kept:
        return
    found = drop_of([t[0] for t in tokens], [t[0] - t[1] for t in tokens], [t[2] for t in tokens])
    seen, blind = (math.prod(math.exp(pair[place]) for pair in kept) for place in (0, 1))
    assert found.drop == pytest.approx(1 - blind / seen, rel=1e-6, abs=1e-9)
    count = len(kept)
    assert found.drop_normalised == pytest.approx(1 - blind ** (1 / count) / seen ** (1 / count), rel=1e-6, abs=1e-9)
    assert math.exp(found.log_prob) == pytest.approx(seen, rel=1e-6)
    assert math.exp(found.baseline_log_prob) == pytest.approx(blind, rel=1e-6)


def test_special_tokens_alone_say_nothing() -> None:
    with pytest.raises(ExplainError, match="no tokens besides special ones"):
        drop_of([0.0], [0.0], [True])


def test_beyond_all_numbers() -> None:
    assert drop_of([0.0], [-1e4], [False]).drop == -math.inf
    assert drop_of([0.0], [math.inf], [False]).drop == 1.0
    assert math.isnan(drop_of([math.nan], [math.nan], [False]).drop)
    assert band_of(-math.inf) == "habit"
    assert band_of(math.nan) == "unknown"


@pytest.mark.quick
def test_a_study_says_the_same() -> None:
    log_probs, llr, special = np.array([-0.1, -0.2, -3.0]), np.array([1.5, -0.25, 9.0]), np.array([False, False, True])
    trace: Any = SimpleNamespace(log_probs=log_probs, llr=llr, special=special, notes=())
    assert working.drops(trace) == dataclasses.asdict(drop_of(log_probs, llr, special))
    trace.llr = np.array([-1e4, 0.0, 0.0])
    assert math.isfinite(working.drops(trace)["drop"]), "a record holds no infinity, and still says which way it went"
    assert working.drops(trace)["drop"] < -1e300
    trace.llr = None
    with pytest.raises(ExplainError, match="no log-likelihood ratios"):
        working.drops(trace)
