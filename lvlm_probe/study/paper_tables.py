"""The paper's tables, from the finished units of a study."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lvlm_probe.errors import StudyError
from lvlm_probe.metrics import Interval, bootstrap_ci, mean_and_error, mixed_effects, paired_difference
from lvlm_probe.study.quadrants import figure5
from lvlm_probe.study.results import Results
from lvlm_probe.study.tables import Cell, Table

__all__ = ["TABLES", "make_table"]

FEW = 30  # per cent of its probability that an answer loses: "hardly needs the picture" (Table 1)
MANY = 70


def make_table(results: Results, name: str, *, annotations: Path | None = None) -> Table:
    """One of the paper's tables.

    Args:
        results: of the study.
        name: ``"1"`` to ``"9"``, or ``"figure5"``.
        annotations: for Figure 5, a csv of judgements (see ``figure5``).

    Raises:
        StudyError: there is no such table, or nothing finished that it could be made of.
    """
    if name == "figure5":
        return figure5(results, annotations)
    if name not in TABLES:
        raise StudyError(f"there is no table {name!r}; there are {', '.join(TABLES)} and figure5")
    return TABLES[name](results)


def _mean(values: Iterable[float | None]) -> Interval | None:
    there = [value for value in values if value is not None and not math.isnan(value)]
    return bootstrap_ci(there) if there else None


def _skipped(found: Counter[str]) -> str:
    if not found:
        return "no unit was skipped"
    return "skipped: " + "; ".join(f"{count} × {reason}" for reason, count in found.most_common())


def _filter_notes(results: Results) -> list[str]:
    rule = results.study.filter
    kind = "length-normalised" if rule.normalised else "joint"
    notes = [
        f"Filter: the {kind} probability of the answer falls by at least {rule.minimum_drop:g} on the baseline "
        f"picture, under every model."
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


# ---------------------------------------------------------------------------------------------- what pictures are worth


def table1(results: Results) -> Table:
    """Share of answers whose probability hardly falls without the picture, joint and length-normalised."""
    rows: list[tuple[Cell, ...]] = []
    failed: Counter[str] = Counter()
    for model in results.study.models:
        for dataset in results.study.datasets:
            here = [record for record in results.answers if (record["model"], record["dataset"]) == (model, dataset)]
            done = [record for record in here if record["status"] == "done"]
            failed.update(f"{record['error']}: {record['reason']}" for record in here if record["status"] == "failed")
            cells: list[Cell] = [model, dataset, len(done)]
            for which in ("drop", "drop_normalised"):
                lost = [100 * float(record[which]) for record in done]
                cells.append(_mean([100.0 * (value < FEW) for value in lost]))
                cells.append(_mean([100.0 * (FEW <= value <= MANY) for value in lost]))
            right = [float(record["correct"]) for record in done if record["correct"] is not None]
            rows.append((*cells, _mean(right)))
    return Table(
        "table1",
        "Table 1: percentage of answers whose probability falls by less than 30 %, and by 30–70 %, without the picture",
        (
            "model",
            "data set",
            "n",
            "< 30 %, joint",
            "30–70 %, joint",
            "< 30 %, per token",
            "30–70 %, per token",
            "correct",
        ),
        tuple(rows),
        labels=2,
        notes=(
            "Fall: 1 − P̃/P, P of the whole answer (joint) or its geometric mean over tokens (per token). Percentages "
            "with 95 % bootstrap intervals; correct: share of answers that hold the true one, by rule.",
            _skipped(failed) + ".",
        ),
    )


# ----------------------------------------------------------------------------------------------- deletion and insertion


def _score_table(results: Results, number: int, title: str, *, against_first: bool) -> Table:
    names = [name for name, spec in results.study.methods.items() if number in spec.tables]
    if not names:
        raise StudyError(
            f"no method of this study belongs to table {number}; name it at the methods that do, tables: [{number}]"
        )
    columns = ["model", "data set", "method", "n", "deletion ↓", "insertion ↑", "insertion − deletion"]
    if against_first:
        columns += ["judged alike: insertion − deletion", f"judged alike, less {names[0]}"]
    rows: list[tuple[Cell, ...]] = []
    skips: Counter[str] = Counter()
    for model in results.study.models:
        for dataset in results.study.datasets:
            alike: dict[str, dict[str, float]] = {}
            for name in names:
                found = list(results.chosen(model=model, dataset=dataset, row=name))
                skips += results.skips(model=model, dataset=dataset, row=name)
                cells: list[Cell] = [model, dataset, name, len(found)]
                cells += [_mean(_number(record, key) for record in found) for key in ("deletion", "insertion")]
                cells.append(_mean(_gain(record) for record in found))
                if against_first:
                    alike[name] = {
                        record["sample"]: value
                        for record in found
                        if (value := _gain(record.get("common") or record)) is not None
                    }
                    cells.append(_mean(alike[name].values()))
                    shared = sorted(alike[names[0]].keys() & alike[name].keys())
                    cells.append(
                        paired_difference([alike[name][s] for s in shared], [alike[names[0]][s] for s in shared])
                        if shared and name != names[0]
                        else None
                    )
                rows.append(tuple(cells))
    notes = [
        f"Means over samples with 95 % bootstrap intervals; maps ranked on {results.study.settings.grid} × "
        f"{results.study.settings.grid} cells, {results.study.settings.steps} steps.",
        *_filter_notes(results),
        _skipped(skips) + ".",
    ]
    if against_first:
        notes.insert(
            1,
            "Judged alike: by the tokens and the baseline of the study, whatever a row explains or masks with; "
            "differences are paired by sample.",
        )
    return Table(f"table{number}", title, tuple(columns), tuple(rows), labels=3, notes=tuple(notes))


def table2(results: Results) -> Table:
    """Methods × models × data sets."""
    return _score_table(results, 2, "Table 2: methods by deletion and insertion", against_first=False)


def table3(results: Results) -> Table:
    """Which tokens are explained."""
    return _score_table(results, 3, "Table 3: token selection", against_first=True)


def table5(results: Results) -> Table:
    """The weight of the graduated non-convexity term."""
    return _score_table(results, 5, "Table 5: weight λ2 of the graduated non-convexity term", against_first=True)


def table6(results: Results) -> Table:
    """The threshold of the log-likelihood ratio."""
    return _score_table(results, 6, "Table 6: threshold α of the log-likelihood ratio", against_first=True)


def table7(results: Results) -> Table:
    """The baseline picture."""
    return _score_table(results, 7, "Table 7: baseline picture", against_first=True)


def table4(results: Results) -> Table:
    """Models side by side under one method, with tests of the decoder's scale and of the vision architecture."""
    study = results.study
    name = next(iter(study.methods))
    rows: list[tuple[Cell, ...]] = []
    for model, spec in study.models.items():
        found = list(results.chosen(model=model, row=name))
        rows.append(
            (
                model,
                spec.group or "–",
                spec.vision or "–",
                spec.size,
                len(found),
                _mean(_number(record, "deletion") for record in found),
                _mean(_number(record, "insertion") for record in found),
                _mean(_gain(record) for record in found),
            )
        )
    return Table(
        "table4",
        f"Table 4: models by deletion and insertion of {name}",
        ("model", "group", "vision", "size, billions", "n", "deletion ↓", "insertion ↑", "insertion − deletion"),
        tuple(rows),
        labels=3,
        notes=(*_tests(results, name), *_filter_notes(results), _skipped(results.skips(row=name)) + "."),
    )


