"""Statistics over samples: a mean without an interval is not a figure, a difference without a test not a finding.

* ``bootstrap_ci``, ``paired_difference``: intervals; need numpy only.
* ``permutation_test``: paired, by flipping signs; scipy's.
* ``amcr``, ``csr``: of regions that flip an answer, how large they are.
* ``mixed_effects``: does scale, or architecture, change a score that was taken on the same samples? statsmodels'.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from lvlm_probe.extras import require
from lvlm_probe.kinds import naming_arguments

_NUMBERS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, over ``n`` samples; ``missing`` further samples were left out."""

    estimate: float
    low: float
    high: float
    level: float
    n: int
    missing: int = 0

    def __str__(self) -> str:
        if self.n == 1:  # one sample says nothing about others
            return f"{self.estimate:.3f} (n = 1)"
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class MeanAndError:
    """A mean over ``n`` samples with its standard error s/√n; ``missing`` further samples had no value."""

    mean: float
    standard_error: float
    n: int
    missing: int = 0

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f}" if self.n > 1 else f"{self.mean:.3f} (n = 1)"


@dataclass(frozen=True)
class PermutationTest:
    """Result of a paired permutation test.

    Attributes:
        difference: Mean of first − second.
        p_value: Two-sided.
        n: Number of pairs.
        exact: Whether all 2ⁿ flips were counted instead of a random sample of them.
    """

    difference: float
    p_value: float
    n: int
    exact: bool


@dataclass(frozen=True)
class MixedEffects:
    """Result of a mixed-effects test; ``definition`` says in words what was tested.

    Attributes:
        p_value: Of the likelihood-ratio test; NaN unless both fits converged.
        statistic: 2 (log L full − log L null), χ² with ``degrees`` degrees of freedom under the null; NaN as above.
        degrees: Number of fixed effects tested.
        effects: Fixed effects of the full model with Wald intervals; ``n`` is the number of records.
        group_variance, residual_variance: Of the random intercept and of the rest, in the full model.
        groups, n: How many groups (samples, questions) and records.
        converged: Whether both fits converged.
        notes: What the optimiser warned of, a group variance of 0 among it.
        definition: The test in words.
    """

    p_value: float
    statistic: float
    degrees: int
    effects: Mapping[str, Interval]
    group_variance: float
    residual_variance: float
    groups: int
    n: int
    converged: bool
    notes: tuple[str, ...] = ()
    definition: str = field(default="")

    def __str__(self) -> str:
        if not self.converged:
            return f"no p-value, as the fit did not converge ({'; '.join(self.notes) or 'no reason given'})"
        return f"p = {self.p_value:.3g}, χ²({self.degrees}) = {self.statistic:.3f}: {self.definition}"


@naming_arguments
def mean_and_error(values: Sequence[float] | np.ndarray) -> MeanAndError:
    """Mean over samples and its standard error s/√n (s with n − 1; NaN for one sample), values that are not finite left
    out and counted.

    Raises:
        ValueError: No value at all.
    """
    data = np.asarray(values, dtype=np.float64).reshape(-1)
    there = data[np.isfinite(data)]
    if there.size == 0:
        raise ValueError(f"a mean needs values that are numbers; got {data.size} values, all NaN or infinite")
    error = float(there.std(ddof=1) / math.sqrt(there.size)) if there.size > 1 else math.nan
    return MeanAndError(float(there.mean()), error, int(there.size), int(data.size - there.size))


@naming_arguments
def auroc(positives: Sequence[float] | np.ndarray, negatives: Sequence[float] | np.ndarray) -> float:
    """Area under the ROC curve: the probability that a positive is above a negative, ties counted half.

    Args:
        positives: scores of what should be found.
        negatives: scores of all else.

    Returns:
        in [0, 1]; NaN where either is empty or holds a NaN. Mann and Whitney's U over the number of pairs.
    """
    above, below = (np.asarray(values, dtype=np.float64) for values in (positives, negatives))
    if not (above.size and below.size) or np.isnan(above).any() or np.isnan(below).any():
        return math.nan
    order = np.sort(below)
    beaten, not_above = (np.searchsorted(order, above, side=side) for side in ("left", "right"))
    return float((beaten + not_above).mean() / (2 * below.size))


@naming_arguments
def amcr(areas: Sequence[float | None]) -> float:
    """Average minimal correction region: mean area that has to be taken away before a wrong answer is put right.

    Chen et al., 2025 (EAGLE, arXiv 2509.22496). The smaller, the better a map of the wrong word names its cause.

    Args:
        areas: of each sample the smallest share of the image whose removal corrects it, in [0, 1], ``Edit.correction``;
            ``None`` where none does, which counts as the whole image.

    Returns:
        in [0, 1]; NaN without samples.

    Raises:
        ValueError: an area is no share of an image.
    """
    taken = _shares(areas)
    return float(np.mean([1.0 if area is None else area for area in taken])) if taken else math.nan


