"""How far the probability of an answer falls without the image, and which class of answers that makes it.

With LLR_t the log-likelihood ratio of token t (paper, Eq. 6) and sums over the T tokens that are not special:

* ``drop`` = 1 − P̃(a)/P(a) = 1 − exp(−Σ LLR_t), P the joint probability of the answer;
* ``drop_normalised`` = 1 − exp(−Σ LLR_t / T), the same with P the geometric mean over tokens, which does not depend on
  the answer's length (paper, Table 1, which leaves open which of the two it means).

The ``band`` is the paper's division of a drop in Table 1: below 30 % the answer hardly needed the image
(``"habit"``), above 70 % it came from it (``"image"``), between them it is ``"mixed"``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lvlm_probe.errors import ExplainError

BANDS = (0.3, 0.7)
"""Edges of the bands: those of the paper's Table 1."""

Band = Literal["habit", "mixed", "image", "unknown"]


@dataclass(frozen=True)
class Drop:
    """What the image is worth to one answer; the module's docstring defines the numbers.

    Attributes:
        log_prob, baseline_log_prob: of the answer, nats, with the image and on the baseline image.
        drop, drop_normalised: at most 1, and negative where the answer is likelier without the image; NaN where a
            log-probability is.
    """

    log_prob: float
    baseline_log_prob: float
    drop: float
    drop_normalised: float


def drop_of(
    log_probs: Sequence[float] | np.ndarray, llr: Sequence[float] | np.ndarray, special: Sequence[bool] | np.ndarray
) -> Drop:
    """The drop of one answer.

    Args:
        log_probs: log P(a_t) with the image, ``(step,)``, nats.
        llr: log-likelihood ratios, ``(step,)``, nats.
        special: which are special tokens, ``(step,)``; these do not count.

    Raises:
        ExplainError: there is no token but special ones.
    """
    ordinary = ~np.asarray(special, dtype=bool)
    if not ordinary.any():
        raise ExplainError("the answer has no tokens besides special ones")
    log_prob = float(np.asarray(log_probs, dtype=np.float64)[ordinary].sum())
    ratio = float(np.asarray(llr, dtype=np.float64)[ordinary].sum())
    return Drop(log_prob, log_prob - ratio, _fall(ratio), _fall(ratio / int(ordinary.sum())))


def band_of(drop: float) -> Band:
    """The band of a drop; ``"unknown"`` for NaN."""
    if math.isnan(drop):
        return "unknown"
    return "habit" if drop < BANDS[0] else "mixed" if drop <= BANDS[1] else "image"


def _fall(ratio: float) -> float:
    """1 − exp(−ratio); −inf where the answer is beyond all numbers likelier without the image."""
    try:
        return -math.expm1(-ratio)
    except OverflowError:
        return -math.inf
