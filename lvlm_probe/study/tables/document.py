"""All tables of a study as one Markdown document, with what was run, on what, and what it took."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lvlm_probe._version import versions_of
from lvlm_probe.errors import ProbeError
from lvlm_probe.escaping import counted, markdown_text
from lvlm_probe.study.results import Results
from lvlm_probe.study.run.units import digest, method_content
from lvlm_probe.study.tables.cells import filter_notes
from lvlm_probe.study.tables.export import state
from lvlm_probe.study.tables.ledger import ledger
from lvlm_probe.study.tables.paper import TABLES, make_table
from lvlm_probe.study.tables.table import Cell, Table


def document(results: Results, *, command: str, annotations: Path | None = None) -> str:
    """The document.

    Args:
        results: of the study.
        command: what makes the document, for its first lines.
        annotations: for Figure 5, a csv of judgements.

    Returns:
        Markdown. A table that cannot be made is there with the reason.
    """
    study = results.study
    versions = ", ".join(f"{name} {at}" for name, at in versions_of("lvlm-probe", "torch", "transformers").items())
    parts = [
        f"# {markdown_text(study.name[:1].upper() + study.name[1:])}",
        f"Made by {_code(command)} on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, with {versions}.",
    ]
    if study.about:
        parts.append(markdown_text(study.about))
    parts += [_run(results), *_specification(results)]
    for name in [*TABLES, "figure5"]:
        title = f"Table {name}" if name in TABLES else "Figure 5"
        try:
            parts.append(_section(results, make_table(results, name, annotations=annotations)))
        except ProbeError as error:
            parts.append(f"## {title}\n\nNot made: {markdown_text(str(error))}.")
    made = ledger(results)
    parts.append(
        f"## {markdown_text(made.title)}\n\nEvery number of the paper, beside what this study found as the published "
        f"code does and as the paper's formulas say. {markdown_text(made.notes[0])}\n\n<details><summary>"
        f"{len(made.rows)} numbers</summary>\n\n{made.pipes()}\n\n</details>"
    )
    return "\n\n".join(parts) + "\n"


def _section(results: Results, made: Table) -> str:
    said = set(filter_notes(results))  # once, at the top
    return "\n\n".join(
        [
            f"## {markdown_text(made.title)}",
            made.pipes(),
            *(markdown_text(note) for note in made.notes if note not in said),
        ]
    )


def _run(results: Results) -> str:
    """How many units, what they took, and on what."""
    found = state(results)
    answered = [record["status"] for record in results.answers]
    unique = {record["key"]: record for record in results.maps}.values()  # rows that ask for the same share one
    maps = [record for record in unique if record["status"] == "done"]
    empty = sum(record["map"] is None for record in maps)
    units = [*results.answers, *unique]
    processor = _sum(units, "processor_seconds")
    machines = Counter(name for record in units if (name := (record.get("measured") or {}).get("machine")))
    took = "not noted"
    if processor:
        took = (
            f"{_sum(units, 'unit_seconds') / 60:.1f} minutes one after the other, "
            f"{processor / 60:.1f} minutes of processor time, judging included"
        )
    lines = [
        f"**Run.** {counted(answered.count('done'), 'answer')} ({answered.count('failed')} failed) and "
        f"{counted(len(maps) - empty, 'map')} ({empty} without values, {len(unique) - len(maps)} failed, "
        f"{_wanted(results) - len(unique)} to do), "
        f"on {markdown_text('; '.join(name for name, _ in machines.most_common())) or 'a machine that was not noted'}. "
        f"The units took: {took}."
    ]
    if found["reasons"]:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in found["reasons"].items())
        lines.append(f"What failed or is empty, over all rows: {markdown_text(reasons)}.")
    return "\n\n".join(lines)


def _wanted(results: Results) -> int:
    """Distinct maps of the samples that the filter keeps."""
    study = results.study
    rows = {digest(method_content(study, spec)) for spec in study.methods.values()}
    return len(study.models) * len(rows) * sum(len(kept) for kept in results.kept.values())


def _sum(records: Iterable[Mapping[str, Any]], name: str) -> float:
    return sum(float((record.get("measured") or {}).get(name) or 0.0) for record in records)


def _specification(results: Results) -> list[str]:
    study = results.study
    models: list[tuple[Cell, ...]] = [
        (name, spec.source, spec.dtype, spec.size, spec.vision) for name, spec in study.models.items()
    ]
    datasets: list[tuple[Cell, ...]] = []
    for name, data in study.datasets.items():
        kept, dropped = len(results.kept.get(name, ())), len(results.dropped.get(name, {}))
        datasets.append((name, data.reader, data.source, kept + dropped, kept))
    settings = study.settings
    return [
        Table("models", "", ("model", "source", "weights", "decoder, billions", "vision"), tuple(models)).pipes(),
        Table("datasets", "", ("data set", "reader", "source", "samples", "kept"), tuple(datasets)).pipes(),
        f"Greedy answers of at most {settings.max_new_tokens} tokens; maps of the tokens with a log-likelihood ratio "
        f"over {settings.alpha:g} against the {markdown_text(settings.baseline)} baseline, where a row does not say "
        f"otherwise; seed {settings.seed}.",
        "\n".join(f"* {markdown_text(note)}" for note in filter_notes(results)),
    ]


def _code(text: str) -> str:
    """A text as code where it can be, as text where it would end the code before its time or hold a tag."""
    return markdown_text(text) if re.search(r"[`<>&\n\r]", text) else f"`{text}`"