@naming_arguments
def csr(areas: Sequence[float | None], *, budget: float = 0.1) -> float:
    """Correction success rate: share of wrong answers that are put right by at most ``budget`` of the image (CSR@10 %).

    Chen et al., 2025. Samples that no region corrects count as failures; the authors' script leaves them out.

    Args:
        areas: as for ``amcr``.
        budget: share of the image, in [0, 1].

    Returns:
        in [0, 1]; NaN without samples.

    Raises:
        ValueError: an area is no share of an image.
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"budget is a share of the image, from 0 to 1; got {budget!r}")
    taken = _shares(areas)
    return float(np.mean([area is not None and area <= budget for area in taken])) if taken else math.nan


def _shares(areas: Sequence[float | None]) -> list[float | None]:
    for area in areas:
        if area is not None and not 0 <= area <= 1:
            raise ValueError(f"areas are shares of the image, from 0 to 1, or None; got {area!r}")
    return list(areas)


@naming_arguments
def bootstrap_ci(
    values: Sequence[float] | np.ndarray,
    *,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    level: float = 0.95,
    resamples: int = 9999,
    method: Literal["percentile", "bca"] = "percentile",
    seed: int = 0,
) -> Interval:
    """Bootstrap confidence interval of a statistic of independent samples (Efron & Tibshirani, 1993).

    Args:
        values: ``(sample,)``. Not finite is refused: leave samples without a value out before, and say how many.
        statistic: Maps ``(…, sample)`` to ``(…,)``; the mean by default.
        level: Coverage, between 0 and 1.
        resamples: Number of bootstrap samples.
        method: ``"percentile"``, or ``"bca"``, bias-corrected and accelerated, for skewed statistics of few samples.
        seed: Of the resampling.

    Raises:
        ValueError: No values, NaN among them, an unknown method, or a number that is out of its range.
    """
    _check(level=level, resamples=resamples)
    data = np.asarray(values, dtype=np.float64).reshape(-1)
    if data.size == 0 or not np.isfinite(data).all():
        raise ValueError(
            f"a bootstrap needs values that are numbers; got {data.size} values, {np.isnan(data).sum()} of them NaN, "
            f"{np.isinf(data).sum()} infinite"
        )
    if method not in ("percentile", "bca"):
        raise ValueError(f"method is 'percentile' or 'bca'; got {method!r}")
    function = statistic if statistic is not None else lambda rows: rows.mean(axis=-1)
    estimate = float(function(data[None])[0])
    if data.size == 1 or data.min() == data.max():
        return Interval(estimate, estimate, estimate, level, data.size)
    generator = np.random.default_rng(seed)
    at_once = max(1, _NUMBERS_AT_ONCE // data.size)
    parts = []
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        parts.append(function(data[generator.integers(0, data.size, (rows, data.size))]))
    drawn = np.concatenate(parts)
    tail = (1 - level) / 2
    edges = (tail, 1 - tail) if method == "percentile" else _bca_edges(data, drawn, estimate, function, tail)
    low, high = np.quantile(drawn, edges)
    return Interval(estimate, float(low), float(high), level, data.size)


def _check(*, level: float = 0.95, resamples: int = 1) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is a share between 0 and 1, both exclusive; got {level!r}")
    if resamples < 1:
        raise ValueError(f"resamples is a number of at least 1; got {resamples!r}")


@naming_arguments
def paired_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Mean of ``first − second`` on the same samples, with its bootstrap interval.

    Pairing takes out what makes samples differ from one another: two methods are told apart with far fewer samples.

    Raises:
        ValueError: The two differ in length, or as for ``bootstrap_ci``.
    """
    left, right = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"paired samples come in equal numbers; got {left.shape} and {right.shape}")
    if np.isinf(left).any() or np.isinf(right).any():
        raise ValueError("differences are of finite numbers; an infinite one is among them")
    return bootstrap_ci(left - right, level=level, resamples=resamples, seed=seed)


