"""The reproduction ledger: every cell of the paper's tables beside what this study found for it, or "not run".

A study's models, data sets and methods say what the paper calls them (``paper:``), and methods whether they do as the
published code does (``behaviour: release``) or as the paper's formulas say (``corrected``).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

import yaml

from lvlm_probe.importing.drops import band_of
from lvlm_probe.metrics import bootstrap_ci
from lvlm_probe.study.results import Results
from lvlm_probe.study.spec import BEHAVIOURS
from lvlm_probe.study.tables.cells import objection, share
from lvlm_probe.study.tables.table import Cell, Table
from lvlm_probe.study.tables.tables8_9 import peak_memory

TABLE_9_MODEL = "LLaVA-1.5-7b"
_MEASURES = {
    1: ("< 30 %", "30–70 %"),
    8: ("soft IoU", "rank correlation"),
    9: ("GB", "seconds"),
}


@functools.cache
def printed() -> Mapping[str, Any]:
    """The paper's numbers, ``paper.yaml``."""
    text = resources.files("lvlm_probe.study").joinpath("paper.yaml").read_text(encoding="utf-8")
    numbers: Mapping[str, Any] = yaml.safe_load(text)
    return numbers


def ledger(results: Results) -> Table:
    """One row per number of the paper: it, ours as the release does, ours corrected, n, and a digest of the sample ids.

    As the release does: rows with ``behaviour: release``, their areas by the published code's rule too.

    A number of ours is the mean over all samples of the study's data set that passed the filter, with a 95 % interval.
    The samples are those that a run of this study kept; the paper does not publish which it kept.
    """
    rows: list[tuple[Cell, ...]] = []
    run = 0
    for number, model, row, dataset, values in _cells():
        ours = {kind: _values(results, number, model, row, dataset, kind) for kind in BEHAVIOURS}
        for place, measure in enumerate(_MEASURES.get(number, ("deletion", "insertion"))):
            cells: list[Cell] = [
                f"Table {number}",
                model or "–",
                row or "–",
                dataset or "–",
                measure,
                float(values[place]),
            ]
            ids: list[str] = []
            for kind in reversed(BEHAVIOURS):
                found = {s: float(v) for s, pair in ours[kind].items() if (v := pair[place]) is not None}
                run += bool(found)
                numbers = list(found.values())
                if not numbers:
                    cells.append("not run")
                elif number == 1:
                    cells.append(share(bool(value) for value in numbers))
                else:  # Table 9 has the maximum of memory and the mean of time
                    cells.append(max(numbers) if (number, place) == (9, 0) else bootstrap_ci(numbers))
                ids += sorted(found)
            cells.append(str(len(set(ids))) if ids else "–")
            cells.append(hashlib.sha256("\n".join(sorted(set(ids))).encode()).hexdigest()[:12] if ids else "–")
            rows.append(tuple(cells))
    return Table(
        "ledger",
        "Reproduction ledger",
        ("table", "model", "row", "data set", "measure", "paper", "as the release", "corrected", "n", "sample ids"),
        tuple(rows),
        labels=5,
        within=("table",),
        notes=(
            f"{run} numbers of this study stand beside the paper's {len(rows)}; all others were not run. Sample ids: "
            "first 12 digits of the SHA-256 of the sorted ids, which `lvlm-probe study export` writes out. The paper "
            f"does not say which model its Table 9 is of; {TABLE_9_MODEL} is taken, as for its ablations.",
        ),
    )


def any_run(results: Results) -> bool:
    """Tell whether a study has a number of its own beside any of the paper's."""
    return any(
        _values(results, number, model, row, dataset, kind)
        for number, model, row, dataset, _ in _cells()
        for kind in BEHAVIOURS
    )


def _cells() -> Iterator[tuple[int, str | None, str | None, str | None, list[float]]]:
    for name, content in printed().items():
        number = int(name.removeprefix("table"))
        for first, inner in content.items():
            if number == 9:
                yield number, None, first, None, inner
            elif number in (1, 8):
                for dataset, values in inner.items():
                    yield number, first, None, dataset, values
            else:
                for row, sets in inner.items():
                    for dataset, values in sets.items():
                        yield number, first, row, dataset, values


def _values(
    results: Results, number: int, model: str | None, row: str | None, dataset: str | None, behaviour: str
) -> dict[str, tuple[float | None, float | None]]:
    """Sample → the two numbers of a cell, under one behaviour."""
    study = results.study
    models = [name for name, spec in study.models.items() if spec.paper == (model or TABLE_9_MODEL)]
    datasets = [name for name, spec in study.datasets.items() if spec.paper == dataset or dataset is None]
    if number == 1:
        if behaviour == "release":
            return {}
        return {
            f"{record['dataset']}/{record['sample']}": (
                100.0 * (band_of(record["drop"]) == "habit"),
                100.0 * (band_of(record["drop"]) == "mixed"),
            )
            for record in results.answers
            if record["status"] == "done"
            and record["drop"] is not None
            and record["model"] in models
            and record["dataset"] in datasets
        }
    wanted = row or "iGOS++"
    names = [
        name
        for name, spec in study.methods.items()
        if (spec.paper or "") == wanted and spec.behaviour == behaviour and number in (*spec.tables, 4, 8, 9)
    ]
    found: dict[str, tuple[float | None, float | None]] = {}
    for name in names:
        for record in results.chosen(row=name):
            if record["model"] not in models or record["dataset"] not in datasets:
                continue
            sample = f"{record['dataset']}/{record['sample']}"
            found[sample] = _pair(number, record)
    return found


def _pair(number: int, record: Mapping[str, Any]) -> tuple[float | None, float | None]:
    if number == 8:
        people = record.get("human") or []
        means = []
        for key in ("soft_iou", "rank_correlation"):
            there = [float(person[key]) for person in people if person.get(key) is not None]
            means.append(sum(there) / len(there) if there else None)
        return means[0], means[1]
    if number == 9:
        memory = peak_memory(record)
        return (None if memory is None else sum(memory) / 1e9), float(record["measured"]["seconds"])
    if objection(record) is not None:
        return None, None
    own_rule = record.get("release") or record
    return own_rule.get("deletion"), own_rule.get("insertion")
