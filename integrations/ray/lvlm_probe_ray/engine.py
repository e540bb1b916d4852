"""A study's units through a pool of workers: first all answers, then, with the filter known, the maps.

This process reads the data sets, says which units are missing, and keeps the books; it loads no model. Keys are made of
content, and a finished unit is a file, so a run that was stopped goes on where it was, here or with another engine.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.errors import ProbeWarning, StudyError
from lvlm_probe.models.fingerprint import library_versions
from lvlm_probe.study.datasets.registry import Sample
from lvlm_probe.study.run.runner import Told, Worker, samples_of
from lvlm_probe.study.spec import Study
from lvlm_probe_ray.actor import Beacon, UnitWorker, keep_files, loaded_sample, map_units, read_files, without_image
from lvlm_probe_ray.cluster import connected, has_gpus, room_for
from lvlm_probe_ray.jobs import About, Job, Lost, Outcome, Task
from lvlm_probe_ray.options import Need, read_options

if TYPE_CHECKING:
    from lvlm_probe_ray.pool import Pool

__all__ = ["LOG", "WorkerLost", "run"]

LOG = "workers.jsonl"
"""In the study's directory: one line per job, with who did it and when."""


class WorkerLost(StudyError):
    """Every worker that was given a unit was lost with it."""


class _Books(Worker):
    """Keys and records of a study, and its failures; instead of a model it has the reason why there is none."""

    reason = ""

    def model(self, name: str) -> tuple[Any, Any]:
        raise WorkerLost(self.reason)

    def answered(self, key: str) -> bool:
        return self._finished(self.answers, key)


def run(
    study: Study,
    *,
    limit: int | None = None,
    shard: tuple[int, int] = (0, 1),
    retry_failed: bool = False,
    tell: Callable[[Told], None] | None = None,
) -> Counter[str]:
    """See :func:`lvlm_probe_ray.run_study_on_ray`."""
    if not (0 <= shard[0] < shard[1]):
        raise StudyError(f"shard i/n is 0/n to {shard[1] - 1}/n; got {shard[0]}/{shard[1]}")
    samples = {name: list(samples_of(study, name, limit=limit, shard=shard)) for name in study.datasets}
    with ExitStack() as stack:
        return _Run(study, samples, stack, retry_failed=retry_failed, tell=tell).run()


