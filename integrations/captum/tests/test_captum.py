"""captum's attributions against the methods of lvlm_probe, closed forms, and captum called by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from captum import attr
from float64 import in_float64
from lvlm_probe_captum import Forward, forward
from toy_replay import ToyReplay, box_weights

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError, SelectionError
from lvlm_probe.explainers import methods, needs_of

METHODS = [name for name in methods() if name.startswith("captum:")]
QUICK = {
    "captum:integrated_gradients": {"steps": 3},
    "captum:gradient_shap": {"samples": 3},
    "captum:shapley_value_sampling": {"orders": 2},
    "captum:kernel_shap": {"samples": 12},
}


@pytest.fixture(scope="module")
def replay(demo, tmp_path_factory) -> probe.Replay:
    scene = next(scene for scene in probe.demo.scenes(40) if scene.kind == "colour")
    return probe.ask(*demo, scene.image, scene.question, out=tmp_path_factory.mktemp("traces")).replay


@contextmanager
def exact(replay: probe.Replay) -> Iterator[probe.Replay]:
    """The same answer in float64, by a replay that has kept nothing in float32."""
    with in_float64(replay.model):
        yield probe.replay(replay.trace, replay.model, replay.processor, strict=False)


@pytest.fixture
def toy() -> ToyReplay:
    """log P = log(0.1 + 0.8 Σ w m), of a place alone that no symmetry hides."""
    weights = torch.rand(2, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return ToyReplay(weights / weights.sum(), base=[0.1])


def values_of(heat) -> np.ndarray:
    """Attributions in nats; what is left of negative ones is nothing."""
    return heat.values * heat.provenance["diagnostics"]["unit"]


def test_integrated_gradients_equal_ours_in_float64(replay) -> None:
    with exact(replay) as replay:
        options = {"tokens": (0, 3), "strengthen": False, "size": (5, 6), "steps": 6, "sign": "absolute"}
        for ours, theirs in (("midpoint", "riemann_middle"), ("gauss_legendre", "gausslegendre")):
            mine = probe.explain(replay, method="integrated_gradients", rule=ours, **options)
            captums = probe.explain(replay, method="captum:integrated_gradients", rule=theirs, **options)
            # A heatmap is float32, and so are the masks of ours; the units are not rounded.
            units = [heat.provenance["diagnostics"]["unit"] for heat in (mine, captums)]
            assert units[0] == pytest.approx(units[1], rel=1e-6)
            assert np.allclose(mine.values, captums.values, atol=1e-6)
            assert captums.provenance["diagnostics"]["attributed"] == pytest.approx(
                mine.provenance["diagnostics"]["attributed"], rel=1e-6
            )
            assert captums.provenance["passes"]["backward"] == 6


def test_gradient_at_the_whole_image_equals_ours(replay) -> None:
    options = {"tokens": (0, 3), "strengthen": False, "size": 6}
    with exact(replay) as replay:
        probe.explain(replay, method="input_gradient", **options)  # what is known of the answer, in this type
        ours, theirs = (
            probe.explain(replay, method=m, **options) for m in ("input_gradient", "captum:input_x_gradient")
        )
    assert np.allclose(ours.values, theirs.values, atol=1e-6)
    assert ours.provenance["passes"] == theirs.provenance["passes"]


def test_occlusion_equals_ours(replay) -> None:
    options = {"tokens": (0, 3), "strengthen": False, "size": (4, 5), "patch": 1, "score": "prob"}
    ours, theirs = (probe.explain(replay, method=m, **options) for m in ("occlusion", "captum:occlusion"))
    assert np.allclose(ours.values, theirs.values, atol=1e-4)
    del options["patch"]
    ablated = probe.explain(replay, method="captum:feature_ablation", batch=7, **options)
    assert np.allclose(ours.values, ablated.values, atol=1e-4)


def test_windows_stay_inside() -> None:
    replay = ToyReplay(box_weights(4, slice(0, 2), slice(0, 2)), base=[0.1])
    heat = probe.explain(replay, method="captum:occlusion", size=4, patch=2, score="prob")
    drops = np.zeros((3, 3))
    for row, col in itertools.product(range(3), repeat=2):
        drops[row, col] = 0.8 / 4 * max(0, 2 - row) * max(0, 2 - col)
    expected = np.array(
        [[np.mean([drops[r, c] for r in (row - 1, row) for c in (col - 1, col) if 0 <= r < 3 and 0 <= c < 3])
          for col in range(4)] for row in range(4)]
    )  # fmt: skip
    assert heat.provenance["diagnostics"]["unit"] == pytest.approx(expected.max(), rel=1e-5)
    assert np.allclose(heat.values, expected / expected.max(), atol=2e-3)


def shapley_by_hand(weights: np.ndarray) -> np.ndarray:
    """Shapley values of log(0.1 + 0.8 Σ w) over all subsets."""
    n, flat = weights.size, weights.ravel()
    value = {
        s: math.log(0.1 + 0.8 * flat[list(s)].sum()) for k in range(n + 1) for s in itertools.combinations(range(n), k)
    }
    found = np.zeros(n)
    for player in range(n):
        for s in value:
            if player not in s:
                share = math.factorial(len(s)) * math.factorial(n - len(s) - 1) / math.factorial(n)
                found[player] += share * (value[tuple(sorted((*s, player)))] - value[s])
    return found.reshape(weights.shape)


@pytest.mark.parametrize(
    ("method", "params", "close"),
    [("captum:shapley_value_sampling", {"orders": 400}, 0.05), ("captum:kernel_shap", {"samples": 2000}, 0.15)],
)
def test_shapley_values_by_hand(toy, method: str, params: dict[str, int], close: float) -> None:
    exact = shapley_by_hand(toy.weights[0].numpy())
    heat = probe.explain(toy, method=method, size=(2, 4), tokens=(0, 1), **params)
    assert np.abs(values_of(heat) - exact).max() < close * exact.max()
    assert heat.provenance["diagnostics"]["attributed"] == pytest.approx(math.log(9), rel=1e-3)  # they share it out


@pytest.mark.parametrize("method", ["captum:shapley_value_sampling", "captum:kernel_shap", "captum:feature_ablation"])
def test_of_a_sum_every_one_finds_the_terms(toy, method: str) -> None:
    few = {"captum:shapley_value_sampling": {"orders": 1}, "captum:kernel_shap": {"samples": 60}}.get(method, {})
    heat = probe.explain(toy, method=method, size=(2, 4), tokens=(0, 1), score="prob", **few)
    assert np.abs(values_of(heat) - 0.8 * toy.weights[0].numpy()).max() < 1e-3


def test_gradient_shap_has_the_mean_of_integrated_gradients(toy) -> None:
    heat = probe.explain(toy, method="captum:gradient_shap", size=(2, 4), samples=3000)
    expected = toy.weights[0].numpy() * math.log(9)  # integrated gradients of the toy, in closed form
    assert np.abs(values_of(heat) - expected).max() < 0.06 * expected.max()


def test_the_forward_function_is_for_all_of_captum(replay) -> None:
    f = forward(replay, tokens=(0, 2))
    masks = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(f(masks), replay.log_probs(masks)[:, :2].sum(1), atol=1e-5)
    weight = torch.tensor([1.0, -2.0, 0.5])
    leaf = masks.clone().requires_grad_()
    (f(leaf) * weight).sum().backward()
    step = torch.zeros_like(masks)
    step[1, 2, 1] = 1e-2
    with exact(replay) as in_64:
        g = forward(in_64, tokens=(0, 2))
        moved = float((g(masks + step) - g(masks - step))[1]) / 2e-2
    assert float(leaf.grad[1, 2, 1]) == pytest.approx(-2 * moved, rel=2e-2, abs=1e-3)
    saliency = attr.Saliency(f).attribute(torch.ones(1, 4, 4).requires_grad_())
    assert saliency.shape == (1, 4, 4)
    probabilities = forward(replay, tokens=(0, 2), score="prob")(masks)
    assert torch.allclose(probabilities, replay.log_probs(masks)[:, :2].exp().mean(1), atol=1e-5)


def test_a_contrast_and_a_word(replay) -> None:
    word = replay.words[-1].text.strip(" .") or replay.words[-2].text.strip()
    one = forward(replay, tokens=word)(torch.ones(1, 2, 2))
    other = forward(replay, tokens=word, against="zebra")(torch.ones(1, 2, 2))
    assert float(other) != float(one)
    heat = probe.explain(replay, method="captum:integrated_gradients", tokens=word, against="zebra", steps=4, size=4)
    assert heat.values is not None


def global_random_state() -> tuple[list[int], list[int]]:
    return np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


@pytest.mark.parametrize("method", METHODS)
def test_costs_are_as_declared(toy, method: str) -> None:
    told: list[tuple[int, int]] = []
    options = {"size": (2, 4), **QUICK.get(method, {})}
    options |= {"patch": 1} if method == "captum:occlusion" else {}
    before = global_random_state()
    heat = probe.explain(
        toy, method=method, tokens=(0, 1), strengthen=False, progress=lambda *at: told.append(at), **options
    )
    assert global_random_state() == before
    passes = heat.provenance["passes"]
    assert told[0] == (0, passes["forward"])
    assert told[-1] == (passes["forward"], passes["forward"])
    assert passes["backward"] == (passes["forward"] if "gradients" in needs_of(method) else 0)
    again = probe.explain(toy, method=method, tokens=(0, 1), strengthen=False, progress=False, **options)
    assert np.array_equal(heat.values, again.values)  # what is random is seeded
    assert heat.params["size"] == [2, 4]


def test_it_is_planned_explained_scored_and_stored_as_ours(replay, tmp_path) -> None:
    plan = probe.plan(replay, method="captum:integrated_gradients", steps=20)
    assert (plan.forward, plan.backward) == (20, 20)
    heat = probe.explain(replay, method="captum:integrated_gradients", plan=plan, steps=20)
    assert probe.evaluate(heat, replay, steps=8).gain > 0.5
    assert np.array_equal(probe.Heatmap.read(heat.write(tmp_path / "map.h5")).values, heat.values)


def test_bad_input_names_the_way_out(toy) -> None:
    for method, wrong, message in (
        ("integrated_gradients", {"rule": "simpson"}, "rule is one of gausslegendre"),
        ("integrated_gradients", {"steps": 0}, "steps is a whole number"),
        ("gradient_shap", {"samples": 0}, "samples is a whole number"),
        ("input_x_gradient", {"sign": "both"}, "sign is 'positive' or 'absolute'"),
        ("occlusion", {"size": 4, "patch": 5}, "patch is a whole number from 1 to 4"),
        ("occlusion", {"stride": 4}, "stride is between 1 and patch=3"),
        ("occlusion", {"score": "logit"}, "score is 'log', 'prob' or 'geometric'"),
        ("feature_ablation", {"batch": 0}, "batch is a whole number"),
        ("shapley_value_sampling", {"orders": 0}, "orders is a whole number"),
        ("kernel_shap", {"size": 4, "samples": 17}, "samples is at least 18 for 16 cells"),
        ("kernel_shap", {"size": 1}, "size is at least 2 cells"),
        ("kernel_shap", {"n_samples": 5}, "takes no parameter 'n_samples'.*'samples'"),
    ):
        with pytest.raises(ExplainError, match=message):
            probe.explain(toy, method=f"captum:{method}", tokens=(0, 1), **wrong)
    with pytest.raises(ExplainError, match="image is one of the prompt's 1 image"):
        forward(toy, tokens=(0, 1), image=1)
    with pytest.raises(SelectionError, match="zebra"):
        forward(toy, tokens="zebra")
    assert isinstance(forward(toy, tokens=(0, 1)), Forward)


def test_scores_that_are_no_numbers_are_refused() -> None:
    class Broken(ToyReplay):
        def log_probs(self, mask=None, **options):
            return super().log_probs(mask, **options) * (float("nan") if mask is not None else 1.0)

    for method in ("captum:feature_ablation", "captum:integrated_gradients"):
        with pytest.raises(ExplainError, match="captum met scores or gradients that are not finite"):
            probe.explain(Broken(box_weights(4, slice(0, 2), slice(0, 2))), method=method, size=4, strengthen=False)


def test_no_effect_is_a_reason() -> None:
    flat = ToyReplay(torch.zeros(4, 4))
    heat = probe.explain(flat, method="captum:integrated_gradients", tokens=(0, 1))
    assert heat.values is None
    assert "gradient is zero in every cell of the whole image" in str(heat.reason)
