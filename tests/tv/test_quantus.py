"""Deletion, insertion and localisation against Quantus, and its recipe; it lives in the second environment."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision", reason="needs the second environment, .venv-tv, which has torchvision")
pytest.importorskip("quantus", reason="needs quantus, which lives in .venv-tv")

import quantus
from scipy.stats import pearsonr
from toy_replay import ToyReplay

import lvlm_probe as probe
from lvlm_probe.metrics import localization
from lvlm_probe.selection import select_tokens

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "integrations.md"
TAKEN_AWAY = {"perturb_baseline": 0.0, "normalise": False, "disable_warnings": True}
BROUGHT_BACK = {**TAKEN_AWAY, "perturb_baseline": 1.0}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe of the guide, run on the demo model; its names, with the scores that it printed."""
    (code,) = re.findall(r"```python\n(import numpy as np\nimport quantus\n.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    model, processor = probe.demo.load()
    scene = probe.demo.scenes(1)[0]
    replay = probe.ask(model, processor, scene.image, scene.question, out=tmp_path_factory.mktemp("traces")).replay
    printed: list = []
    names = {"probe": probe, "replay": replay, "print": printed.append}
    exec(code, names)
    return {**names, "printed": printed}


def asked(masked, values, whole=1.0, **more):
    return {
        "model": masked, "y_batch": np.array([0]), "softmax": False, "channel_first": True,
        "x_batch": np.full((1, 1, *values.shape), whole, np.float32), "a_batch": values[None, None], **more,
    }  # fmt: skip


def correlation_by_hand(replay, heat, runs=20, size=9):
    """Pearson's r of what subsets of cells are given by the map, and of the probability that is lost without them."""
    np.random.seed(0)  # noqa: NPY002  (the recipe's, from which Quantus draws)
    whole = np.ones((1, *heat.values.shape), np.float32)
    masks, given = np.repeat(whole, runs + 1, axis=0), []
    for mask in masks[1:]:
        taken = np.random.choice(heat.values.size, size, replace=False)  # noqa: NPY002
        mask.reshape(-1)[taken] = 0
        given.append(heat.values.reshape(-1)[taken].sum())
    tokens = list(heat.selection.indices)
    log_probs = replay.over(heat.provenance["baseline"]).log_probs(torch.from_numpy(masks), steps=tokens)
    kept = log_probs[:, tokens].double().exp().mean(1)
    return pearsonr(given, kept[0] - kept[1:]).statistic


def test_deletion_and_insertion_on_the_embedded_model(recipe):
    heat, replay = recipe["heat"], recipe["replay"]
    score = probe.evaluate(heat, replay, steps=12)
    assert score.tie_share == 0 and score.original - score.baseline > 0.5
    (by_threes,), (correlation,), (mass,) = recipe["printed"]
    assert by_threes == pytest.approx(score.deletion_raw[1:], abs=1e-6)
    assert correlation == pytest.approx(correlation_by_hand(replay, heat), abs=1e-5)
    region = np.zeros(heat.values.shape, bool)
    region[2:4, 2:4] = True
    assert mass == pytest.approx(localization.energy_in_region(heat.values, region), rel=1e-6)
    back = quantus.PixelFlipping(features_in_step=3, **BROUGHT_BACK)
    (curve,) = back(**asked(recipe["Masked"](replay, heat), heat.values, whole=0.0))
    assert curve == pytest.approx(score.insertion_raw[1:], abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_curves_and_areas_of_random_maps(recipe, seed):
    random = torch.Generator().manual_seed(seed)
    weights = torch.rand(5, 5, generator=random, dtype=torch.float64)
    toy = ToyReplay(weights / weights.sum(), original=(0.8,), base=(0.1,))
    values = torch.rand(5, 5, generator=random).numpy()
    heat = probe.Heatmap(values, (64, 64), selection=select_tokens(toy), provenance={"baseline": toy.baseline})
    score = probe.evaluate(heat, toy, steps=25, center=False)
    masked = recipe["Masked"](toy, heat)
    lost, given = (
        np.array(quantus.PixelFlipping(features_in_step=1, **how)(**asked(masked, values, whole))[0])
        for how, whole in ((TAKEN_AWAY, 1.0), (BROUGHT_BACK, 0.0))
    )
    assert lost == pytest.approx(score.deletion_raw[1:], abs=1e-6)
    assert given == pytest.approx(score.insertion_raw[1:], abs=1e-6)
    for curve, start, area in ((lost, 0.8, score.deletion), (given, 0.1, score.insertion)):
        whole = (np.array([start, *curve]) - 0.1) / (0.8 - 0.1)
        assert area == pytest.approx(np.trapezoid(whole, dx=1 / 25), abs=1e-5)
    (differences,) = quantus.RegionPerturbation(patch_size=1, regions_evaluation=25, **TAKEN_AWAY)(
        **asked(masked, values)
    )
    assert 0.8 - differences == pytest.approx(np.array(score.deletion_raw[1:]), abs=1e-6)
    # Probability is linear in the cells of this answer, so a map of its weights tells every change.
    told = asked(masked, weights.float().numpy())
    assert quantus.FaithfulnessCorrelation(nr_runs=20, subset_size=5, **TAKEN_AWAY)(**told) == pytest.approx([1.0])


@pytest.mark.parametrize("seed", range(3))
def test_localisation_of_random_maps(seed):
    random = np.random.default_rng(seed)
    values, region = random.random((9, 7)).astype(np.float32), random.random((9, 7)) < 0.3
    rank = theirs("RelevanceRankAccuracy", values, region)
    assert localization.iou(values, region) == pytest.approx(rank / (2 - rank), rel=1e-6) and 0 < rank < 1
    for where in (region, ~region):
        assert localization.energy_in_region(values, where) == pytest.approx(
            theirs("RelevanceMassAccuracy", values, where), rel=1e-5
        )
        assert localization.pointing_game(values, where) == theirs("PointingGame", values, where)


def test_tied_cells_are_where_they_differ():
    values, region = np.zeros((2, 4), np.float32), np.zeros((2, 4), bool)
    values[0] = 1.0
    region[0, :2] = True
    assert theirs("PointingGame", values, region) == 1 and localization.pointing_game(values, region) == 0.5
    assert localization.iou(values, region) == pytest.approx(1 / 3)  # one of the two is expected: 1 / (2 + 2 − 1)


def theirs(metric, values, region):
    judge = getattr(quantus, metric)(normalise=False, disable_warnings=True)
    (found,) = judge(**asked(torch.nn.Identity().eval(), values, s_batch=region[None, None]))
    return float(found)
