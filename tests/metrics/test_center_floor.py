"""The blob in the middle as a floor: what it scores, when that is an objection and when a remark, and what it costs."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from toy_replay import ToyReplay, box_weights

import lvlm_probe as probe
from lvlm_probe import explainers
from lvlm_probe.metrics import Score, evaluate
from lvlm_probe.metrics.verdict import CENTER_MARGIN, judge, level_with_center

MIDDLE, CORNER = box_weights(16, slice(6, 10), slice(6, 10)), box_weights(16, slice(0, 4), slice(0, 4))
GOOD: dict[str, Any] = {"deletion": 0.3, "insertion": 0.8, "original_probability": 0.9, "baseline_probability": 0.01}


def marked(replay: Any, values: Any) -> probe.Heatmap:
    heat = explainers.explain(replay, method="random", size=16, strengthen=False)
    return probe.Heatmap(
        np.asarray(values, dtype=np.float32), replay.image_sizes[0], selection=heat.selection, trace=replay.trace,
        method="mine", provenance=heat.provenance, seen=np.ones((16, 16), dtype=bool),
    )  # fmt: skip


def ranked(weights: torch.Tensor) -> torch.Tensor:
    return weights.float() + 1e-3 * torch.rand(weights.shape, generator=torch.Generator().manual_seed(0))


def test_a_map_of_an_object_in_the_middle_is_level_with_the_blob_and_still_trusted() -> None:
    replay = ToyReplay(MIDDLE)
    score = evaluate(marked(replay, ranked(MIDDLE)), replay)
    assert score.verdict.trusted, score.verdict
    assert score.center_gain == pytest.approx(score.gain, abs=CENTER_MARGIN)
    assert any("a blob in the middle of the image scores as well" in remark for remark in score.remarks)


def test_a_map_of_an_object_elsewhere_is_clear_of_the_blob() -> None:
    replay = ToyReplay(CORNER)
    score = evaluate(marked(replay, ranked(CORNER)), replay)
    assert score.verdict.trusted and not score.remarks
    assert score.center_gain < 0 < score.gain


def test_a_map_that_is_worse_than_the_blob_is_not_trusted_and_still_measured() -> None:
    replay = ToyReplay(MIDDLE)
    wide = ranked(box_weights(16, slice(2, 14), slice(5, 16)))  # the object and much beside it
    score = evaluate(marked(replay, wide), replay)
    assert 0.35 < score.gain < score.center_gain - CENTER_MARGIN
    assert not score.verdict.trusted and score.verdict.measured
    (reason,) = score.verdict.reasons
    assert "a blob in the middle of the image, made without looking, has" in reason
    assert evaluate(marked(replay, wide), replay, center=False).verdict.trusted


@pytest.mark.parametrize("weights", [MIDDLE, CORNER, torch.ones(16, 16, dtype=torch.float64) / 256])
@pytest.mark.parametrize("score", ["prob", "log"])
def test_few_points_say_what_the_method_center_scores_on_all(weights: torch.Tensor, score: Any) -> None:
    replay = ToyReplay(weights)
    whole = evaluate(explainers.explain(replay, method="center", size=16, strengthen=False), replay, score=score)
    found = evaluate(marked(replay, ranked(weights)), replay, score=score)
    assert found.center_gain == pytest.approx(whole.gain, abs=0.03)


@pytest.mark.parametrize(("center", "objects", "remarks"), [
    (0.5 + CENTER_MARGIN + 1e-6, True, False),
    (0.5 + CENTER_MARGIN - 1e-6, False, True),
    (0.5, False, True),
    (0.5 - CENTER_MARGIN + 1e-6, False, True),
    (0.5 - CENTER_MARGIN - 1e-6, False, False),
    (-0.4, False, False),
    (math.nan, False, False),
])  # fmt: skip
def test_worse_is_an_objection_level_a_remark(center: float, objects: bool, remarks: bool) -> None:
    verdict = judge(**GOOD, center_gain=center)
    assert verdict.trusted is not objects and verdict.measured
    assert (level_with_center(0.5, center) is not None) is remarks


def test_the_floor_that_was_not_beaten_is_named_with_the_way_on() -> None:
    on = "explain again with preset='thorough' (--param preset=thorough)"
    for change, named in (
        ({"insertion": 0.5}, "the 0 of a random heatmap (threshold 0.35): explain again"),
        ({"random_gains": (0.6,)}, "one of 1 random heatmaps reached 0.60: explain again"),
        ({"center_gain": 0.7}, "made without looking, has 0.70: explain again"),
    ):
        (reason,) = judge(**GOOD | change, way_on=on).reasons
        assert named in reason and reason.endswith(on)


@pytest.mark.parametrize(("params", "way"), [
    ({}, "a larger budget=…, or preset='thorough' (--param preset=thorough)"),
    ({"preset": "fast"}, "explain again with preset='thorough'"),
    ({"preset": "thorough", "iterations": 1, "refine": 0, "ig_steps": 2}, "another method may"),
])  # fmt: skip
def test_a_map_of_igos_that_fails_names_its_own_way_on(params: dict[str, Any], way: str) -> None:
    replay = ToyReplay(torch.ones(16, 16, dtype=torch.float64) / 256)  # no region is better than another
    (reason,) = evaluate(explainers.explain(replay, strengthen=False, **params), replay).verdict.reasons
    assert "not clearly above the 0 of a random heatmap" in reason and way in reason


def test_scores_are_stored_with_it_and_older_ones_read_without() -> None:
    replay = ToyReplay(CORNER)
    score = evaluate(marked(replay, ranked(CORNER)), replay)
    record = json.loads(json.dumps(score.to_dict()))
    assert Score.from_dict(record).center_gain == score.center_gain
    del record["center_gain"]
    assert math.isnan(Score.from_dict(record).center_gain)


def test_it_is_taken_once_for_all_maps_of_the_same_words() -> None:
    model, processor = probe.demo.load()
    (scene,) = probe.demo.scenes(1, split="eval", start=3)
    answer = probe.ask(model, processor, scene.image, scene.question)
    costs = {}
    for center in (True, False):
        replay = probe.replay(answer.trace, model, processor)
        maps = [probe.explain(replay, method=name, strengthen=False) for name in ("random", "input_gradient")]
        for heat in maps:
            before = replay.passes.forward
            evaluate(heat, replay, grid=16, steps=10, center=center, progress=False)
            costs[heat.method, center] = replay.passes.forward - before
        assert replay.kept.facts if center else True
    assert 14 <= costs["random", True] - costs["random", False] <= 40
    assert costs["input_gradient", True] == costs["input_gradient", False]
