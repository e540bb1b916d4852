"""Sanity checks: does a heatmap depend on the model's weights, on the answer, on the seed and on the wording?

* ``weight_randomisation``, ``answer_randomisation``: does the heatmap depend on the model and on the answer at all?
* ``stability``, ``over_seeds``, ``over_prompts``, ``completeness``, ``tie_share``: do repeats agree, do sums add up?
"""

from __future__ import annotations

from lvlm_probe.sanity.random_weights import randomised, weight_blocks
from lvlm_probe.sanity.randomisation import SanityReport, SanityStep, answer_randomisation, weight_randomisation
from lvlm_probe.sanity.repeats import (
    Completeness,
    Stability,
    completeness,
    over_prompts,
    over_seeds,
    stability,
    tie_share,
)

__all__ = [
    "Completeness",
    "SanityReport",
    "SanityStep",
    "Stability",
    "answer_randomisation",
    "completeness",
    "over_prompts",
    "over_seeds",
    "randomised",
    "stability",
    "tie_share",
    "weight_blocks",
    "weight_randomisation",
]
