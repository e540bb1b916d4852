"""Confidence intervals by bootstrap over samples: a mean without one is not a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

__all__ = ["Interval", "bootstrap_ci", "paired_difference"]

_NUMBERS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, over ``n`` samples."""

    estimate: float
    low: float
    high: float
    level: float
    n: int

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


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
        values: ``(sample,)``. NaN is refused: leave samples without a value out before, and say how many.
        statistic: Maps ``(…, sample)`` to ``(…,)``; the mean by default.
        level: Coverage.
        resamples: Number of bootstrap samples.
        method: ``"percentile"``, or ``"bca"``, bias-corrected and accelerated, for skewed statistics of few samples.
        seed: Of the resampling.

    Raises:
        ValueError: No values, NaN among them, or an unknown method.
    """
    data = np.asarray(values, dtype=np.float64).reshape(-1)
    if data.size == 0 or np.isnan(data).any():
        raise ValueError(
            f"a bootstrap needs values that are numbers; got {data.size} values, {np.isnan(data).sum()} of them NaN"
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
        ValueError: The two differ in length.
    """
    left, right = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"paired samples come in equal numbers; got {left.shape} and {right.shape}")
    return bootstrap_ci(left - right, level=level, resamples=resamples, seed=seed)


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
