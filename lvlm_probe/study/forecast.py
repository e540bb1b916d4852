"""Forecast of a study: units, passes, and after one measured sample per model memory and hours.

Without a model nothing is measured: units are counted and passes are what methods ask for. ``measure`` loads each
model, lets it answer one sample of each data set (a unit of the study, kept as such) and plans every row on it
(``planning``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lvlm_probe import planning
from lvlm_probe.errors import ProbeError
from lvlm_probe.explainers.registry import Problem, cost_of
from lvlm_probe.planning.rehearsal import timed
from lvlm_probe.replaying import Replay
from lvlm_probe.study.datasets.registry import Sample
from lvlm_probe.study.results import collect
from lvlm_probe.study.run.runner import Worker, samples_of
from lvlm_probe.study.run.sample_filter import verdict
from lvlm_probe.study.run.unit_work import open_replay
from lvlm_probe.study.run.units import digest, method_content
from lvlm_probe.study.spec import MethodSpec, Study
from lvlm_probe.study.tables.table import Cell, Table

SIDE = 448
"""Pixels of the square image that passes are counted for where no sample has been measured."""


@dataclass(frozen=True)
class Line:
    """The maps of one row on one data set by one model.

    Attributes:
        model, dataset: names.
        rows: names of the rows that ask for these maps; they are made once.
        maps: how many there are if every sample passes the filter.
        forward, backward: images through the model per map, at most; ``None``: not known.
        judging: images, forward, to score a map, at least.
        peak, total: bytes beside the weights, and with them; ``None`` before a measurement.
        seconds, judging_seconds: per map, on the machine that it was measured on.
        problem: why it cannot be said, or will not run.
        at_least: forward and backward of a map that is good enough at once; ``None``: all take the same.
    """

    model: str
    dataset: str
    rows: tuple[str, ...]
    maps: int
    forward: int | None
    backward: int | None
    judging: int
    peak: int | None = None
    total: int | None = None
    seconds: float | None = None
    judging_seconds: float | None = None
    problem: str | None = None
    at_least: tuple[int, int] | None = None

    @property
    def passes(self) -> tuple[int | None, int | None, tuple[int, int] | None]:
        """Forward, backward, and the fewest of both."""
        return self.forward, self.backward, self.at_least

    @property
    def hours(self) -> float | None:
        """Hours of all its maps, judged; ``None`` before a measurement."""
        if self.seconds is None or self.judging_seconds is None:
            return None
        return self.maps * (self.seconds + self.judging_seconds) / 3600


@dataclass(frozen=True)
class Forecast:
    """Forecast of a study.

    Attributes:
        samples: data set → number of its samples.
        unreadable: data set → why it cannot be opened.
        models: number of models.
        kept: data set → (samples that pass the filter, samples that all models have answered), as far as is known.
        answer_seconds: (model, data set) → seconds of one answer.
        lines: see ``Line``.
    """

    samples: Mapping[str, int]
    unreadable: Mapping[str, str]
    models: int
    kept: Mapping[str, tuple[int, int]]
    lines: tuple[Line, ...]
    answer_seconds: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def answers(self) -> int:
        """All that will be asked for."""
        return self.models * sum(self.samples.values())

    @property
    def maps(self) -> int:
        """All of them, if every sample passes the filter."""
        return sum(line.maps for line in self.lines)

    def hours(self, *, filtered: bool = False) -> float | None:
        """Hours of the whole study, answers included, one unit after the other; ``None`` where something is not known.

        Args:
            filtered: scale the maps of each data set by the share of its samples that has passed the filter so far.
        """
        if not self.lines or any(line.hours is None and line.problem is None for line in self.lines):
            return None
        total = sum(seconds * self.samples[dataset] for (_, dataset), seconds in self.answer_seconds.items()) / 3600
        for line in self.lines:
            passed, known = self.kept.get(line.dataset, (0, 0))
            total += (line.hours or 0.0) * (passed / known if filtered and known else 1.0)
        return total

    def table(self) -> Table:
        """One line per model, data set and distinct row; columns of what nothing was measured of are left out."""
        rows: list[tuple[Cell, ...]] = []
        for line in self.lines:
            passes = "not known" if line.forward is None else planning.passes_text(*line.passes)
            memory = (None if size is None else planning.show_bytes(size) for size in (line.peak, line.total))
            head = (line.model, line.dataset, " = ".join(line.rows), line.maps, passes, line.judging)
            rows.append((*head, *memory, line.seconds, line.hours, line.problem or ""))
        columns = (
            "model",
            "data set",
            "method",
            "maps",
            "passes",
            "judging",
            "peak beside weights",
            "with weights",
            "seconds per map",
            "hours",
            "",
        )
        known = [
            place for place in range(len(columns)) if place < 6 or any(row[place] not in (None, "") for row in rows)
        ]
        return Table(
            "plan",
            "",
            tuple(columns[place] for place in known),
            tuple(tuple(row[place] for place in known) for row in rows),
            labels=3,
        )

    def sentences(self) -> list[str]:
        """Say what the table adds up to, and how far it can be believed."""
        said = [
            f"{name}: {count} samples" + (f", {passed} of {known} answered so far pass the filter" if known else "")
            for name, count in self.samples.items()
            for passed, known in [self.kept.get(name, (0, 0))]
        ]
        said += [f"{name} cannot be opened: {reason}" for name, reason in self.unreadable.items()]
        said.append(
            f"{self.answers} answers, and at most {self.maps} maps: one per answer that passes the filter and distinct "
            "row. Passes: images through the model per map, forward + backward; judging takes about as many more, "
            "forward, and again where a row is judged alike."
        )
        if any(line.at_least is not None for line in self.lines):
            said.append(
                "Where passes are a range, a map takes as many as it needs; seconds and hours are those of the most."
            )
        hours = self.hours()
        if hours is None:
            said.append(
                f"Nothing was measured: passes are for a square image of {SIDE} pixels. --measure loads the models "
                "and says what memory and time it takes."
            )
        else:
            known = any(count for _, count in self.kept.values())
            likely = f", and {self.hours(filtered=True):.3g} at the filter's present rate" if known else ""
            said.append(
                f"The whole study: at most {hours:.3g} hours on this machine, one unit after the other{likely}: "
                "measured on one sample of each data set per model. --shard divides it by the number of machines."
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "samples": dict(self.samples),
            "unreadable": dict(self.unreadable),
            "answers": self.answers,
            "maps": self.maps,
            "hours": self.hours(),
            "hours_at_present_rate": self.hours(filtered=True),
            "lines": [{**dataclasses.asdict(line), "hours": line.hours} for line in self.lines],
        }


def forecast(
    study: Study, *, measure: bool = False, memory: int | str | None = None, limit: int | None = None
) -> Forecast:
    """Predict what a study will take.

    Args:
        measure: load every model and measure one sample of each data set on it.
        memory: what there is, weights included, as for ``plan``; by default what the device has free.
        limit: at most so many samples of each data set.
    """
    first: dict[str, Sample] = {}
    samples: dict[str, int] = {}
    unreadable: dict[str, str] = {}
    worker = Worker(study) if measure or (study.out / "models").is_dir() else None
    kept = {} if worker is None else _kept(study)
    for name in study.datasets:
        try:
            found = list(samples_of(study, name, limit=limit))
        except ProbeError as error:
            unreadable[name] = str(error)
            continue
        samples[name] = len(found)
        if found:
            first[name] = found[0]
    lines: list[Line] = []
    seconds: dict[tuple[str, str], float] = {}
    for model in study.models:
        for dataset, sample in first.items():
            base = list(_lines(study, model, dataset, samples[dataset]))
            if measure and worker is not None:
                base, answered = _measured(worker, base, sample, memory)
                if answered is not None:
                    seconds[model, dataset] = answered
            lines += base
    if worker is not None:
        worker.release()
    return Forecast(samples, unreadable, len(study.models), kept, tuple(lines), seconds)


def _lines(study: Study, model: str, dataset: str, count: int) -> Iterator[Line]:
    """Nothing measured yet; rows that ask for the same maps together."""
    groups: dict[str, list[str]] = {}
    for name, spec in study.methods.items():
        groups.setdefault(digest(method_content(study, spec)), []).append(name)
    for names in groups.values():
        forward, backward, least = _passes(study.methods[names[0]])
        judging = 2 * study.settings.steps
        yield Line(model, dataset, tuple(names), count, forward, backward, judging, at_least=least)


def _passes(spec: MethodSpec) -> tuple[int | None, int | None, tuple[int, int] | None]:
    selection: Any = None  # no words are needed to say how many passes a method takes
    try:
        cost = cost_of(spec.method, Problem(_Square(), selection), spec.params)  # type: ignore[arg-type]
    except (AttributeError, TypeError, KeyError):  # the rule asks the recording, and there is none
        return None, None, None
    return cost.forward, cost.backward, cost.at_least


class _Square:
    """Stands where costs look at the replay: a square image, and no recording."""

    image_sizes = ((SIDE, SIDE),)
    trace = None


def _measured(
    worker: Worker, lines: Sequence[Line], sample: Sample, memory: int | str | None
) -> tuple[list[Line], float | None]:
    """The lines with what a plan on one sample says, and seconds of its answer."""
    model, dataset = lines[0].model, lines[0].dataset

    def stuck(reason: str) -> tuple[list[Line], None]:
        return [dataclasses.replace(line, problem=reason) for line in lines], None

    try:
        worker.answer(model, dataset, sample)
        key, _ = worker.answer_key(model, dataset, sample)
        record = worker.answers.read(key)
        if record is None or record["status"] != "done":
            return stuck(f"sample {sample.id} has no answer: {None if record is None else record['reason']}")
        player = open_replay(worker.answers.path(key, ".h5"), *worker.model(model))
        call, each = timed(player, gradient=False)
    except (ProbeError, OSError) as error:
        return stuck(str(error))
    return [_planned(worker.study, player, line, call + each, memory) for line in lines], record["measured"]["seconds"]


def _planned(study: Study, player: Replay, line: Line, one_pass: float, memory: int | str | None) -> Line:
    spec = study.methods[line.rows[0]]
    try:
        found = planning.plan(player, memory=memory, **spec.asked)
    except ProbeError as error:
        return dataclasses.replace(line, problem=str(error))
    return dataclasses.replace(
        line,
        forward=found.forward,
        backward=found.backward,
        at_least=found.at_least,
        peak=found.peak,
        total=found.total,
        seconds=0.0 if found.forward == 0 else found.seconds,
        judging_seconds=line.judging * one_pass,
        problem="; ".join(found.notes) or None,
    )


def _kept(study: Study) -> dict[str, tuple[int, int]]:
    """Per data set: samples that pass the filter, and samples that every model has answered, so far."""
    by_sample: dict[tuple[str, str], dict[str, Any]] = {}
    for record in collect(study).answers:
        by_sample.setdefault((record["dataset"], record["sample"]), {})[record["model"]] = record
    kept = dict.fromkeys(study.datasets, (0, 0))
    for (dataset, _), found in by_sample.items():
        if len(found) == len(study.models):
            passed, known = kept[dataset]
            kept[dataset] = passed + (verdict(study, found) is None), known + 1
    return kept