def _tests(results: Results, row: str) -> list[str]:
    """Mixed-effects tests on insertion − deletion, a random intercept per sample."""
    models = results.study.models
    records = [
        {
            "sample": f"{record['dataset']}/{record['sample']}",
            "model": record["model"],
            "score": gain,
            "size": models[record["model"]].size,
            "group": models[record["model"]].group,
            "vision": models[record["model"]].vision,
        }
        for record in results.chosen(row=row)
        if (gain := _gain(record)) is not None
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
        else f"Scale of the decoder: no group of models has two sizes ({len(groups)} group(s) are named)."
    )
    seen = [record for record in records if record["vision"]]
    kinds = {record["vision"] for record in seen}
    said.append(
        _test("Vision architecture", seen, "score ~ C(vision)", "score ~ 1")
        if len(kinds) > 1
        else f"Vision architecture: {len(kinds)} kind(s) are named in this study, and a test needs two."
    )
    return said


def _test(what: str, records: Sequence[Mapping[str, Any]], formula: str, null: str) -> str:
    try:
        found = mixed_effects(records, formula, null=null)
    except ValueError as error:
        return f"{what}: not tested ({error})."
    if not found.converged:
        return f"{what}: the fit did not converge ({'; '.join(found.notes)})."
    return f"{what}: p = {found.p_value:.4g} (χ²({found.degrees}) = {found.statistic:.3g}; {found.definition})."


