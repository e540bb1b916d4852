"""Table 4: models side by side under one method, with tests of the decoder's scale and of the vision architecture."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lvlm_probe.errors import ProbeError
from lvlm_probe.escaping import counted
from lvlm_probe.metrics import mixed_effects
from lvlm_probe.study.results import Results
from lvlm_probe.study.tables.cells import doubtful, filter_notes, gain, mean, number, objection, scored, skipped
from lvlm_probe.study.tables.table import Cell, Table

if TYPE_CHECKING:
    from lvlm_probe.study.spec import ModelSpec


def table4(results: Results) -> Table:
    """Models side by side under one method, with tests of the decoder's scale and of the vision architecture."""
    study = results.study
    name = next(iter(study.methods))
    rows: list[tuple[Cell, ...]] = []
    skips = results.skips(row=name)
    unranked: set[int] = set()
    for model, spec in study.models.items():
        found = []
        there = scored(results.chosen(model=model, row=name), skips)
        if doubtful(there):
            unranked.add(len(rows))
        for record in there:
            if (why := objection(record)) is None:
                found.append(record)
            else:
                skips[f"no measurement: {why}"] += 1
        rows.append(
            (
                model,
                spec.group or "–",
                spec.vision or "–",
                spec.size,
                len(found),
                mean(number(record, "deletion") for record in found),
                mean(number(record, "insertion") for record in found),
                mean(gain(record) for record in found),
            )
        )
    return Table(
        "table4",
        f"Table 4: models by deletion and insertion of {name}",
        ("model", "group", "vision", "size, billions", "n", "deletion ↓", "insertion ↑", "insertion − deletion"),
        tuple(rows),
        labels=3,
        better={"insertion − deletion": "higher"},
        within=("group",),
        doubted=frozenset(unranked),
        notes=(*_tests(results, name), *filter_notes(results), skipped(skips)),
    )


def _tests(results: Results, row: str) -> list[str]:
    """Mixed-effects tests on insertion − deletion, a random intercept per sample."""
    models = results.study.models
    records = [
        {
            "sample": f"{record['dataset']}/{record['sample']}",
            "model": record["model"],
            "score": score,
            "size": models[record["model"]].size,
            "group": models[record["model"]].group,
            "vision": models[record["model"]].vision,
        }
        for record in results.chosen(row=row)
        if objection(record) is None and (score := gain(record)) is not None
    ]
    said = []
    sized = [record for record in records if record["size"] and record["group"]]
    groups = {record["group"] for record in sized}
    within = [
        {**record, "scale": math.log2(float(record["size"]))}
        for record in sized
        if len({other["size"] for other in sized if other["group"] == record["group"]}) > 1
    ]
    family = " + C(group)" if len({record["group"] for record in within}) > 1 else ""
    said.append(
        _test(
            "Scale of the decoder (log2 of its size), within groups",
            within,
            f"score ~ scale{family}",
            f"score ~ 1{family}",
        )
        if within
        else f"Scale of the decoder: no group of models has two sizes ({counted(len(groups), 'group')} named)."
    )
    seen = [record for record in records if record["vision"]]
    kinds = {record["vision"] for record in seen}
    said.append(
        _test("Vision architecture", seen, "score ~ C(vision)", "score ~ 1")
        if len(kinds) > 1
        else f"Vision architecture: {counted(len(kinds), 'kind')} named in this study, and a test needs two."
    )
    if within and len(kinds) > 1 and _one_contrast(models, {record["model"] for record in records}):
        said.append(
            "Every size among these models comes with a vision architecture of its own: the two tests look at one "
            "difference from two sides and cannot tell which of the two it is due to."
        )
    return said


def _one_contrast(models: Mapping[str, ModelSpec], names: Collection[str]) -> bool:
    """Whether size and vision architecture never vary apart: no two models share the one and differ in the other."""
    pairs = {(models[name].size, models[name].vision) for name in names if models[name].size and models[name].vision}
    return len(pairs) == len({size for size, _ in pairs}) == len({vision for _, vision in pairs})


def _test(what: str, records: Sequence[Mapping[str, Any]], formula: str, null: str) -> str:
    try:
        found = mixed_effects(records, formula, null=null)
    except (ValueError, ProbeError) as error:
        return f"{what}: not tested ({error})."
    if not found.converged:
        return f"{what}: the fit did not converge ({'; '.join(found.notes)})."
    return f"{what}: p = {found.p_value:.4g} (χ²({found.degrees}) = {found.statistic:.3g}; {found.definition})."
