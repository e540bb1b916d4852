"""Deletion and insertion: areas with known values, ranks and ties, the released quadrature, and verdicts."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_replay import ToyReplay, box_weights
from trace_samples import sample_capture

from lvlm_probe.errors import ExplainError, ImageError
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.metrics import CurveRule, Score, evaluate
from lvlm_probe.metrics.deletion_insertion import (
    area,
    curve_masks,
    normalise,
    rank,
    release_area,
    release_counts,
    sample_counts,
    tie_share,
)
from lvlm_probe.metrics.verdict import Verdict, judge
from lvlm_probe.selection import TokenSelection, select_tokens
from lvlm_probe.trace import open_trace, write


def heat_of(replay: ToyReplay, values: np.ndarray, seen: np.ndarray | None = None) -> Heatmap:
    return Heatmap(values, replay.image_sizes[0], seen=seen, selection=select_tokens(replay), method="test")


UNIFORM = torch.full((16, 16), 1 / 256, dtype=torch.float64)
BOX = box_weights(16, slice(2, 6), slice(8, 12))  # 16 of 256 cells


# ---------------------------------------------------------------- area


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(-2, 2))
def test_a_constant_curve_has_its_value_as_area(inner: list[float], value: float) -> None:
    fractions = np.array([0.0, *sorted(inner), 1.0])
    assert area(fractions, np.full(len(fractions), value)) == pytest.approx(value, abs=1e-12)


@given(st.lists(st.floats(0, 1), max_size=30))
def test_a_linear_curve_has_area_one_half_wherever_it_is_sampled(inner: list[float]) -> None:
    fractions = np.array([0.0, *sorted(inner), 1.0])
    assert area(fractions, 1 - fractions) == pytest.approx(0.5, abs=1e-12)


@given(st.integers(1, 3000), st.integers(1, 60))
def test_counts_cover_both_ends_evenly(cells: int, steps: int) -> None:
    counts = sample_counts(cells, steps)
    assert counts[0] == 0
    assert counts[-1] == cells
    assert len(counts) == min(steps, cells) + 1
    assert np.ptp(np.diff(counts)) <= 1


def test_release_area_of_a_linear_curve_is_what_the_release_gives() -> None:
    counts = release_counts(1024)
    assert len(counts) - 1 == 52
    assert counts[-2:].tolist() == [1020, 1024]
    linear = counts / 1024
    assert release_area(counts, 1 - linear, insert=False) == pytest.approx(0.494, abs=5e-4)
    assert release_area(counts, linear, insert=True) == pytest.approx(0.510, abs=5e-4)
    # The slip: the last chunk, whose true score is 0, adds its full width.
    slip = release_area(counts, 1 - linear, insert=False) - float((np.diff(counts) * (1 - linear[1:])).sum()) / 1024
    assert slip == pytest.approx(4 / 1024)


def test_normalise_maps_ends_to_one_and_zero_without_clamping() -> None:
    curve = normalise(np.array([0.8, 0.9, 0.2, 0.1]), original=0.8, baseline=0.2)
    assert curve.tolist() == pytest.approx([1.0, 7 / 6, 0.0, -1 / 6])
    assert np.isnan(normalise(np.array([0.5, 0.5]), original=0.5, baseline=0.5)).all()


# ---------------------------------------------------------------- ranking


def test_rank_is_by_value_with_unseen_cells_last() -> None:
    values = np.array([[0.1, 0.9], [0.5, 1.0]])
    seen = np.array([[True, True], [True, False]])
    assert rank(values, seen, np.random.default_rng(0)).tolist() == [1, 2, 0, 3]


def test_ties_are_broken_without_bias() -> None:
    values = np.zeros((4, 4))
    seen = np.ones((4, 4), dtype=bool)
    generator = np.random.default_rng(0)
    position = np.zeros(16)
    for _ in range(4000):
        position[rank(values, seen, generator)] += np.arange(16)
    assert np.abs(position / 4000 - 7.5).max() < 0.35  # standard error 0.07


def test_tie_share_counts_seen_cells_only() -> None:
    values = np.array([[0.0, 0.0], [0.5, 0.7]])
    seen = np.ones((2, 2), dtype=bool)
    assert tie_share(values, seen) == 0.5
    assert tie_share(values, np.array([[True, False], [True, True]])) == 0.0
    assert tie_share(values, np.zeros((2, 2), dtype=bool)) == 0.0


def test_masks_along_a_curve() -> None:
    order, counts = np.array([2, 0, 3, 1]), np.array([0, 1, 3])
    deletion = curve_masks(order, counts, (2, 2), insert=False)
    assert deletion.tolist() == [[[1, 1], [1, 1]], [[1, 1], [0, 1]], [[0, 1], [0, 0]]]
    assert torch.equal(curve_masks(order, counts, (2, 2), insert=True), 1 - deletion)


# ---------------------------------------------------------------- the whole


def test_every_order_of_a_uniform_scorer_gives_one_half() -> None:
    replay = ToyReplay(UNIFORM)
    for seed in range(3):
        values = np.random.default_rng(seed).random((16, 16))
        score = evaluate(heat_of(replay, values), replay)
        assert score.deletion == pytest.approx(0.5, abs=1e-6)
        assert score.insertion == pytest.approx(0.5, abs=1e-6)
        assert np.allclose(score.deletion_curve, 1 - np.array(score.fractions), atol=1e-6)


def test_perfect_heatmap_gives_the_analytic_area() -> None:
    # All of the answer on 16 of 256 cells, equally: both curves are straight until 1/16, flat from there.
    replay = ToyReplay(BOX)
    values = BOX.numpy() / BOX.numpy().max() * 0.5 + np.random.default_rng(0).random((16, 16)) * 0.1
    score = evaluate(heat_of(replay, values), replay, steps=256)
    assert score.deletion == pytest.approx(1 / 32, abs=1e-5)
    assert score.insertion == pytest.approx(1 - 1 / 32, abs=1e-5)
    assert score.gain == pytest.approx(1 - 1 / 16, abs=1e-5)
    assert score.verdict.trusted
    inverse = evaluate(heat_of(replay, 1 - values), replay, steps=256)
    assert inverse.deletion == pytest.approx(1 - 1 / 32, abs=1e-5)
    assert not inverse.verdict.trusted


def test_curves_before_normalisation_are_the_scorers_own() -> None:
    replay = ToyReplay(BOX, original=[0.9], base=[0.01])
    score = evaluate(heat_of(replay, BOX.numpy()), replay, steps=256)
    assert score.original == pytest.approx(0.9)
    assert score.baseline == pytest.approx(0.01)
    removed = np.minimum(np.array(score.fractions) * 16, 1)
    assert np.allclose(score.deletion_raw, 0.01 + 0.89 * (1 - removed), atol=1e-5)
    assert np.allclose(score.insertion_raw, 0.01 + 0.89 * removed, atol=1e-5)
    logarithmic = evaluate(heat_of(replay, BOX.numpy()), replay, steps=256, score="log")
    assert np.allclose(logarithmic.deletion_raw, np.log(0.01 + 0.89 * (1 - removed)), atol=1e-4)
    assert logarithmic.original == pytest.approx(math.log(0.9), abs=1e-6)
    # log is concave: half the probability is far more than half the way down.
    assert score.deletion < logarithmic.deletion < 0.1


def test_score_is_the_mean_probability_of_the_selected_tokens_only() -> None:
    weights = torch.stack([BOX, UNIFORM])
    replay = ToyReplay(weights, original=[0.9, 0.7], base=[0.02, 0.68])
    score = evaluate(heat_of(replay, BOX.numpy()), replay, steps=256)  # the second token's ratio is far below 1
    assert score.provenance["tokens"] == [0]
    assert score.original == pytest.approx(0.9)
    both = Heatmap(BOX.numpy(), (64, 64), selection=select_tokens(replay, rule="joint"))
    assert evaluate(both, replay, steps=8).original == pytest.approx(0.8)


@settings(max_examples=20)
@given(st.integers(0, 2**31 - 1))
def test_only_the_order_of_values_matters(seed: int) -> None:
    replay = ToyReplay(BOX)
    values = np.random.default_rng(seed).permutation(256).reshape(16, 16) / 256
    plain = evaluate(heat_of(replay, values), replay)
    curved = evaluate(heat_of(replay, values**3 * 0.5), replay)
    assert plain.deletion_curve == curved.deletion_curve
    assert plain.tie_share == 0.0
    assert plain.params["tie_orders"] == 1


@pytest.mark.quick
def test_mirroring_scorer_and_heatmap_together_changes_nothing() -> None:
    values = np.random.default_rng(4).permutation(256).reshape(16, 16) / 256
    straight = evaluate(heat_of(ToyReplay(BOX), values), ToyReplay(BOX))
    mirrored_replay = ToyReplay(BOX.flip(1))
    mirrored = evaluate(heat_of(mirrored_replay, values[:, ::-1]), mirrored_replay)
    assert mirrored.deletion == pytest.approx(straight.deletion, abs=1e-6)
    assert mirrored.insertion == pytest.approx(straight.insertion, abs=1e-6)


def test_a_constant_heatmap_is_chance_and_is_called_tied() -> None:
    replay = ToyReplay(BOX)
    score = evaluate(heat_of(replay, np.full((16, 16), 0.5)), replay, curve=CurveRule(tie_orders=60))
    assert score.tie_share == 1.0
    assert abs(score.deletion - 0.5) < 0.05
    assert abs(score.insertion - 0.5) < 0.05
    assert not score.verdict.trusted
    assert any("100% of the cells are tied" in reason for reason in score.verdict.reasons)
    assert evaluate(heat_of(replay, np.full((16, 16), 0.5)), replay).params["tie_orders"] == 3


@pytest.mark.quick
def test_ties_count_where_the_score_hangs_on_their_order() -> None:
    """The true mask of an object has two values and is the best map there is."""
    replay = ToyReplay(BOX)
    mask = (BOX.numpy() > 0).astype(np.float32)
    found = evaluate(heat_of(replay, mask), replay)
    assert found.tie_share == 1.0 and found.gain > 0.8
    assert found.verdict.trusted
    rectified = (
        np.random.default_rng(3).random((16, 16)).astype(np.float32) * mask
    )  # zeros outside, as Grad-CAM has them
    relu = evaluate(heat_of(replay, rectified), replay)
    assert relu.tie_share > 0.5 and relu.params["tie_spread"] < 0.05
    assert relu.verdict.trusted
    # One cell holds the object and is tied with nearly all others: where it comes in the order is chance.
    one = np.zeros((16, 16), dtype=np.float32)
    one[3, 4] = 1
    narrow = ToyReplay(torch.from_numpy(one))
    blind = np.zeros((16, 16), dtype=np.float32)
    blind[12:, 12:] = np.linspace(0.5, 1, 16).reshape(4, 4)
    hangs = evaluate(heat_of(narrow, blind), narrow, curve=CurveRule(tie_orders=6))
    assert hangs.params["tie_spread"] > 0.05
    assert any("with their order" in reason for reason in hangs.verdict.reasons)
    assert evaluate(heat_of(narrow, blind), narrow, curve=CurveRule(tie_orders=1)).params["tie_spread"] is None


def test_the_spread_over_tie_orders_is_that_of_scores_of_one_order_each() -> None:
    replay, values = ToyReplay(BOX), np.round(np.random.default_rng(8).random((16, 16)) * 3) / 3
    for auc in ("trapezoid", "release"):
        together = evaluate(heat_of(replay, values), replay, curve=CurveRule(tie_orders=5, seed=4, auc=auc))
        assert together.params["tie_spread"] > 0
        # The same generator gives the same orders, one after the other.
        generator, gains = np.random.default_rng(4), []
        for _ in range(5):
            pair = []
            for _curve in ("deletion", "insertion"):
                order = np.empty(256)
                order[rank(values, np.ones((16, 16), dtype=bool), generator)] = np.arange(256, 0, -1) / 256
                pair.append(evaluate(heat_of(replay, order.reshape(16, 16)), replay, curve=CurveRule(auc=auc)))
            gains.append(pair[1].insertion - pair[0].deletion)
        assert together.gain == pytest.approx(np.mean(gains), abs=1e-6)
        assert together.params["tie_spread"] == pytest.approx(np.std(gains, ddof=1), abs=1e-6)


def test_the_rule_of_the_curves_may_be_given_the_old_way_for_one_release() -> None:
    replay, values = ToyReplay(BOX), np.full((16, 16), 0.5)
    with pytest.warns(DeprecationWarning, match=r"seed, tie_orders of evaluate\(\) .*=CurveRule\(seed=…, "):
        old = evaluate(heat_of(replay, values), replay, seed=1, tie_orders=2)  # type: ignore[call-arg]
    assert old == evaluate(heat_of(replay, values), replay, curve=CurveRule(seed=1, tie_orders=2))
    with pytest.raises(TypeError, match="tie_order"):
        evaluate(heat_of(replay, values), replay, tie_order=2)  # type: ignore[call-arg]


def test_ties_are_reproducible_by_seed() -> None:
    replay, values = ToyReplay(BOX), np.full((16, 16), 0.5)
    first = evaluate(heat_of(replay, values), replay, curve=CurveRule(seed=1))
    assert first.deletion == evaluate(heat_of(replay, values), replay, curve=CurveRule(seed=1)).deletion
    assert first.deletion != evaluate(heat_of(replay, values), replay, curve=CurveRule(seed=2)).deletion


def test_cells_out_of_sight_do_not_flatter() -> None:
    # The left half is out of sight; a scorer uniform over the right half is still chance for every order.
    weights = torch.zeros(16, 16, dtype=torch.float64)
    weights[:, 8:] = 1 / 128
    seen = torch.ones(64, 64, dtype=torch.bool)
    seen[:, :32] = False
    replay = ToyReplay(weights, seen=seen)
    values = np.random.default_rng(0).random((16, 16))
    heat = heat_of(replay, values, seen=replay.seen(0, (16, 16)).numpy())
    score = evaluate(heat, replay)
    assert score.deletion == pytest.approx(0.5, abs=1e-6)
    assert score.insertion == pytest.approx(0.5, abs=1e-6)
    # The released rule counts them: the same heatmap looks far better than it is.
    assert evaluate(heat, replay, curve=CurveRule(auc="release")).deletion < 0.27


def test_release_rule_end_to_end() -> None:
    replay = ToyReplay(torch.full((32, 32), 1 / 1024))
    heat = heat_of(replay, np.random.default_rng(0).random((32, 32)))
    replay.passes.forward = 0
    score = evaluate(heat, replay, curve=CurveRule(auc="release"), center=False)
    assert score.deletion == pytest.approx(0.494, abs=5e-4)
    assert score.insertion == pytest.approx(0.510, abs=5e-4)
    assert len(score.fractions) == 53
    assert replay.passes.forward == 2 + 2 * 51


def test_grid_resamples_the_heatmap() -> None:
    replay = ToyReplay(BOX)
    fine = np.kron(BOX.numpy(), np.ones((4, 4))) * 16
    score = evaluate(heat_of(replay, fine), replay, grid=16, steps=256)
    assert score.params["grid"] == [16, 16]
    assert score.deletion == pytest.approx(1 / 32, abs=1e-5)
    assert evaluate(heat_of(replay, BOX.numpy()), replay, grid=(32, 32)).params["grid"] == [32, 32]


def test_equal_ends_are_a_verdict_not_a_division() -> None:
    replay = ToyReplay(BOX, original=[0.5], base=[0.5])
    heat = Heatmap(BOX.numpy(), (64, 64), selection=select_tokens(replay, rule="joint"))
    with np.errstate(all="raise"):
        score = evaluate(heat, replay)
    assert math.isnan(score.deletion)
    assert not score.verdict.trusted
    assert "changes the probability of these tokens hardly at all" in score.verdict.reasons[0]
    assert json.loads(json.dumps(score.to_dict(), allow_nan=False))["deletion"] is None


def test_no_heatmap_is_a_verdict() -> None:
    replay = ToyReplay(BOX, original=[0.5], base=[0.4])
    heat = Heatmap(None, (64, 64), selection=select_tokens(replay), reason="nothing to explain")
    score = evaluate(heat, replay)
    assert str(score.verdict) == "do not trust: there is no heatmap, because nothing to explain"
    assert replay.passes.forward == 0


def test_score_knows_whether_the_baseline_is_the_explanations_own() -> None:
    replay = TwoBaselines(BOX)
    heat = dataclasses.replace(heat_of(replay, BOX.numpy()), provenance={"baseline": dict(replay.baseline)})
    assert evaluate(heat, replay, steps=2).baseline_check["same_as_explained"] is True
    assert evaluate(heat, replay, steps=2, baseline={"kind": "mean"}).baseline_check["same_as_explained"] is False
    assert evaluate(heat_of(replay, BOX.numpy()), replay, steps=2).baseline_check["same_as_explained"] is None


class TwoBaselines(ToyReplay):
    """A toy whose answer keeps more probability on one baseline than on the other."""

    KEPT = {"blur": 0.01, "mean": 0.31, "blank": 0.02}

    def over(self, baseline="blur", **params):
        if isinstance(baseline, dict):
            baseline, params = baseline["kind"], {key: value for key, value in baseline.items() if key != "kind"}
        if baseline not in self.KEPT:
            raise ImageError(f"no baseline {baseline!r}")
        if set(params) - {"strength", "limit"}:
            raise TypeError(f"unexpected {sorted(params)}")
        other = copy.copy(self)
        other.base_probability = torch.full_like(self.base_probability, self.KEPT[baseline])
        other.baseline = {"kind": baseline, **params}
        return other


def test_a_held_out_baseline_judges_and_the_replay_keeps_its_own() -> None:
    replay = TwoBaselines(BOX)
    heat = dataclasses.replace(heat_of(replay, BOX.numpy()), provenance={"baseline": dict(replay.baseline)})
    description, before = dict(replay.baseline), replay.baseline_log_probs.clone()
    own, held_out = evaluate(heat, replay, steps=256), evaluate(heat, replay, steps=256, baseline="mean")
    assert own.baseline_check["kind"] == "blur"
    assert own.params["held_out"] is False
    assert held_out.baseline_check["kind"] == "mean"
    assert held_out.baseline_check["same_as_explained"] is False
    assert held_out.baseline_check["mean_probability"] == pytest.approx(0.31)
    assert held_out.params["held_out"] is True
    assert held_out.baseline == pytest.approx(0.31)
    assert any("still leaves these tokens a probability of 0.31" in reason for reason in held_out.verdict.reasons)
    # The toy is linear, so normalised curves are the same over any baseline.
    assert held_out.deletion == pytest.approx(own.deletion, abs=1e-5)
    assert replay.baseline == description
    assert torch.equal(replay.baseline_log_probs, before)
    parameters = evaluate(heat, replay, steps=2, baseline=("blur", {"strength": 0.6}))
    assert parameters.baseline_check["same_as_explained"] is False
    assert evaluate(heat, replay, steps=2, baseline=("blur", {"strength": 0.1})).baseline_check["same_as_explained"]


def test_the_baseline_survives_errors() -> None:
    replay = TwoBaselines(BOX)
    heat, description = heat_of(replay, BOX.numpy()), dict(replay.baseline)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(heat, replay, baseline="mean", progress=stop)
    with pytest.raises(ImageError):
        evaluate(heat, replay, baseline="stripes")
    with pytest.raises(ExplainError, match="a kind with its parameters"):
        evaluate(heat, replay, baseline=("blur", {"sigma": 3}))
    assert replay.baseline == description
    assert float(replay.baseline_log_probs.exp()[0]) == pytest.approx(0.01)


def test_the_limit_of_the_blur_is_the_mean_colour_by_another_name() -> None:
    replay = TwoBaselines(BOX)
    limit = {"kind": "blur", "strength": None, "limit": "mean colour"}
    heat = dataclasses.replace(heat_of(replay, BOX.numpy()), provenance={"baseline": limit})
    assert evaluate(heat, replay, steps=2, baseline="mean").baseline_check["same_as_explained"] is True
    assert evaluate(heat, replay, steps=2, baseline="blank").baseline_check["same_as_explained"] is False


def test_a_held_out_baseline_on_a_real_replay(demo, tmp_path) -> None:
    import lvlm_probe as probe

    model, processor = demo
    (scene,) = probe.demo.scenes(1, split="tune", seed=4, kinds=["colour"])
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs)
    replay = probe.replay(recording.traces[0], model, processor)
    heat = probe.explain(replay, iterations=2, ig_steps=2)
    path, description, log_probs = replay.path, dict(replay.baseline), replay.baseline_log_probs
    picture = Image.new("RGB", replay.image_sizes[0], (10, 200, 10))
    for choice, kind in [("mean", "mean"), ("noise", "noise"), ([picture], "image")]:
        score = evaluate(heat, replay, steps=4, baseline=choice)
        assert score.baseline_check["kind"] == kind
        assert score.baseline_check["same_as_explained"] is False
        # The same by hand, on a replay of its own.
        other = probe.replay(recording.traces[0], model, processor).over(choice)
        assert score.deletion == evaluate(heat, other, steps=4, baseline=other.baseline).deletion
        expected = other.baseline_log_probs[list(heat.selection.decided)].exp().mean()
        assert score.baseline_check["mean_probability"] == pytest.approx(float(expected), rel=1e-4)
    passes = replay.passes.forward
    evaluate(heat, replay, steps=4, baseline="mean")
    assert replay.passes.forward > passes
    assert replay.path is path
    assert replay.baseline == description
    assert torch.equal(replay.baseline_log_probs, log_probs)
    assert evaluate(heat, replay, steps=4).baseline_check["same_as_explained"] is True


def test_random_heatmaps_on_request() -> None:
    replay = ToyReplay(BOX)
    score = evaluate(heat_of(replay, BOX.numpy()), replay, chance=5)
    assert len(score.random_gains) == 5
    assert max(abs(gain) for gain in score.random_gains) < 0.5
    assert score.gain > max(score.random_gains)


def test_replay_that_differs_from_the_recording_is_not_trusted() -> None:
    replay = ToyReplay(BOX)
    replay.trace.log_probs = replay.trace.log_probs - 0.5
    score = evaluate(heat_of(replay, BOX.numpy()), replay)
    assert any("differs from the recording by 0.5 nats" in reason for reason in score.verdict.reasons)


def test_a_score_survives_json() -> None:
    replay = ToyReplay(BOX)
    score = evaluate(heat_of(replay, BOX.numpy()), replay, steps=10, chance=2)
    record = json.loads(json.dumps(score.to_dict(), allow_nan=False))
    assert Score.from_dict(record) == score
    with pytest.raises(ExplainError, match="not a stored score"):
        Score.from_dict({"deletion": 1})
    for name, wrong in (
        ("verdict", None),
        ("verdict", "held"),
        ("params", [1]),
        ("fractions", []),
        ("deletion", "low"),
    ):
        with pytest.raises(ExplainError, match="not a stored score"):
            Score.from_dict({**record, name: wrong})


def test_refusals() -> None:
    replay = ToyReplay(BOX)
    heat = heat_of(replay, BOX.numpy())
    other = ToyReplay(BOX, tokens=["else"])
    with pytest.raises(ExplainError, match="another answer"):
        evaluate(heat, other)
    for options, message in [
        ({"score": "logit"}, "score is"),
        ({"steps": 0}, "steps is a whole number of at least 1"),
        ({"steps": 2.5}, "steps is a whole number of at least 1"),
        ({"chance": -1}, "chance is a whole number of at least 0"),
        ({"chance": "2"}, "chance is a whole number of at least 0"),
        ({"grid": 2.5}, "grid is a number of cells"),
        ({"curve": CurveRule(auc="release"), "steps": 10}, "leave steps out"),
        ({"curve": "adaptive"}, "curve is a probe.metrics.CurveRule"),
        ({"grid": (4,)}, "grid is"),
    ]:
        with pytest.raises(ExplainError, match=message):
            evaluate(heat, replay, **options)
    with pytest.raises(ExplainError, match=r"what explain\(\) returns; got a ndarray"):
        evaluate(BOX.numpy(), replay)  # type: ignore[arg-type]
    for rule, message in [
        ({"auc": "simpson"}, "auc is"),
        ({"tie_orders": 0}, "tie_orders is a whole number of at least 1"),
        ({"tie_orders": 2.5}, "tie_orders is a whole number"),
        ({"seed": -1}, "seed is a whole number of at least 0"),
        ({"tolerance": "0.1"}, "tolerance is a positive share"),
    ]:
        with pytest.raises(ExplainError, match=message):
            CurveRule(**rule)
    blind = Heatmap(BOX.numpy(), (64, 64), seen=np.zeros((16, 16), bool), selection=select_tokens(replay))
    with pytest.raises(ExplainError, match="sees none"):
        evaluate(blind, replay)


# ---------------------------------------------------------------- verdicts

GOOD = {
    "deletion": 0.1,
    "insertion": 0.9,
    "original_probability": 0.9,
    "baseline_probability": 0.01,
    "tie_share": 0.0,
    "replay_difference": 1e-5,
    "parity_error": 0.4,
}


def test_good_numbers_raise_no_objection() -> None:
    verdict = judge(**GOOD)
    assert verdict.trusted
    assert verdict.reasons == ()
    assert str(verdict).startswith("no objection")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"empty": "no token gains more"}, "there is no heatmap"),
        ({"baseline_probability": 0.2}, "still leaves these tokens a probability of 0.2"),
        ({"baseline_probability": 0.88}, "hardly at all (0.9 with the image, 0.88 without, 0.022 nats)"),
        (
            {"original_probability": 0.028, "baseline_probability": 0.0051},
            "likelier, but they stay so improbable (0.028 with the image, 0.0051 without, 1.7 nats)",
        ),
        (
            {"original_probability": 0.06, "baseline_probability": 0.6},
            "likelier without the image (0.06 with the image, 0.6 without, -2.3 nats)",
        ),
        ({"original_probability": 0.02, "baseline_probability": 0.0}, "only 0.02"),
        ({"insertion": 0.25}, "not clearly above the 0 of a random heatmap"),
        ({"insertion": math.nan}, "undefined"),
        ({"random_gains": (0.1, 0.85)}, "one of 2 random heatmaps reached 0.85"),
        ({"tie_share": 0.51, "tie_spread": 0.2}, "51% of the cells are tied"),
        ({"tie_share": 0.51, "tie_spread": 0.2}, "varies by ±0.20 with their order"),
        ({"replay_difference": 0.2}, "differs from the recording"),
        ({"replay_difference": math.nan}, "differs from the recording"),
        ({"deterministic": False}, "same inputs twice"),
        ({"parity_error": 3.0}, "evaluate with mode='exact'"),
    ],
)
def test_each_objection(change: dict[str, object], words: str) -> None:
    verdict = judge(**GOOD | change)
    assert not verdict.trusted
    assert any(words in reason for reason in verdict.reasons)
    assert str(verdict).startswith("do not trust: ")
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict


def test_little_contrast_never_contradicts_the_ratio_that_selected_the_words() -> None:
    """A word of an LLR over 1 "comes from the image": no verdict may then say that the image does next to nothing."""
    for original in (0.001, 0.028, 0.05, 0.9):
        for ratio in (-2.0, 0.01, 0.9, 1.1, 5.0):
            told = " ".join(
                judge(
                    **GOOD | {"original_probability": original, "baseline_probability": original / math.exp(ratio)}
                ).reasons
            )
            assert ("hardly at all" in told) <= (abs(ratio) <= 1)
            assert ("the image makes these tokens likelier" in told) <= (ratio > 1)


@pytest.mark.parametrize(
    ("areas", "told"),
    [
        ((0.0, 1.0), ()),
        ((-1e-8, 1 + 1e-8), ()),
        ((-3.5, 0.9), ("deletion -3.5 is below 0 (0 is the baseline, 1 the whole image): with parts of the image taken "
                       "away, the words are less likely than on the baseline",)),
        ((0.1, 28.3), ("insertion 28.3 is above 1 (0 is the baseline, 1 the whole image): with only parts of the image "
                       "in sight, the words are likelier than with the whole image",)),
        ((math.nan, math.nan), ()),
    ],
)  # fmt: skip
def test_areas_outside_0_to_1_are_explained(areas: tuple[float, float], told: tuple[str, ...]) -> None:
    replay = ToyReplay(BOX)
    score = evaluate(Heatmap(BOX.numpy(), (64, 64), selection=select_tokens(replay, rule="joint")), replay)
    assert dataclasses.replace(score, deletion=areas[0], insertion=areas[1]).remarks == told


def test_unknowns_and_exact_mode_raise_no_objection() -> None:
    assert judge(**GOOD | {"parity_error": 3.0, "parity_mode": "exact"}).trusted
    assert judge(**GOOD | {"parity_error": None, "replay_difference": None}).trusted


def test_a_selection_of_another_answer_is_refused_before_any_pass() -> None:
    replay = ToyReplay(BOX)
    foreign = TokenSelection((0,), ("other",), (3.0,), "llr")
    with pytest.raises(ExplainError):
        evaluate(Heatmap(BOX.numpy(), (64, 64), selection=foreign), replay)
    assert replay.passes.forward == 0


def test_a_trace_in_the_place_of_a_replay_is_refused_in_a_sentence(tmp_path) -> None:
    trace = open_trace(write(sample_capture(), tmp_path))
    with pytest.raises(ExplainError, match=r"this is a trace: evaluate\(heat, probe.replay\(trace"):
        evaluate(heat_of(ToyReplay(BOX), BOX.numpy()), trace)


def test_baseline_check_looks_at_what_the_picture_decides(demo, tmp_path) -> None:
    """The later pieces of a word follow from its first one, and must not count against the baseline."""
    import lvlm_probe as probe

    model, processor = demo
    for scene in probe.demo.scenes(40, split="tune", seed=3, kinds=["colour"]):
        if any(word in scene.answer for word in ("yellow", "purple")):
            break
    with probe.attach(model, processor) as p, p.record(tmp_path) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs)
    replay = probe.replay(recording.traces[0], model, processor)
    word = next(item for item in replay.words if item.text in ("yellow", "purple"))
    assert word.stop - word.start > 1
    heat = probe.explain(replay, tokens=(word.start, word.stop), iterations=1, ig_steps=2)
    assert len(heat.selection.decided) < len(heat.selection)
    score = probe.evaluate(heat, replay)
    assert score.baseline_check["passed"]
    whole = replay.baseline_log_probs[list(heat.selection.indices)].exp().mean()
    assert score.baseline_check["mean_probability"] < 0.05 < float(whole)
