"""The paper's tables, from the finished units of a study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from lvlm_probe.errors import StudyError
from lvlm_probe.importing.drops import band_of
from lvlm_probe.metrics import paired_difference
from lvlm_probe.study.results import Results
from lvlm_probe.study.tables.cells import (
    LEAST_SPAN,
    doubtful,
    filter_notes,
    gain,
    mean,
    number,
    objection,
    scored,
    share,
    skipped,
    spans,
)
from lvlm_probe.study.tables.figure5 import figure5
from lvlm_probe.study.tables.table import Cell, Table
from lvlm_probe.study.tables.table4 import table4
from lvlm_probe.study.tables.tables8_9 import table8, table9

_NO_NUMBER = "the answer's probability is no number (half precision overflows?)"


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


# ---------------------------------------------------------------------------------------------- what images are worth


def table1(results: Results) -> Table:
    """Share of answers whose probability hardly falls without the image, joint and length-normalised."""
    rows: list[tuple[Cell, ...]] = []
    failed: Counter[str] = Counter()
    for model in results.study.models:
        for dataset in results.study.datasets:
            here = [record for record in results.answers if (record["model"], record["dataset"]) == (model, dataset)]
            answered = [record for record in here if record["status"] == "done"]
            done = [record for record in answered if None not in (record["drop"], record["drop_normalised"])]
            failed.update([_NO_NUMBER] * (len(answered) - len(done)))
            failed.update(f"{record['error']}: {record['reason']}" for record in here if record["status"] == "failed")
            cells: list[Cell] = [model, dataset, len(done)]
            for which in ("drop", "drop_normalised"):
                bands = [band_of(record[which]) for record in done]
                cells += [share(band == "habit" for band in bands), share(band == "mixed" for band in bands)]
            rows.append((*cells, share(record["correct"] for record in done if record["correct"] is not None)))
    return Table(
        "table1",
        "Table 1: percentage of answers whose probability falls by less than 30 %, and by 30–70 %, without the image",
        (
            "model",
            "data set",
            "n",
            "< 30 %, joint",
            "30–70 %, joint",
            "< 30 %, per token",
            "30–70 %, per token",
            "correct, %",
        ),
        tuple(rows),
        labels=2,
        decimals=1,
        notes=(
            "Fall: 1 − P̃/P, P of the whole answer (joint) or its geometric mean over tokens (per token). Percentages "
            "with 95 % Wilson intervals; correct: share of answers that hold the true one, by rule.",
            skipped(failed),
        ),
    )


# ----------------------------------------------------------------------------------------------- deletion and insertion


def _score_table(results: Results, which: int) -> Table:
    """Rows by deletion and insertion; in all tables but the second, judged alike and against the first row too."""
    against_first = which != 2
    names = [name for name, spec in results.study.methods.items() if which in spec.tables]
    if not names:
        raise StudyError(
            f"no method of this study belongs to table {which}; name it at the methods that do, tables: [{which}]"
        )
    columns = ["model", "data set", "method", "n", "deletion ↓", "insertion ↑", "insertion − deletion"]
    if against_first:
        columns += ["judged alike: insertion − deletion", f"judged alike, less {names[0]}"]
    rows: list[tuple[Cell, ...]] = []
    skips: Counter[str] = Counter()
    narrow: Counter[str] = Counter()
    doubted: Counter[str] = Counter()
    unranked: set[int] = set()
    for model in results.study.models:
        for dataset in results.study.datasets:
            alike: dict[str, dict[str, float]] = {}
            for name in names:
                found = scored(results.chosen(model=model, dataset=dataset, row=name), skips)
                skips += results.skips(model=model, dataset=dataset, row=name)
                cells: list[Cell] = [model, dataset, name, len(found)]
                own = [record for record in found if objection(record) is None]
                narrow[name] += sum(not spans(record) for record in found)
                doubted.update(
                    f"{name}: {why}" for record in found if spans(record) and (why := objection(record)) is not None
                )
                cells += [mean(number(record, key) for record in own) for key in ("deletion", "insertion")]
                cells.append(mean(gain(record) for record in own))
                if against_first:
                    alike[name] = {
                        record["sample"]: value
                        for record in found
                        if (value := gain(record.get("common") or record)) is not None
                        and objection(record.get("common") or record) is None
                    }
                    cells.append(mean(alike[name].values()))
                    shared = sorted(alike[names[0]].keys() & alike[name].keys())
                    cells.append(
                        paired_difference([alike[name][s] for s in shared], [alike[names[0]][s] for s in shared])
                        if shared and name != names[0]
                        else None
                    )
                if doubtful(found):
                    unranked.add(len(rows))
                rows.append(tuple(cells))
    notes = _score_notes(results, names, skips, narrow, doubted, alike=against_first)
    title = f"Table {which}: {_SCORE_TABLES[which]}"
    return Table(
        f"table{which}",
        title,
        tuple(columns),
        tuple(rows),
        labels=3,
        notes=tuple(notes),
        better=dict.fromkeys(columns[6:8], "higher"),
        doubted=frozenset(unranked),
    )


def _score_notes(
    results: Results,
    names: Sequence[str],
    skips: Counter[str],
    narrow: Counter[str],
    doubted: Counter[str],
    *,
    alike: bool,
) -> list[str]:
    """What was left out of a table of scores, and how it was computed."""
    notes = [
        f"Means over samples with 95 % bootstrap intervals; maps ranked on {results.study.settings.grid} × "
        f"{results.study.settings.grid} cells, {results.study.settings.steps} steps.",
        *filter_notes(results),
        skipped(skips),
    ]
    if any((number(record, "insertion") or 0.0) > 1 for record in results.chosen() if record["row"] in names):
        notes.append(
            "Scores are not clamped: above 1, a part of the image gives the answer more probability than the whole."
        )
    floors = {
        (record["model"], record["dataset"], record["sample"]): number(record, "center_gain")
        for record in results.chosen()
        if record["row"] in names and record.get("center_gain") is not None
    }
    if floors:
        notes.append(
            f"Floor: a blob in the middle of the image, made without looking, has an insertion − deletion of "
            f"{mean(floors.values())} over {len(floors)} answers."
        )
    if doubted:
        said = "; ".join(f"{why} ({count} ×)" for why, count in doubted.most_common())
        notes.append(f"Left out of the deletion and insertion columns, as the scores are no measurement: {said}.")
    if narrow.total():
        rows_left_out = "; ".join(f"{name}: {count}" for name, count in narrow.items() if count)
        notes.append(
            f"Left out of the deletion and insertion columns, as their tokens lose less than {LEAST_SPAN:g} of "
            f"probability on the baseline and a normalised score divides by that: {rows_left_out}."
        )
    if alike:
        notes.insert(
            1,
            "Judged alike: by the tokens and the baseline of the study, whatever a row explains or masks with; "
            "differences are paired by sample.",
        )
    return notes


_SCORE_TABLES = {
    2: "methods by deletion and insertion",
    3: "token selection",
    5: "weight λ2 of the graduated non-convexity term",
    6: "threshold α of the log-likelihood ratio",
    7: "baseline image",
}

_SCORED: dict[str, Callable[[Results], Table]] = {
    str(which): partial(_score_table, which=which) for which in _SCORE_TABLES
}
TABLES: dict[str, Callable[[Results], Table]] = dict(
    sorted({"1": table1, "4": table4, "8": table8, "9": table9, **_SCORED}.items())
)
