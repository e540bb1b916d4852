"""Intervals against scipy's, theory and their coverage; permutation and mixed-effects tests against closed forms."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest

from lvlm_probe.errors import ProbeError
from lvlm_probe.metrics.statistics import (
    Interval,
    amcr,
    bootstrap_ci,
    csr,
    mixed_effects,
    paired_difference,
    permutation_test,
)

SKEWED = np.random.default_rng(0).exponential(size=40)


@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_agrees_with_scipy(method: str, level: float) -> None:
    from scipy import stats

    reference = stats.bootstrap(
        (SKEWED,), np.mean, confidence_level=level, n_resamples=20_000, method=method, rng=np.random.default_rng(1)
    ).confidence_interval
    ours = bootstrap_ci(SKEWED, level=level, resamples=20_000, method=method)
    spread = reference.high - reference.low
    assert ours.estimate == pytest.approx(SKEWED.mean())
    assert abs(ours.low - reference.low) < 0.03 * spread
    assert abs(ours.high - reference.high) < 0.03 * spread


def test_bca_differs_from_percentile_on_skewed_data_and_follows_the_tail() -> None:
    percentile = bootstrap_ci(SKEWED, resamples=20_000)
    corrected = bootstrap_ci(SKEWED, resamples=20_000, method="bca")
    assert corrected.high > percentile.high
    assert corrected.low > percentile.low


def test_any_statistic() -> None:
    interval = bootstrap_ci(SKEWED, statistic=lambda rows: np.median(rows, axis=-1))
    assert interval.estimate == pytest.approx(np.median(SKEWED))
    assert interval.low < interval.estimate < interval.high


def test_width_is_that_of_the_normal_approximation_for_many_samples() -> None:
    values = np.random.default_rng(3).normal(size=2000)
    interval = bootstrap_ci(values)
    expected = 2 * 1.96 * values.std() / np.sqrt(len(values))
    assert interval.high - interval.low == pytest.approx(expected, rel=0.05)


def test_ninety_percent_intervals_hold_the_truth_about_ninety_percent_of_the_time() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        interval = bootstrap_ci(generator.normal(size=60), level=0.9, resamples=500, seed=trial)
        hits += interval.low <= 0 <= interval.high
    assert 0.84 < hits / 300 < 0.95


def test_pairing_takes_out_what_samples_share() -> None:
    generator = np.random.default_rng(0)
    hard = generator.normal(size=50) * 10
    first, second = hard + 0.5 + 0.1 * generator.normal(size=50), hard + 0.1 * generator.normal(size=50)
    paired = paired_difference(first, second)
    assert paired.low > 0.4
    assert paired.high < 0.6
    assert bootstrap_ci(first).high - bootstrap_ci(first).low > 3
    assert paired_difference(first, first) == Interval(0.0, 0.0, 0.0, 0.95, 50)


def test_seed_and_degenerate_samples() -> None:
    assert bootstrap_ci(SKEWED, seed=1) == bootstrap_ci(SKEWED, seed=1)
    assert bootstrap_ci(SKEWED, seed=1) != bootstrap_ci(SKEWED, seed=2)
    assert bootstrap_ci([0.25]) == Interval(0.25, 0.25, 0.25, 0.95, 1)
    assert str(bootstrap_ci([0.25, 0.25])) == "0.250 [0.250, 0.250]"


def test_refusals() -> None:
    with pytest.raises(ValueError, match="0 values"):
        bootstrap_ci([])
    with pytest.raises(ValueError, match="1 of them NaN"):
        bootstrap_ci([1.0, float("nan")])
    with pytest.raises(ValueError, match="'percentile' or 'bca'"):
        bootstrap_ci([1.0, 2.0], method="basic")
    with pytest.raises(ValueError, match="equal numbers"):
        paired_difference([1.0], [1.0, 2.0])


# ---------------------------------------------------------------- permutation test


@pytest.mark.quick
@pytest.mark.parametrize("level", [0, 1, -0.5, 95, float("nan")])
def test_a_level_is_a_share(level) -> None:
    for test in (bootstrap_ci, lambda values, **given: paired_difference(values, values, **given)):
        with pytest.raises(ValueError, match="level is a share"):
            test([1.0, 2.0, 3.0], level=level)


@pytest.mark.parametrize("resamples", [0, -1])
def test_nothing_is_told_without_a_resample(resamples) -> None:
    with pytest.raises(ValueError, match="resamples is a number of at least 1"):
        bootstrap_ci([1.0, 2.0], resamples=resamples)
    with pytest.raises(ValueError, match="resamples is a number of at least 1"):
        permutation_test([1.0, 2.0], [2.0, 1.0], resamples=resamples)


def test_differences_of_infinite_numbers_are_none() -> None:
    with pytest.raises(ValueError, match="finite"):
        paired_difference([1.0, math.inf], [1.0, math.inf])


def test_a_permutation_test_of_more_pairs_than_a_float_can_count_the_flips_of() -> None:
    first = np.random.default_rng(0).normal(size=1100)
    result = permutation_test(first, first + 1, resamples=99)
    assert (result.n, result.exact, result.difference) == (1100, False, pytest.approx(-1))
    assert result.p_value == pytest.approx(2 / 100)


@pytest.mark.parametrize("area", [1.5, -0.1, math.nan, math.inf])
def test_areas_are_shares(area) -> None:
    for measure in (amcr, csr):
        with pytest.raises(ValueError, match="areas are shares"):
            measure([0.2, None, area])
    with pytest.raises(ValueError, match="budget is a share"):
        csr([0.2], budget=area)
    assert amcr(np.array([0.2, 0.4])) == pytest.approx(0.3)


def test_permutation_test_counts_all_flips_of_few_pairs() -> None:
    first, second = np.array([0.5, 0.9, 0.4, 0.8, 0.7]), np.array([0.4, 0.7, 0.5, 0.3, 0.6])
    differences = first - second
    flipped = [np.mean(differences * signs) for signs in itertools.product([1, -1], repeat=5)]
    as_extreme = sum(abs(value) >= abs(differences.mean()) - 1e-12 for value in flipped)
    result = permutation_test(first, second)
    assert result.exact
    assert result.n == 5
    assert result.difference == pytest.approx(differences.mean())
    assert result.p_value == pytest.approx(as_extreme / 32)
    assert permutation_test(second, first).p_value == pytest.approx(result.p_value)


def test_permutation_test_of_many_pairs_is_close_to_the_t_test() -> None:
    from scipy.stats import ttest_rel

    generator = np.random.default_rng(0)
    first = generator.normal(size=80)
    second = first + 0.2 + generator.normal(size=80)
    result = permutation_test(first, second, resamples=19_999)
    assert not result.exact
    assert result.p_value == pytest.approx(ttest_rel(first, second).pvalue, abs=0.01)
    assert permutation_test(first, second, seed=1) == permutation_test(first, second, seed=1)
    assert permutation_test(first, first + 1).p_value == pytest.approx(2 / 10_000)


def test_permutation_test_keeps_its_level() -> None:
    generator = np.random.default_rng(1)
    small = [permutation_test(*generator.normal(size=(2, 8)), resamples=256).p_value for _ in range(300)]
    assert np.mean(np.array(small) <= 0.1) == pytest.approx(0.1, abs=0.04)


def test_permutation_test_of_nothing_to_tell() -> None:
    assert permutation_test([0.5, 0.2], [0.5, 0.2]).p_value == 1.0
    assert permutation_test([0.5], [0.1]).p_value == 1.0
    with pytest.raises(ValueError, match="equal numbers"):
        permutation_test([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="pairs of numbers"):
        permutation_test([1.0, float("nan")], [1.0, 2.0])
    with pytest.raises(ValueError, match="pairs of numbers"):
        permutation_test([], [])


# ---------------------------------------------------------------- mixed effects


def scored(scores: np.ndarray) -> list[dict[str, object]]:
    """Records of a table ``(sample, model)``."""
    return [
        {"sample": f"q{row}", "scale": f"{col}b", "score": float(value), "note": None}
        for (row, col), value in np.ndenumerate(scores)
    ]


def table(samples: int, models: int, *, effect: float, shared: float = 1.0, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    noise = 0.5 * generator.normal(size=(samples, models))
    return shared * generator.normal(size=(samples, 1)) + effect * np.arange(models) + noise


@pytest.mark.parametrize(("samples", "models"), [(30, 2), (20, 3), (12, 4)])
def test_mixed_effects_is_the_closed_form_of_balanced_data(samples: int, models: int) -> None:
    """Every sample under every model, so the factor lives within samples, where sums of squares are all there is:

    2 (log L_full − log L_null) = n (k − 1) log(SS_null / SS_full), sums of squares around the samples' means.
    """
    from scipy.stats import chi2, ttest_rel

    scores = table(samples, models, effect=0.15)
    within = scores - scores.mean(axis=1, keepdims=True)
    null, full = (within**2).sum(), ((within - within.mean(axis=0)) ** 2).sum()
    expected = samples * (models - 1) * np.log(null / full)
    result = mixed_effects(scored(scores), "score ~ C(scale)")
    assert result.converged
    assert result.degrees == models - 1
    assert result.statistic == pytest.approx(expected, abs=1e-4)
    assert result.p_value == pytest.approx(chi2.sf(expected, models - 1), rel=1e-3)
    assert result.residual_variance == pytest.approx(full / (samples * (models - 1)), rel=1e-3)
    assert (result.groups, result.n) == (samples, samples * models)
    last = result.effects[f"C(scale)[T.{models - 1}b]"]
    assert last.estimate == pytest.approx(scores[:, -1].mean() - scores[:, 0].mean(), abs=1e-6)
    assert last.low < last.estimate < last.high
    assert "random intercept per sample" in str(result)
    if models == 2:
        t = ttest_rel(scores[:, 1], scores[:, 0]).statistic
        assert result.statistic == pytest.approx(samples * np.log1p(t**2 / (samples - 1)), abs=1e-4)


def test_mixed_effects_sees_what_an_unpaired_test_does_not() -> None:
    from scipy.stats import f_oneway

    scores = table(40, 3, effect=0.2, shared=3.0)
    assert mixed_effects(scored(scores), "score ~ C(scale)").p_value < 0.01
    assert f_oneway(*scores.T).pvalue > 0.3
    nothing = [mixed_effects(scored(table(20, 2, effect=0.0, seed=seed)), "score ~ C(scale)") for seed in range(8)]
    assert sum(result.p_value < 0.05 for result in nothing) <= 2


def log_likelihood(scores: np.ndarray, ratio: float) -> float:
    """Profile log-likelihood at σ_u²/σ² = ``ratio``, model means free, from the multivariate normal itself."""
    samples, models = scores.shape
    covariance = np.eye(models) + ratio
    residuals = scores - scores.mean(axis=0)
    spread = np.einsum("ij,jk,ik->", residuals, np.linalg.inv(covariance), residuals) / scores.size
    scaled = np.linalg.slogdet(spread * covariance)[1]
    return -0.5 * (scores.size * (np.log(2 * np.pi) + 1) + samples * scaled)


def test_mixed_effects_without_variance_between_samples_is_least_squares() -> None:
    """There MixedLM's optimiser often fails; the solution on the border is known."""
    from statsmodels.api import OLS

    ratios = np.linspace(0, 1, 201)
    on_border = 0
    for seed in range(8):
        scores = table(15, 3, effect=0.1, shared=0.0, seed=seed)
        result = mixed_effects(scored(scores), "score ~ C(scale)")
        assert result.converged
        best = int(np.argmax([log_likelihood(scores, ratio) for ratio in ratios]))
        assert (result.group_variance == 0.0) == (best == 0)
        if best == 0:
            on_border += 1
            full, null = (OLS(scores.ravel(), x).fit().llf for x in (np.kron(np.ones((15, 1)), np.eye(3)), np.ones(45)))
            assert full == pytest.approx(log_likelihood(scores, 0.0))
            assert result.statistic == pytest.approx(2 * (full - null), abs=1e-6)
            assert "least squares" in result.notes[0]
    assert 0 < on_border < 8