@naming_arguments
def permutation_test(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    resamples: int = 9999,
    seed: int = 0,
) -> PermutationTest:
    """Paired permutation test: could ``first − second`` have this mean if first and second were exchangeable?

    The signs of the differences are flipped, all 2ⁿ ways where that is at most ``resamples``, else at random (Fisher,
    1935; ``scipy.stats.permutation_test``, ``permutation_type="samples"``). No distribution is assumed.

    Args:
        first, second: ``(sample,)``, two methods on the same samples. NaN is refused.
        resamples: Random flips; the smallest p-value that can come out is 2 / (resamples + 1).
        seed: Of the flips.

    Raises:
        ValueError: The two differ in length, are empty or hold NaN, or there are no flips.
        ProbeError: scipy is missing.
    """
    _check(resamples=resamples)
    left, right = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if left.shape != right.shape or left.ndim != 1:
        raise ValueError(f"paired samples come in equal numbers; got {left.shape} and {right.shape}")
    if left.size == 0 or not np.isfinite(left).all() or not np.isfinite(right).all():
        raise ValueError(f"a permutation test needs pairs of numbers; got {left.size} pairs, NaN among them or none")
    stats = require("scipy.stats", extra="stats", purpose="a permutation test")
    exact = left.size <= math.log2(resamples)
    difference = float((left - right).mean())
    if left.size == 1:  # scipy refuses it; two flips, both as extreme
        return PermutationTest(difference, 1.0, 1, True)
    # The name of the argument changed with scipy 1.15.
    named = "rng" if "rng" in inspect.signature(stats.permutation_test).parameters else "random_state"
    result = stats.permutation_test(
        (left, right),
        lambda one, two, axis: (one - two).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        **{named: np.random.default_rng(seed)},
    )
    return PermutationTest(difference, float(result.pvalue), int(left.size), exact)


@naming_arguments
def mixed_effects(
    records: Sequence[Mapping[str, Any]],
    formula: str,
    *,
    group: str = "sample",
    null: str | None = None,
    level: float = 0.95,
) -> MixedEffects:
    """Does a factor (the scale of the language model, the vision architecture) change a score?

    Every sample is scored under every model, so its scores are not independent. The model is linear with a random
    intercept per sample::

        score_ij = x_ij · β + u_i + ε_ij        u_i ~ N(0, σ_u²),  ε_ij ~ N(0, σ²),  i the sample, j the model

    The full formula and the null formula (without the factor) are both fitted by maximum likelihood (not REML, whose
    likelihoods cannot be compared between fixed effects), and 2 (log L_full − log L_null) is referred to χ² with as
    many degrees of freedom as fixed effects were taken out. Fits: ``statsmodels.MixedLM``. The χ² is that
    of many samples: with two models, 0.05 on 10 samples would be 0.070 by the paired t-test, on 50 samples 0.054. The
    paper's p = 0.121 and p = 0.0008 name no test; this is one that fits the question.

    Args:
        records: One per score, e.g. ``{"sample": "q17", "scale": "7b", "score": 0.78}``.
        formula: Of the full model, e.g. ``"score ~ C(scale)"``.
        group: Field of the sample (question, image) that scores share.
        null: Of the null model; by default the score alone, ``"score ~ 1"``.
        level: Coverage of the intervals of the effects.

    Returns:
        The test. Where a fit does not converge, ``converged`` is False and there is no p-value.

    Raises:
        ValueError: No records, a field that is missing, NaN, fewer than two groups, a formula that cannot be read, or a
            null model that is not smaller, scores that are all equal, or a level out of its range.
        ProbeError: statsmodels is missing.
    """
    _check(level=level)
    api = require("statsmodels.regression.mixed_linear_model", extra="stats", purpose="a mixed-effects model")
    stats = require("scipy.stats", extra="stats", purpose="a mixed-effects model")
    score = formula.partition("~")[0].strip()
    frame = _frame(records, formula, score, group)
    groups = int(frame[group].nunique())
    smaller = null if null is not None else f"{score} ~ 1"
    models = [_model(api.MixedLM, text, frame, group) for text in (formula, smaller)]
    degrees = int(models[0].exog.shape[1] - models[1].exog.shape[1])
    if degrees < 1:
        raise ValueError(f"the null model {smaller!r} has to have fewer fixed effects than {formula!r}")
    full, reduced = (_fit(model, level) for model in models)
    converged = full.converged and reduced.converged
    statistic = 2 * (full.log_likelihood - reduced.log_likelihood) if converged else math.nan
    notes = [f"{text}: {note}" for text, fit in ((formula, full), (smaller, reduced)) for note in fit.notes]
    if statistic < -1e-3:
        converged, statistic = False, math.nan
        notes.append("the smaller model fits better than the larger one, so one of the optima is not the best")
    return MixedEffects(
        p_value=float(stats.chi2.sf(max(statistic, 0.0), degrees)) if converged else math.nan,
        statistic=max(statistic, 0.0) if converged else math.nan,
        degrees=degrees,
        effects={name: Interval(*numbers, level, len(frame)) for name, numbers in full.effects.items()},
        group_variance=full.group_variance,
        residual_variance=full.residual_variance,
        groups=groups,
        n=len(frame),
        converged=converged,
        notes=tuple(notes),
        definition=(
            f"likelihood-ratio test of {formula!r} against {smaller!r}, linear mixed-effects models with a random "
            f"intercept per {group} ({groups}), maximum likelihood, {len(frame)} records"
        ),
    )


