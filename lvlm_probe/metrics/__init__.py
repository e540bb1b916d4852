"""Metrics: judges of heatmaps, and the statistics that figures are reported with.

* ``evaluate``: deletion and insertion, with a verdict in words.
* ``pointing_game``, ``energy_in_region``, ``iou``, ``soft_iou``, ``average_precision``: against a known region.
* ``human_agreement``, ``rank_correlation``, ``auc_judd``, ``nss``: against where people looked.
* ``weight_randomisation``, ``answer_randomisation``: does the heatmap depend on the model and on the answer at all?
* ``stability``, ``over_seeds``, ``over_prompts``, ``completeness``, ``tie_share``: do repeats agree, do sums add up?
* ``bootstrap_ci``, ``paired_difference``, ``permutation_test``, ``mixed_effects``, ``mean_and_error``: over samples.

scipy and statsmodels (``pip install 'lvlm-probe[stats]'``) are imported by the functions that need them, when called.
"""

from __future__ import annotations

from lvlm_probe.metrics.human import HumanAgreement, auc_judd, human_agreement, nss, rank_correlation
from lvlm_probe.metrics.localization import (
    average_precision,
    boxes_to_mask,
    energy_in_region,
    iou,
    pointing_game,
    soft_iou,
)
from lvlm_probe.metrics.randomisation import randomised, weight_blocks
from lvlm_probe.metrics.sanity import SanityReport, SanityStep, answer_randomisation, weight_randomisation
from lvlm_probe.metrics.scoring import Score, evaluate
from lvlm_probe.metrics.similarity import Similarity, compare_maps
from lvlm_probe.metrics.stability import (
    Completeness,
    Stability,
    completeness,
    over_prompts,
    over_seeds,
    stability,
    tie_share,
)
from lvlm_probe.metrics.statistics import (
    Interval,
    MeanAndError,
    MixedEffects,
    PermutationTest,
    bootstrap_ci,
    mean_and_error,
    mixed_effects,
    paired_difference,
    permutation_test,
)
from lvlm_probe.metrics.verdict import Verdict

__all__ = [
    "Completeness",
    "HumanAgreement",
    "Interval",
    "MeanAndError",
    "MixedEffects",
    "PermutationTest",
    "SanityReport",
    "SanityStep",
    "Score",
    "Similarity",
    "Stability",
    "Verdict",
    "answer_randomisation",
    "auc_judd",
    "average_precision",
    "bootstrap_ci",
    "boxes_to_mask",
    "compare_maps",
    "completeness",
    "energy_in_region",
    "evaluate",
    "human_agreement",
    "iou",
    "mean_and_error",
    "mixed_effects",
    "nss",
    "over_prompts",
    "over_seeds",
    "paired_difference",
    "permutation_test",
    "pointing_game",
    "randomised",
    "rank_correlation",
    "soft_iou",
    "stability",
    "tie_share",
    "weight_blocks",
    "weight_randomisation",
]
