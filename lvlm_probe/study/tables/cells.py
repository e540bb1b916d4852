"""Parts of all tables: means over samples, and the sentences under a table."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from statistics import NormalDist
from typing import Any

from lvlm_probe.metrics import Interval, Verdict, bootstrap_ci
from lvlm_probe.study.results import Results

LEAST_SPAN = 0.05
"""Probability that the explained tokens have to lose on the baseline for a normalised score to mean anything: what is
divided by less is noise. It is the paper's own limit for what a baseline may leave (A.1)."""


def mean(values: Iterable[float | None]) -> Interval | None:
    """Mean with its 95 % bootstrap interval over the values that are numbers, the others counted as ``missing``;
    ``None`` where there are none."""
    given = list(values)
    there = [value for value in given if value is not None and math.isfinite(value)]
    return dataclasses.replace(bootstrap_ci(there), missing=len(given) - len(there)) if there else None


def share(flags: Iterable[bool]) -> Interval | None:
    """Share of true ones, in per cent, with its 95 % score interval (Wilson, 1927); ``None`` where there are none.

    It does not shrink to a point where all are alike, as a bootstrap's does.
    """
    there = list(flags)
    if not there:
        return None
    n, z = len(there), NormalDist().inv_cdf(0.975)
    found = sum(there) / n
    middle = (found + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(found * (1 - found) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return Interval(100 * found, 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0), 0.95, n)


def number(record: Mapping[str, Any], key: str) -> float | None:
    """A score of a finished map; ``None`` where it could not be computed."""
    value = record.get(key)
    return None if value is None or not math.isfinite(value) else float(value)


def gain(record: Mapping[str, Any]) -> float | None:
    """Insertion − deletion of a finished map."""
    deletion, insertion = number(record, "deletion"), number(record, "insertion")
    return None if deletion is None or insertion is None else insertion - deletion


def scored(records: Iterable[Mapping[str, Any]], skips: Counter[str]) -> list[Mapping[str, Any]]:
    """The maps that have a deletion and an insertion score; those that have none are counted under ``skips``."""
    found = []
    for record in records:
        if gain(record) is not None:
            found.append(record)
        else:
            skips[f"no score: {record.get('verdict') or 'the image has no say'}"] += 1
    return found


def spans(record: Mapping[str, Any]) -> bool:
    """Tell whether the tokens of a map lose enough on its baseline for its normalised scores to mean anything.

    Score s becomes (s − s̃) / (s₀ − s̃), s₀ of the whole image and s̃ of the baseline: tokens that the language alone
    decides (a keyword that the image has no part in) make that a division by next to nothing.
    """
    check = record.get("baseline_check") or {}
    whole, baseline = check.get("original_probability"), check.get("mean_probability")
    return whole is None or baseline is None or float(whole) - float(baseline) >= LEAST_SPAN


def objection(record: Mapping[str, Any]) -> str | None:
    """Say why the scores of a map enter no mean; ``None`` where they do.

    It is what the verdict says against them as a measurement; what it says against the map alone (no better than
    chance, tied) is no reason, as a mean over good maps would flatter the method (``Verdict.measured``).
    """
    if not spans(record):
        return f"its tokens lose less than {LEAST_SPAN:g} of probability on the baseline"
    if record.get("trusted") is not False:
        return None
    verdict = Verdict.from_text(str(record.get("verdict") or ""))
    return None if verdict.measured else "; ".join(verdict.reasons) or "its verdict gives no reason"


def doubtful(records: Collection[Mapping[str, Any]]) -> bool:
    """Tell whether most maps of a row are not to be trusted: such a row is no table's best."""
    return 2 * sum(record.get("trusted") is False for record in records) > len(records)


def skipped(found: Counter[str]) -> str:
    """A sentence on what was skipped and why."""
    if not found:
        return "No unit was skipped."
    return "Skipped: " + "; ".join(f"{count} × {reason}" for reason, count in found.most_common()) + "."


def filter_notes(results: Results) -> list[str]:
    """Say what the filter is, and per data set how many samples it keeps and why it drops the others."""
    rule = results.study.filter
    kind = "length-normalised" if rule.normalised else "joint"
    notes = [
        f"Filter: the {kind} probability of the answer falls by at least {rule.minimum_drop:g} on the baseline "
        f"image, under every model."
    ]
    for dataset, kept in results.kept.items():
        dropped = results.dropped[dataset]
        total = len(kept) + len(dropped)
        if total:
            # The numbers in a reason differ from sample to sample.
            reasons = Counter(reason.partition(" (")[0] for reason in dropped.values())
            said = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
            notes.append(f"{dataset}: {len(kept)} of {total} samples kept" + (f"; dropped: {said}." if said else "."))
    return notes
