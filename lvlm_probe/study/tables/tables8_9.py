"""Tables 8 and 9: agreement with human attention, and what a map costs."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lvlm_probe.errors import StudyError
from lvlm_probe.metrics import Interval, mean_and_error
from lvlm_probe.study.results import Results
from lvlm_probe.study.tables.cells import doubtful, filter_notes, mean, objection, skipped
from lvlm_probe.study.tables.table import Cell, Table


def table8(results: Results) -> Table:
    """Agreement with human attention, of the rows that name Table 8, or of all rows where none does."""
    rows: list[tuple[Cell, ...]] = []
    methods = _naming(results, 8)
    doubted: Counter[str] = Counter()
    unranked: set[int] = set()
    for model in results.study.models:
        for dataset in results.study.datasets:
            for name in methods:
                found = []
                for record in results.chosen(model=model, dataset=dataset, row=name):
                    if record.get("human") and (why := objection(record)) is None:
                        found.append(record)
                    elif record.get("human"):
                        doubted[f"no measurement: {why}"] += 1
                if not found:
                    continue
                if doubtful(found):
                    unranked.add(len(rows))
                over_people = {
                    key: [_over_people(record["human"], key) for record in found]
                    for key in ("soft_iou", "rank_correlation", "auc_judd", "nss")
                }
                ranks = over_people["rank_correlation"]
                rows.append(
                    (
                        model,
                        dataset,
                        name,
                        len(found),
                        mean(over_people["soft_iou"]),
                        _with_error(ranks),
                        _with_error([-rank for rank in ranks]),
                        mean(over_people["auc_judd"]),
                        mean(over_people["nss"]),
                    )
                )
    failed = Counter(record["human_failed"] for record in results.chosen() if record.get("human_failed"))
    if not rows:
        why = next(iter(failed), "no map of this study is of a sample with human attention")
        raise StudyError(f"{why}; table 8 needs maps with human attention beside them: VQA-HAT or the like")
    return Table(
        "table8",
        "Table 8: agreement with human attention",
        (
            "model",
            "data set",
            "method",
            "n",
            "soft IoU",
            "rank correlation ρ",
            "ρ of the reversed map",
            "AUC-Judd",
            "NSS",
        ),
        tuple(rows),
        labels=3,
        better=dict.fromkeys(("soft IoU", "rank correlation ρ", "AUC-Judd", "NSS"), "higher"),
        doubted=frozenset(unranked),
        notes=(
            "ρ: Spearman, mean ± standard error over samples, of the heatmap (high = important) and of 1 − heatmap: a "
            "mask whose low values are important, read the wrong way round, has the sign turned.",
            *_stand_ins(results),
            *filter_notes(results),
            skipped(failed + doubted),
        ),
    )


def _with_error(values: Sequence[float]) -> str | None:
    """Mean ± standard error, with its sign; the mean alone of one sample, nothing where there is none."""
    if not np.isfinite(values).any():
        return None
    found = mean_and_error(values)
    return f"{found.mean:+.3f}" + (f" ± {found.standard_error:.3f}" if found.n > 1 else "")


def _naming(results: Results, number: int) -> list[str]:
    methods = results.study.methods
    return [name for name, spec in methods.items() if number in spec.tables] or list(methods)


def _over_people(humans: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [float(item[key]) for item in humans if item.get(key) is not None]
    return sum(values) / len(values) if values else math.nan


def _stand_ins(results: Results) -> list[str]:
    """Of data sets whose "human attention" is the region that decides the answer."""
    names = [name for name, spec in results.study.datasets.items() if spec.options.get("human") == "region"]
    if not names:
        return []
    return [
        f"No person has looked at the images of {', '.join(names)}: the region that is known to decide the answer, 1 "
        "inside and 0 outside, stands for human attention; AUC-Judd and NSS take it for what was looked at."
    ]


def table9(results: Results) -> Table:
    """Passes, seconds and memory per map, of the rows that name Table 9, or of all rows where none does."""
    rows: list[tuple[Cell, ...]] = []
    chosen = _naming(results, 9)
    largest: list[int] = []
    unranked: set[int] = set()
    for model in results.study.models:
        for name in chosen:
            found = list(results.chosen(model=model, row=name))
            if not found:
                continue
            if doubtful(found):
                unranked.add(len(rows))
            passes = [float(record["passes"]["forward"]) for record in found]
            back = [float(record["passes"]["backward"]) for record in found]
            peaks = [memory for record in found if (memory := peak_memory(record)) is not None]
            largest += [beside + weights for beside, weights in peaks]
            rows.append(
                (
                    model,
                    name,
                    len(found),
                    f"{sum(passes) / len(passes):.0f} + {sum(back) / len(back):.0f}",
                    mean(float(record["measured"]["seconds"]) for record in found),
                    mean(float(beside) for beside, _ in peaks),
                    max((float(beside + weights) for beside, weights in peaks), default=None),
                )
            )
    if not rows:
        raise StudyError("no map of this study is finished")
    unit, factor = ("GB", 1e9) if max(largest, default=10**9) >= 5 * 10**8 else ("MB", 1e6)
    held = (f"peak memory beside the weights, {unit}", f"highest, weights included, {unit}")
    return Table(
        "table9",
        "Table 9: cost of a map",
        ("model", "method", "n", "passes, forward + backward", "seconds", *held),
        tuple((*row[:5], *(_divided(cell, factor) for cell in row[5:])) for row in rows),
        labels=2,
        better=dict.fromkeys(("seconds", *held), "lower"),
        doubted=frozenset(unranked),
        notes=(
            f"Measured in these runs on {'; '.join(_machines(results)) or 'a machine that was not noted'}. Seconds: of "
            "the explanation alone, without judging it, by the clock: where the machine did other work too, passes "
            "tell more. Memory: most bytes of tensors alive at once; –: not measured.",
        ),
    )


def peak_memory(record: Mapping[str, Any]) -> tuple[int, int] | None:
    """Bytes of a map's measured peak beside the weights, and of the weights; ``None`` where it was not measured."""
    memory = record["measured"].get("memory") or {}
    peak, weights = memory.get("measured_peak"), memory.get("weights")
    return None if peak is None or weights is None else (int(peak), int(weights))


def _divided(cell: Cell, factor: float) -> Cell:
    if isinstance(cell, Interval):
        return dataclasses.replace(
            cell, estimate=cell.estimate / factor, low=cell.low / factor, high=cell.high / factor
        )
    return cell / factor if isinstance(cell, float) else cell


def _machines(results: Results) -> list[str]:
    """Names of the machines that maps were made on, the one with most of them first."""
    found = Counter(name for record in results.maps if (name := (record.get("measured") or {}).get("machine")))
    return [name for name, _ in found.most_common()]
