"""``probe.log`` where no logger is installed; tests/loggers has the libraries."""

from __future__ import annotations

from typing import Any

import pytest
import report_samples

import lvlm_probe as probe


@pytest.mark.quick
@pytest.mark.parametrize("thing", [{}, None, "run"], ids=repr)
def test_what_is_no_run_is_refused(thing: Any) -> None:
    with pytest.raises(probe.ProbeError, match=rf"what wandb\.init\(\) .* got a builtins\.{type(thing).__name__}"):
        probe.log(report_samples.heat(), report_samples.score(), thing)
