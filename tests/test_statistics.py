"""Bootstrap intervals against scipy's, against theory, and their coverage."""

from __future__ import annotations

import numpy as np
import pytest

from lvlm_probe.metrics.statistics import Interval, bootstrap_ci, paired_difference

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
