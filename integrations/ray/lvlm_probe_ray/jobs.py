"""What goes between the process that was started and its workers: jobs, tasks, outcomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lvlm_probe.study.datasets.registry import Sample

__all__ = ["About", "Job", "Lost", "Outcome", "Task"]


@dataclass(frozen=True, eq=False)
class Job:
    """Work for one worker: an answer, or the maps of one answer that are missing.

    Attributes:
        kind: ``fingerprint`` of a model, ``answer``, or ``maps``.
        model, dataset, sample: Of the study; the sample's picture is not loaded.
        key: Of the answer.
        rows: Rows of the tables that maps are missing for.
        attempt: 1 the first time; one more after every worker that was lost with it.
        last: Whether the sample is finished with it.
    """

    kind: Literal["fingerprint", "answer", "maps"]
    model: str
    dataset: str = ""
    sample: Sample | None = None
    key: str = ""
    rows: tuple[str, ...] = ()
    attempt: int = 1
    last: bool = True

    def again(self) -> list[Job]:
        """What to do after its worker was lost: maps one by one, so that the one that may be to blame stands alone."""
        rows: list[tuple[str, ...]] = [(row,) for row in self.rows] or [()]
        return [
            dataclasses.replace(self, rows=part, attempt=self.attempt + 1, last=self.last and number == len(rows))
            for number, part in enumerate(rows, start=1)
        ]

    def __str__(self) -> str:
        if self.kind == "fingerprint":
            return f"model {self.model}"
        sample = "" if self.sample is None else self.sample.id
        if self.kind == "answer":
            return f"{self.model} answers {self.dataset} {sample}"
        return f"maps for {self.model}, {self.dataset} {sample}"


@dataclass(frozen=True)
class Task:
    """A job as it is sent.

    Attributes:
        job: With the sample's picture in memory.
        fingerprint: Of the model that the worker must hold; ``None`` where the worker is to find it out.
        files: Path relative to the study's directory → content, of what a worker without that directory needs.
    """

    job: Job
    fingerprint: str | None
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a worker says of a job.

    Attributes:
        files: Path relative to the study's directory → content: the records, and from a worker without that directory
            all that belongs to them.
        failed: Units among them that failed, for a reason that their records hold.
        fingerprint: Of the model, where it was asked for.
        trouble: Why this worker cannot do such a job at all (a model that is not there, a disk that is full).
        started, ended: Seconds since 1970 on the worker's clock; the loading of the model lies before.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    failed: int = 0
    fingerprint: str | None = None
    trouble: str | None = None
    started: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True)
class Lost:
    """Instead of an outcome: every worker that had the job was lost."""

    reason: str


@dataclass(frozen=True)
class About:
    """Who a worker is.

    Attributes:
        host, pid: Name of its machine, and its process there.
        node: Ray's name of the machine.
        shared: Whether it sees the study's directory.
        versions: Of the libraries that results depend on.
    """

    host: str
    pid: int
    node: str
    shared: bool
    versions: Mapping[str, str]