def _frame(records: Sequence[Mapping[str, Any]], formula: str, score: str, group: str) -> Any:
    """The records as a data frame. Raises ``ValueError`` where no model of this formula can be fitted to them."""
    pandas = require("pandas", extra="stats", purpose="a mixed-effects model")
    frame = pandas.DataFrame.from_records([dict(record) for record in records])
    if frame.empty or group not in frame or score not in frame:
        raise ValueError(
            f"records need the fields {group!r} and {score!r}; they have {sorted(map(str, frame.columns))}"
        )
    used = [str(name) for name in frame if name == group or re.search(rf"\b{re.escape(str(name))}\b", formula)]
    missing = [name for name in used if frame[name].isna().any()]
    if missing:
        raise ValueError(f"records without a value in {', '.join(missing)}: leave them out before, and say how many")
    if (groups := int(frame[group].nunique())) < 2:
        raise ValueError(f"a random intercept per {group!r} needs at least two of them; got {groups}")
    if frame[score].nunique() < 2:
        raise ValueError(f"all {len(frame)} scores are equal, so there is nothing to test")
    return frame


def _model(mixed: Any, formula: str, frame: Any, group: str) -> Any:
    try:
        return mixed.from_formula(formula, frame, groups=frame[group])
    except Exception as error:  # the formula library has errors of its own
        raise ValueError(
            f"the formula {formula!r} cannot be read with the fields {sorted(map(str, frame.columns))}: {error}"
        ) from error


@dataclass(frozen=True)
class _Fit:
    log_likelihood: float
    converged: bool
    effects: Mapping[str, tuple[float, float, float]]
    group_variance: float
    residual_variance: float
    notes: tuple[str, ...]


def _fit(model: Any, level: float) -> _Fit:
    """Maximum likelihood.

    MixedLM's optimiser fails on the border σ_u² = 0. Whether the optimum lies there can be told beforehand: the profile
    log-likelihood has the slope N/2 · (Σ_i (Σ_j r_ij)² / Σ r² − 1) in σ_u²/σ² at 0, with the residuals r of least
    squares. Where that is not positive, least squares is the fit.
    """
    plain = (
        require("statsmodels.api", extra="stats", purpose="a mixed-effects model").OLS(model.endog, model.exog).fit()
    )
    residuals = [y - x @ plain.params for y, x in zip(model.endog_li, model.exog_li, strict=True)]
    if sum(float(part.sum()) ** 2 for part in residuals) <= sum(float((part**2).sum()) for part in residuals):
        bounds = plain.conf_int(alpha=1 - level)
        note = "the variance between groups is estimated as 0; the fit is that of least squares"
        effects = _effects(model.exog_names, plain.params, bounds)
        return _Fit(float(plain.llf), True, effects, 0.0, float(plain.ssr / plain.nobs), (note,))
    try:
        mixed = model.fit(reml=False)  # its warnings go where the caller wants them: filters are the whole process's
    except np.linalg.LinAlgError as error:
        return _Fit(math.nan, False, {}, math.nan, math.nan, (str(error),))
    bounds = np.asarray(mixed.conf_int(alpha=1 - level))[: len(mixed.fe_params)]
    return _Fit(
        log_likelihood=float(mixed.llf),
        converged=bool(mixed.converged),
        effects=_effects(model.exog_names, mixed.fe_params, bounds),
        group_variance=float(np.asarray(mixed.cov_re)[0, 0]),
        residual_variance=float(mixed.scale),
        notes=() if mixed.converged else ("the optimiser of MixedLM did not converge",),
    )


def _effects(names: Any, values: Any, bounds: Any) -> dict[str, tuple[float, float, float]]:
    rows = zip(names, np.asarray(values), np.asarray(bounds), strict=True)
    return {str(name): (float(value), float(low), float(high)) for name, value, (low, high) in rows}


def _bca_edges(
    data: np.ndarray, drawn: np.ndarray, estimate: float, function: Callable[[np.ndarray], np.ndarray], tail: float
) -> tuple[float, float]:
    normal = NormalDist()
    below = ((drawn < estimate).sum() + 0.5 * (drawn == estimate).sum()) / drawn.size
    bias = normal.inv_cdf(float(np.clip(below, 1e-9, 1 - 1e-9)))
    left_out = np.stack([np.delete(data, index) for index in range(data.size)])
    spread = function(left_out).mean() - function(left_out)
    scale = float((spread**2).sum() ** 1.5)
    acceleration = float((spread**3).sum()) / (6 * scale) if scale > 0 else 0.0

    def edge(probability: float) -> float:
        shifted = bias + normal.inv_cdf(probability)
        return normal.cdf(bias + shifted / (1 - acceleration * shifted))

    return edge(tail), edge(1 - tail)
