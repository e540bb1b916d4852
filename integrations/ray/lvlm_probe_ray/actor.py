"""A worker: a process somewhere in the cluster that holds one model and does one unit after the other."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lvlm_probe.errors import ProbeError, StudyError
from lvlm_probe.files import write_whole
from lvlm_probe.models.fingerprint import fingerprint, library_versions
from lvlm_probe.study.datasets.registry import Sample
from lvlm_probe.study.run.runner import Worker
from lvlm_probe.study.run.units import digest, map_content
from lvlm_probe.study.spec import Study
from lvlm_probe_ray.jobs import About, Job, Outcome, Task

__all__ = ["Beacon", "UnitWorker", "keep_files", "loaded_sample", "map_units", "read_files", "without_image"]


class Beacon:
    """A file in the study's directory by which workers tell whether they see that directory, or another of its name."""

    def __init__(self, directory: Path) -> None:
        self.content = secrets.token_hex(16)
        self.path = directory / f"{self.content[:8]}.ray.part"
        directory.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.content, encoding="utf-8")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class UnitWorker:
    """Does tasks. Where it does not see the study's directory, it works in one of its own and sends files back.

    Args:
        study: with paths that are absolute.
        beacon: path and content of the study's :class:`Beacon`; ``None``: do as if it were not seen.
        retry_failed: do units again that have failed before.
    """

    def __init__(self, study: Study, beacon: tuple[str, str] | None, *, retry_failed: bool) -> None:
        self._shared = beacon is not None and _sees(*beacon)
        self._out = study.out
        if not self._shared:
            self._out = Path(tempfile.mkdtemp(prefix="lvlm-probe-ray-"))
            study = dataclasses.replace(study, out=self._out)
        self._worker = _Checked(study, retry_failed=retry_failed)

    def about(self) -> About:
        """Who this is; the first call returns when the process is up."""
        import ray

        node = str(ray.get_runtime_context().get_node_id())
        return About(socket.gethostname(), os.getpid(), node, self._shared, library_versions())

    def work(self, task: Task) -> Outcome:
        """Does a task. Whatever goes wrong is in what it returns."""
        try:
            keep_files(self._out, task.files)
            return self._work(task)
        except Exception as error:
            text = str(error) if isinstance(error, ProbeError) else f"{type(error).__name__}: {error}"
            return Outcome(trouble=text)
        finally:
            if not self._shared:
                for name in ("answers", "maps"):
                    for path in (self._out / name).iterdir():
                        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _work(self, task: Task) -> Outcome:
        job, worker = task.job, self._worker
        found = worker.hold(job.model, task.fingerprint)
        started = time.time()
        if job.sample is None:
            return Outcome(fingerprint=found, started=started, ended=time.time())
        if job.kind == "answer":
            worker.answer(job.model, job.dataset, job.sample)
            units = [("answers", job.key)]
        else:
            missing = worker.missing_rows(job.key)
            worker.make_maps(job.model, job.key, [row for row in job.rows if row in missing], job.sample)
            units = [("maps", unit) for unit in map_units(worker.study, job)]
        records = [(worker.answers if kind == "answers" else worker.maps).read(key) for kind, key in units]
        if None in records:
            # Keys are made of picture, question and settings, which came with the task: they differ by version alone.
            raise StudyError(f"{socket.gethostname()} makes other units of this study: install the same version there")
        files: dict[str, bytes] = {}
        for kind, key in units:
            files |= read_files(self._out, kind, key, records_only=self._shared)
        failed = sum(record["status"] == "failed" for record in records if record is not None)
        return Outcome(files, failed, started=started, ended=time.time())


class _Checked(Worker):
    """A worker that knows the fingerprint of every model, and refuses other weights of the same name."""

    def __init__(self, study: Study, *, retry_failed: bool) -> None:
        super().__init__(study, retry_failed=retry_failed)
        self._checked: tuple[str, str] | None = None

    def hold(self, name: str, expected: str | None) -> str:
        """Loads a model unless it is held; returns its fingerprint.

        Raises:
            StudyError: it cannot be loaded, or its weights are not the expected ones.
        """
        if self._checked is None or self._checked[0] != name:
            self._checked = None
            model, _ = self.model(name)
            self._checked = (name, fingerprint(model))
        found = self._checked[1]
        if expected is not None and found != expected:
            raise StudyError(
                f"model {name} has other weights on {socket.gethostname()} (fingerprint {found[:12]}…, the study's is "
                f"{expected[:12]}…); copy the same checkpoint to every machine, or, where the weights were meant to "
                f"change, delete the folder models of the study"
            )
        return found

    def fingerprint(self, name: str) -> str:
        if self._checked is None or self._checked[0] != name:
            return self.hold(name, None)
        return self._checked[1]


def map_units(study: Study, job: Job) -> list[str]:
    """Keys of the maps of a job."""
    return [digest(map_content(study, job.key, study.methods[row])) for row in job.rows]


def read_files(directory: Path, kind: str, key: str, *, records_only: bool = False) -> dict[str, bytes]:
    """What is there of a unit, by path relative to the study's directory."""
    suffixes = (".json",) if records_only else (".h5", ".heat.h5", ".json")
    paths = [directory / kind / f"{key}{suffix}" for suffix in suffixes]
    return {f"{kind}/{path.name}": path.read_bytes() for path in paths if path.is_file()}


def keep_files(directory: Path, files: Any, *, unless_there: Iterable[str] = ()) -> None:
    """Writes files of units, each whole or not at all, and records last: what they name is there before them.

    Args:
        files: path relative to the directory → content.
        unless_there: those of them that are left alone where there is such a file.

    Raises:
        StudyError: the disk is full, or the directory cannot be written to.
    """
    spared = set(unless_there)
    for name in sorted(files, key=lambda name: name.endswith(".json")):
        path = directory / name
        if name in spared and path.is_file():
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, files[name])
        except OSError as error:
            raise StudyError(f"{path} cannot be written: {error}; free some space and resume") from error


def loaded_sample(sample: Sample) -> Sample:
    """A sample that can be sent: its picture in memory, or the reason why it cannot be opened."""
    try:
        return dataclasses.replace(sample, load=_Given(sample.image.copy()))
    except Exception as error:
        kind: type[Exception] = type(error)
        try:
            kind(str(error))
        except Exception:  # an error that is made of more than its sentence
            kind = StudyError
        return dataclasses.replace(sample, load=_Given(None, kind, str(error)))


def without_image(sample: Sample) -> Sample:
    """A sample that can be sent where its picture is not needed: maps are made from the answer's trace."""
    return dataclasses.replace(sample, load=_Given(None, StudyError, "the picture was not sent"))


@dataclasses.dataclass(frozen=True)
class _Given:
    """A picture, or the error that there is instead of one; opened on a worker, it does as on the disk it came from."""

    picture: Any
    error: type[Exception] = StudyError
    reason: str = ""

    def __call__(self) -> Any:
        if self.picture is None:
            raise self.error(self.reason)
        return self.picture


def _sees(path: str, content: str) -> bool:
    try:
        return Path(path).read_text(encoding="utf-8") == content
    except (OSError, UnicodeDecodeError):
        return False