# ----------------------------------------------------------------------------------------------------------- the others


def table8(results: Results) -> Table:
    """Agreement with human attention."""
    rows: list[tuple[Cell, ...]] = []
    for model in results.study.models:
        for dataset in results.study.datasets:
            for name in results.study.methods:
                found = [
                    record for record in results.chosen(model=model, dataset=dataset, row=name) if record.get("human")
                ]
                if not found:
                    continue
                mean = {
                    key: [_over_people(record["human"], key) for record in found]
                    for key in ("soft_iou", "rank_correlation", "auc_judd", "nss")
                }
                ranks = mean_and_error(mean["rank_correlation"])
                rows.append(
                    (
                        model,
                        dataset,
                        name,
                        len(found),
                        _mean(mean["soft_iou"]),
                        f"{ranks.mean:+.3f} ± {ranks.standard_error:.3f}",
                        f"{-ranks.mean:+.3f} ± {ranks.standard_error:.3f}",
                        _mean(mean["auc_judd"]),
                        _mean(mean["nss"]),
                    )
                )
    if not rows:
        raise StudyError("no map of this study is of a sample with human attention; table 8 needs VQA-HAT or the like")
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
        notes=(
            "ρ: Spearman, mean ± standard error over samples, of the heatmap (high = important) and of 1 − heatmap: a "
            "mask whose low values are important, read the wrong way round, has the sign turned.",
            *_filter_notes(results),
        ),
    )


def _over_people(humans: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [float(item[key]) for item in humans if item[key] is not None]
    return sum(values) / len(values) if values else math.nan


def table9(results: Results) -> Table:
    """Passes, seconds and memory per map."""
    rows: list[tuple[Cell, ...]] = []
    for model in results.study.models:
        for name in results.study.methods:
            found = list(results.chosen(model=model, row=name))
            if not found:
                continue
            passes = [float(record["passes"]["forward"]) for record in found]
            back = [float(record["passes"]["backward"]) for record in found]
            memory = [record["measured"].get("memory", {}).get("measured") for record in found]
            rows.append(
                (
                    model,
                    name,
                    len(found),
                    f"{sum(passes) / len(passes):.0f} + {sum(back) / len(back):.0f}",
                    _mean(float(record["measured"]["seconds"]) for record in found),
                    _mean(value / 2**30 for value in memory if value is not None),
                )
            )
    if not rows:
        raise StudyError("no map of this study is finished")
    return Table(
        "table9",
        "Table 9: cost of a map",
        ("model", "method", "n", "passes, forward + backward", "seconds", "peak memory, GiB"),
        tuple(rows),
        labels=2,
        notes=("Measured in this run, on whatever machine it ran; –: not measured.",),
    )


def _number(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    return None if value is None else float(value)


def _gain(record: Mapping[str, Any]) -> float | None:
    deletion, insertion = _number(record, "deletion"), _number(record, "insertion")
    return None if deletion is None or insertion is None else insertion - deletion


TABLES: dict[str, Callable[[Results], Table]] = {
    "1": table1,
    "2": table2,
    "3": table3,
    "4": table4,
    "5": table5,
    "6": table6,
    "7": table7,
    "8": table8,
    "9": table9,
}
