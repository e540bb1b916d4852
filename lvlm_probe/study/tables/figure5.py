"""Figure 5: is the answer right, and is the focus plausible?"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvlm_probe.errors import StudyError
from lvlm_probe.escaping import csv_cell
from lvlm_probe.study.results import Results
from lvlm_probe.study.tables.cells import objection
from lvlm_probe.study.tables.table import Cell, Table

_ALL = "all categories"


def figure5(results: Results, annotations: Path | None = None) -> Table:
    """Correct or not × focus plausible or not, by category of question.

    Args:
        annotations: csv with the columns ``dataset, sample, model, plausible`` (1 or 0), and if wished ``correct`` and
            ``category``, which go before what is computed. Without it, a focus is plausible where the highest point of
            the first method's map lies in the region that is known to decide the answer (pointing game), and the
            category is the sample's group.

    Raises:
        StudyError: the csv cannot be read, or nothing can be judged.
    """
    row = next(iter(results.study.methods))
    judged = _read_annotations(annotations) if annotations is not None else {}
    counts: dict[tuple[str, str], Counter[tuple[bool, bool]]] = {}
    unjudged = 0
    for record in results.chosen(row=row):
        own = judged.get(_key(record), {})
        plausible = own.get("plausible")
        known = annotations is None and record.get("pointing") is not None and objection(record) is None
        if plausible is None and known:
            plausible = float(record["pointing"]) >= 0.5
        correct = own.get("correct", record["correct"])
        if plausible is None or correct is None:
            unjudged += 1
            continue
        category = str(own.get("category") or record["group"] or "all")
        counts.setdefault((record["model"], category), Counter())[bool(correct), bool(plausible)] += 1
    if not counts:
        raise StudyError(
            "no map could be judged: give a csv with dataset, sample, model, plausible (0 or 1), or use data whose "
            "deciding region is known"
        )
    for model in sorted({model for model, _ in counts}):
        theirs = [found for (name, _), found in counts.items() if name == model]
        if len(theirs) > 1:
            counts[model, _ALL] = sum(theirs, Counter())
    rows: list[tuple[Cell, ...]] = []
    for (model, category), found in sorted(counts.items(), key=lambda item: (item[0][0], item[0][1] == _ALL, item[0])):
        total = sum(found.values())
        shares = [100 * found[pair] / total for pair in ((True, True), (True, False), (False, True), (False, False))]
        rows.append((model, category, total, *(f"{share:.0f} %" for share in shares)))
    source = (
        f"judgements of {annotations.name}" if annotations is not None else "pointing game against the known region"
    )
    return Table(
        "figure5",
        "Figure 5: is the answer right, and is the focus plausible?",
        ("model", "category", "n", "right, plausible", "right, not", "wrong, plausible", "wrong, not"),
        tuple(rows),
        labels=2,
        notes=(f"Maps of {row}; plausible: {source}. Without a judgement: {unjudged} maps.",),
    )


def _key(record: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a line of judgements and a map have in common, as an exported csv has it."""
    dataset, sample, model = (csv_cell(str(record[name])) for name in ("dataset", "sample", "model"))
    return dataset, sample, model


def _read_annotations(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            missing = {"dataset", "sample", "model", "plausible"} - set(reader.fieldnames or ())
            if missing:
                raise StudyError(f"{path} has no column {', '.join(sorted(missing))}")
            found: dict[tuple[str, str, str], dict[str, Any]] = {}
            for line, row in enumerate(reader, start=2):
                judged: dict[str, Any] = {"category": (row.get("category") or "").strip() or None}
                for name in ("plausible", "correct"):
                    value = (row.get(name) or "").strip()
                    if value not in ("", "0", "1"):
                        raise StudyError(f"{path}, line {line}: {name} is 1 or 0, not {value!r}")
                    if value:
                        judged[name] = value == "1"
                found[_key(row)] = judged
            return found
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StudyError(f"{path} cannot be read: {error}") from error