class _Run:
    """One run. The cluster is asked for only when there is something to do."""

    def __init__(
        self,
        study: Study,
        samples: dict[str, list[Sample]],
        stack: ExitStack,
        *,
        retry_failed: bool,
        tell: Callable[[Told], None] | None,
    ) -> None:
        self.study = dataclasses.replace(study, out=study.out.absolute())
        self.samples, self.stack, self.tell = samples, stack, tell
        self.options = read_options(study.engine_options, study.models)
        self.books = _Books(study, retry_failed=retry_failed)
        self.counts: Counter[str] = Counter()
        self.done = 0
        self.total = 2 * len(study.models) * sum(len(found) for found in samples.values())
        self.pool: tuple[Need, Pool] | None = None
        self.beacon: Beacon | None = None
        self.other_versions: set[str] = set()

    def run(self) -> Counter[str]:
        unknown = [name for name in self.study.models if not self.books.knows(name)]
        self._do(unknown, lambda name: [Job("fingerprint", name)])
        names = list(self.study.models)
        self._do(names, self._answers)
        # The model that answered last is still in memory: its maps first.
        self._do(names[::-1], self._maps)
        return self.counts

    # ------------------------------------------------------------------ what is to be done

    def _answers(self, name: str) -> Iterator[Job]:
        for dataset, found in self.samples.items():
            for sample in found:
                key, _ = self.books.answer_key(name, dataset, sample)
                job = Job("answer", name, dataset, sample, key)
                if self.books.answered(key):
                    self.counts["finished"] += 1
                    self._advance(job)
                else:
                    yield job

    def _maps(self, name: str) -> Iterator[Job]:
        for dataset, found in self.samples.items():
            for sample in found:
                rows = self.books.missing_maps(name, dataset, sample)
                job = Job("maps", name, dataset, sample, self.books.answer_key(name, dataset, sample)[0], tuple(rows))
                if rows:
                    yield job
                else:
                    self._advance(job)

    def _do(self, names: Sequence[str], jobs_of: Callable[[str], Iterable[Job]]) -> None:
        """Does the jobs of models. Neighbours whose workers need the same of a machine share a pool."""
        for _, group in itertools.groupby(names, key=lambda name: self.options.need(name, gpus=True)):
            jobs = itertools.chain.from_iterable(map(jobs_of, group))
            first = next(jobs, None)
            if first is not None:
                for job, outcome, about in self._pool_for(first.model).run(itertools.chain([first], jobs), self._pack):
                    self._keep(job, outcome, about)

    def _pack(self, job: Job, about: About) -> Task:
        """What a worker is sent: for an answer the picture, for maps the answer's trace where it cannot see it."""
        if job.sample is None:
            return Task(job, None)
        files: dict[str, bytes] = {}
        if job.kind == "maps" and not about.shared:
            files = read_files(self.study.out, "answers", job.key)
            for unit in map_units(self.study, job):
                files |= read_files(self.study.out, "maps", unit)
        sample = loaded_sample(job.sample) if job.kind == "answer" else without_image(job.sample)
        return Task(dataclasses.replace(job, sample=sample), self.books.fingerprint(job.model), files)

    # ------------------------------------------------------------------ what comes back

    def _keep(self, job: Job, outcome: Outcome | Lost, about: About) -> None:
        self._log(job, outcome, about)
        self._compare_versions(about)
        if isinstance(outcome, Lost):
            self._keep_lost(job, outcome.reason)
        elif job.kind == "fingerprint":
            self.books.keep_fingerprint(job.model, str(outcome.fingerprint))
        else:
            # On shared storage the files are there already. A record comes along all the same: what one machine has
            # written, another may see with a delay, and the filter is about to read it.
            keep_files(self.study.out, outcome.files, unless_there=outcome.files if about.shared else ())
            self._count(job, outcome.failed)
        if job.kind != "fingerprint" and job.last:
            self._advance(job)

    def _keep_lost(self, job: Job, reason: str) -> None:
        if job.sample is None:
            raise StudyError(f"model {job.model} cannot be loaded: {reason}")
        self.books.reason = reason
        if job.kind == "answer":
            made = int(self.books.answer(job.model, job.dataset, job.sample))
        else:
            rows = [row for row in self.books.missing_rows(job.key) if row in job.rows]
            self.books.make_maps(job.model, job.key, rows, job.sample)
            made = len(rows)
        self._count(job, made)

    def _count(self, job: Job, failed: int) -> None:
        self.counts["answers" if job.kind == "answer" else "maps"] += len(job.rows) or 1
        if failed:
            self.counts["failed"] += failed

    def _log(self, job: Job, outcome: Outcome | Lost, about: About) -> None:
        line: dict[str, Any] = {
            "job": job.kind,
            "model": job.model,
            "dataset": job.dataset,
            "sample": None if job.sample is None else job.sample.id,
            "answer": job.key,
            "rows": list(job.rows),
            "attempt": job.attempt,
            "host": about.host,
            "pid": about.pid,
            "node": about.node,
            "shared": about.shared,
        }
        if isinstance(outcome, Lost):
            line["lost"] = outcome.reason
        else:
            line |= {"started": outcome.started, "ended": outcome.ended, "failed": outcome.failed}
        try:
            with (self.study.out / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise StudyError(
                f"{self.study.out / LOG} cannot be written: {error}; free some space and resume"
            ) from error

    def _compare_versions(self, about: About) -> None:
        here = library_versions()
        other = sorted(name for name in {*here, *about.versions} if here.get(name) != about.versions.get(name))
        if other and about.host not in self.other_versions:
            self.other_versions.add(about.host)
            pairs = ", ".join(f"{name} {about.versions.get(name)} (here {here.get(name)})" for name in other)
            warnings.warn(f"{about.host} has {pairs}: its numbers may differ", ProbeWarning, stacklevel=2)

    def _advance(self, job: Job) -> None:
        self.done += 1
        if self.tell is not None:
            self.tell(Told(self.done, self.total, self.counts["failed"], str(job)))

    # ------------------------------------------------------------------ who does it

    def _pool_for(self, model: str) -> Pool:
        """Workers that can hold a model: those that are there, or others in their place."""
        if self.beacon is None:
            self.stack.enter_context(connected(self.options))
            self.beacon = Beacon(self.study.out)
            self.stack.callback(self.beacon.remove)
        from lvlm_probe_ray.pool import Pool

        need = self.options.need(model, gpus=has_gpus())
        if self.pool is not None and self.pool[0] == need:
            return self.pool[1]
        if self.pool is not None:
            self.pool[1].close()
        pool = Pool(
            self._maker(need, self.beacon),
            workers=self.options.workers or room_for(need),
            minimum=self.options.min_workers,
            attempts=self.options.attempts,
            describe=str(need),
        )
        self.stack.callback(pool.close)
        self.pool = (need, pool)
        return pool

    def _maker(self, need: Need, beacon: Beacon) -> Callable[[], Any]:
        import ray

        settings: dict[str, Any] = {"num_cpus": need.cpus, "num_gpus": need.gpus, "scheduling_strategy": "SPREAD"}
        if self.options.runtime_env:
            settings["runtime_env"] = dict(self.options.runtime_env)
        # Started again wherever there is room, as often as needed; why calls are not repeated: see `pool`.
        remote = ray.remote(max_restarts=-1, max_task_retries=0, **settings)(UnitWorker)
        seen = None if self.options.shared is False else (str(beacon.path), beacon.content)
        # Workers stand in another directory than this process.
        models = {name: dataclasses.replace(spec, source=_absolute(self.study.located(spec.source)))
                  for name, spec in self.study.models.items()}  # fmt: skip
        study = dataclasses.replace(self.study, models=models)
        return lambda: remote.remote(study, seen, retry_failed=self.books.retry_failed)


def _absolute(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.absolute()) if source != "demo" and path.is_dir() else source
