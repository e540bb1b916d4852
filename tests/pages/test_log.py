"""``probe.log`` where no logger is installed; tests/loggers has the libraries."""

from __future__ import annotations

from typing import Any

import pytest
import report_samples
from toy_clip import ToyClip, tube_weights

import lvlm_probe as probe


@pytest.mark.quick
@pytest.mark.parametrize("thing", [{}, None, "run"], ids=repr)
def test_what_is_no_run_is_refused(thing: Any) -> None:
    with pytest.raises(probe.ProbeError, match=rf"what wandb\.init\(\) .* got a builtins\.{type(thing).__name__}"):
        probe.log(report_samples.heat(), report_samples.score(), thing)


def test_a_clip_is_logged_by_frames() -> None:
    toy = ToyClip(tube_weights(8, 8, slice(2, 4), slice(0, 4), slice(0, 4)))
    heat = probe.video.explain(toy, method="input_gradient", size=(4, 8, 8), progress=False)
    with pytest.raises(probe.ProbeError, match=r"got a ClipHeatmap; of a clip log its frames, heat\.frame\(k\)"):
        probe.log(heat, run={})  # type: ignore[arg-type]