def test_mixed_effects_with_covariates_unbalanced() -> None:
    records = [record for number, record in enumerate(scored(table(40, 3, effect=0.3))) if number % 7]
    for number, record in enumerate(records):
        record["size"] = number % 3
    result = mixed_effects(records, "score ~ C(scale) + size", null="score ~ size", level=0.9)
    assert result.converged and result.degrees == 2
    assert result.p_value < 0.001
    assert result.effects["size"].level == 0.9
    assert "'score ~ size'" in result.definition
    trend = mixed_effects([{**item, "scale": int(str(item["scale"])[0])} for item in records], "score ~ scale")
    assert trend.degrees == 1


def test_a_fit_that_does_not_converge_has_no_p_value(monkeypatch) -> None:
    from statsmodels.regression import mixed_linear_model

    fit = mixed_linear_model.MixedLM.fit

    def unfinished(self, **options):
        result = fit(self, **options)
        result._results.converged = False
        return result

    records = scored(table(20, 3, effect=0.5))
    monkeypatch.setattr(mixed_linear_model.MixedLM, "fit", unfinished)
    result = mixed_effects(records, "score ~ C(scale)")
    assert not result.converged
    assert np.isnan(result.p_value) and np.isnan(result.statistic)
    assert "no p-value" in str(result)

    def singular(self, **options):
        raise np.linalg.LinAlgError("Singular matrix")

    monkeypatch.setattr(mixed_linear_model.MixedLM, "fit", singular)
    result = mixed_effects(records, "score ~ C(scale)")
    assert not result.converged and np.isnan(result.p_value)
    assert "Singular matrix" in result.notes[0]


def test_mixed_effects_refusals(monkeypatch) -> None:
    records = scored(table(5, 2, effect=0.1))
    for chosen, options, message in [
        ([], {}, "records need the fields"),
        (records, {"group": "question"}, "'question'"),
        (records[:2], {}, "at least two"),
        ([*records, {"sample": "q9", "scale": "1b", "score": None}], {}, "without a value in score"),
        (records, {"formula": "score ~ C(size)"}, "cannot be read"),
        (records, {"null": "score ~ C(scale)"}, "fewer fixed effects"),
        ([{**record, "score": 0.5} for record in records], {}, "all 10 scores are equal"),
    ]:
        with pytest.raises(ValueError, match=message):
            mixed_effects(chosen, **{"formula": "score ~ C(scale)", **options})
    monkeypatch.setitem(sys.modules, "statsmodels.regression.mixed_linear_model", None)
    with pytest.raises(ProbeError, match=r"needs statsmodels.*lvlm-probe\[stats\]"):
        mixed_effects(records, "score ~ C(scale)")
