"""Metrics: judges of heatmaps, and the statistics that figures are reported with.

* ``evaluate``: deletion and insertion, with a verdict in words.
* ``pointing_game``, ``energy_in_region``, ``iou``, ``soft_iou``, ``average_precision``: against a known region.
* ``tube_pointing``, ``tube_energy``, ``tube_iou``, ``temporal_pointing``, ``temporal_iou``: of videos, against a known
  region in time and space, or known frames.
* ``human_agreement``, ``rank_correlation``, ``auc_judd``, ``nss``: against where people looked.
* ``amcr``, ``csr``: of regions that correct an answer (``probe.edit``), how large they are.
* ``bootstrap_ci``, ``paired_difference``, ``permutation_test``, ``mixed_effects``, ``mean_and_error``, ``auroc``: over
  samples.

scipy and statsmodels (``pip install 'lvlm-probe[stats]'``) are imported by the functions that need them, when called.
"""

from __future__ import annotations

from lvlm_probe._moved import names_of
from lvlm_probe.metrics.deletion_insertion import CurveRule
from lvlm_probe.metrics.human import HumanAgreement, auc_judd, human_agreement, nss, rank_correlation
from lvlm_probe.metrics.localization import (
    average_precision,
    boxes_to_mask,
    energy_in_region,
    iou,
    pointing_game,
    soft_iou,
    temporal_iou,
    temporal_pointing,
    tube_energy,
    tube_iou,
    tube_mask,
    tube_pointing,
)
from lvlm_probe.metrics.scoring import Score, evaluate
from lvlm_probe.metrics.similarity import Similarity, compare_maps
from lvlm_probe.metrics.statistics import (
    Interval,
    MeanAndError,
    MixedEffects,
    PermutationTest,
    amcr,
    auroc,
    bootstrap_ci,
    csr,
    mean_and_error,
    mixed_effects,
    paired_difference,
    permutation_test,
)
from lvlm_probe.metrics.verdict import Verdict

__all__ = [
    "CurveRule",
    "HumanAgreement",
    "Interval",
    "MeanAndError",
    "MixedEffects",
    "PermutationTest",
    "Score",
    "Similarity",
    "Verdict",
    "amcr",
    "auc_judd",
    "auroc",
    "average_precision",
    "bootstrap_ci",
    "boxes_to_mask",
    "compare_maps",
    "csr",
    "energy_in_region",
    "evaluate",
    "human_agreement",
    "iou",
    "mean_and_error",
    "mixed_effects",
    "nss",
    "paired_difference",
    "permutation_test",
    "pointing_game",
    "rank_correlation",
    "soft_iou",
    "temporal_iou",
    "temporal_pointing",
    "tube_energy",
    "tube_iou",
    "tube_mask",
    "tube_pointing",
]

__getattr__ = names_of(__name__)
