"""The finished units of a study, as flat records: what every table, page and export is made from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lvlm_probe.study.run.sample_filter import is_correct, verdict
from lvlm_probe.study.run.units import UNSAID, Records, method_content, model_content, model_stamp
from lvlm_probe.study.spec import ModelSpec, Study

_UNKNOWN = dict.fromkeys(("true_answer", "group", "drop", "drop_normalised", "map", "deletion", "insertion"))
"""Entries that a record may lack."""


@dataclass(frozen=True)
class Results:
    """The finished units of a study, as its specification stands now.

    Attributes:
        study: the specification.
        answers: One record per (dataset, sample, model): what ``answer_unit`` returned, with ``model``, ``dataset``,
            ``sample``, ``question``, ``true_answer``, ``group``, ``status``, ``correct`` (``None``: no rule can tell).
        maps: One record per (dataset, sample, model, row): what ``map_unit`` returned, with these four names,
            ``status``, and ``correct`` of its answer. A row is a name under ``methods``.
        kept: dataset → ids of the samples that pass the filter, in order of id.
        dropped: dataset → sample id → why the filter drops it.
    """

    study: Study
    answers: tuple[Mapping[str, Any], ...]
    maps: tuple[Mapping[str, Any], ...]
    kept: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def maps_of(self, *, model: str | None = None, dataset: str | None = None, row: str | None = None) -> Iterator[Any]:
        """Maps of one model, data set, row, failed and empty ones too; ``None`` is any."""
        for record in self.maps:
            wanted = (model, record["model"]), (dataset, record["dataset"]), (row, record["row"])
            if all(name in (None, given) for name, given in wanted):
                yield record

    def chosen(self, *, model: str | None = None, dataset: str | None = None, row: str | None = None) -> Iterator[Any]:
        """Finished maps of one model, data set, row; ``None`` is any. Maps without values are not among them."""
        found = self.maps_of(model=model, dataset=dataset, row=row)
        return (record for record in found if record["status"] == "done" and record["map"] is not None)

    def skips(self, *, model: str | None = None, dataset: str | None = None, row: str | None = None) -> Counter[str]:
        """Count why maps are missing or empty: failures by error, empty maps by reason."""
        found: Counter[str] = Counter()
        for record in self.maps_of(model=model, dataset=dataset, row=row):
            if record["status"] == "failed":
                found[f"{record['error']}: {record['reason']}"] += 1
            elif record["map"] is None:
                found[str(record["reason"])] += 1
        return found


def collect(study: Study) -> Results:
    """Read the finished units that belong to the study as it stands: those of other settings are left aside.

    Raises:
        StudyError: a record is damaged.
    """
    fingerprints = {name: _fingerprint(study, spec) for name, spec in study.models.items()}
    wanted = {
        name: model_content(study, spec, known)
        for name, spec in study.models.items()
        if (known := fingerprints[name]) is not None
    }
    answers: dict[str, dict[str, Any]] = {}
    for key, record in Records(study.out / "answers"):
        expected = wanted.get(str(record.get("model")))
        if expected is None or record.get("dataset") not in study.datasets or not _holds(record, expected):
            continue
        record = {**_UNKNOWN, **record}
        correct = None
        if record["status"] == "done":
            correct = is_correct(record["answer"], record["true_answer"], record["choices"])
        answers[key] = {**record, "key": key, "correct": correct}
    rows = {name: method_content(study, spec) for name, spec in study.methods.items()}
    maps = []
    map_records = Records(study.out / "maps")
    for key, record in map_records:
        answer = answers.get(str(record.get("answer")))
        if answer is None:
            continue
        for name, expected in rows.items():
            if _holds({**UNSAID, **record}, expected):
                record = {**_UNKNOWN, **record}
                if record["status"] == "done":
                    map_records.require(key, record, *(["reason"] if record["map"] is None else ["passes", "measured"]))
                about = {field: answer[field] for field in ("model", "dataset", "sample", "group", "correct")}
                maps.append({**record, **about, "key": key, "row": name})
    kept, dropped = _filtered(study, answers.values())
    order = [sample for samples in kept.values() for sample in samples]
    place = {sample: number for number, sample in enumerate(order)}
    kept_maps = [record for record in maps if record["sample"] in kept.get(record["dataset"], ())]
    kept_maps.sort(key=lambda record: (record["dataset"], place[record["sample"]], record["model"], record["row"]))
    ordered = sorted(
        answers.values(), key=lambda record: (record["dataset"], _natural(record["sample"]), record["model"])
    )
    return Results(study, tuple(ordered), tuple(kept_maps), kept, dropped)


def _fingerprint(study: Study, model: ModelSpec) -> str | None:
    """Of a model's weights as a run has seen them: those of the files that are there now, and where these are not the
    ones of any run (a study copied to another machine), those seen last."""
    records = Records(study.out / "models")
    present = records.read(model_stamp(study, model))
    if present is not None and "fingerprint" in present:
        return str(present["fingerprint"])
    seen = [
        (records.path(key).stat().st_mtime_ns, str(record["fingerprint"]))
        for key, record in records
        if (record.get("model"), record.get("source")) == (model.name, model.source) and "fingerprint" in record
    ]
    return max(seen)[1] if seen else None


def _filtered(study: Study, answers: Any) -> tuple[dict[str, tuple[str, ...]], dict[str, dict[str, str]]]:
    by_sample: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in study.datasets}
    for record in answers:
        by_sample[record["dataset"]].setdefault(record["sample"], {})[record["model"]] = record
    kept: dict[str, tuple[str, ...]] = {}
    dropped: dict[str, dict[str, str]] = {}
    for dataset, samples in by_sample.items():
        reasons = {
            sample: verdict(study, {name: found.get(name) for name in study.models})
            for sample, found in sorted(samples.items(), key=lambda item: _natural(item[0]))
        }
        kept[dataset] = tuple(sample for sample, reason in reasons.items() if reason is None)
        dropped[dataset] = {sample: reason for sample, reason in reasons.items() if reason is not None}
    return kept, dropped


def _holds(record: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return all(name in record and record[name] == value for name, value in expected.items())


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Order in which sample 2 comes before sample 10."""
    parts = re.split(r"([0-9]+)", name)  # every second one is a number, compared by its length and then as text
    numbers = {place: part.lstrip("0") for place, part in enumerate(parts) if place % 2}
    return tuple((0, len(numbers[n]), numbers[n]) if n % 2 else (1, 0, part) for n, part in enumerate(parts))
