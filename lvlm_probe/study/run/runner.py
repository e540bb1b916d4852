"""Runner of a study: its units one after the other, without those that are finished.

All models answer first, one model in memory at a time; then the filter is known, and maps are made. Every finished unit
is kept at once: a study may be killed at any time and goes on where it was.
"""

from __future__ import annotations

import errno
import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lvlm_probe import demo
from lvlm_probe.errors import ReplayError, StudyError, chain_of
from lvlm_probe.files import causes
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.models.fingerprint import fingerprint
from lvlm_probe.models.loading import load
from lvlm_probe.replaying import Replay
from lvlm_probe.serving import JOURNAL, Server, connect
from lvlm_probe.study.datasets.registry import Sample, open_dataset
from lvlm_probe.study.run.sample_filter import verdict
from lvlm_probe.study.run.unit_work import answer_unit, map_unit, open_replay
from lvlm_probe.study.run.units import Records, answer_content, digest, image_digest, map_content, model_stamp
from lvlm_probe.study.run.word_maps import add_words
from lvlm_probe.study.spec import ModelSpec, Study

_log = logging.getLogger("lvlm_probe")

_NOT_THE_UNITS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)


class _NoModel(StudyError):
    """A model cannot be loaded: no unit's failure, but the study's."""


@dataclass(frozen=True)
class Told:
    """Progress of a run: units done and left in this run, and what is being done.

    Attributes:
        done, total, failed: Steps, one per model and sample for its answer, and one for its maps.
        what: A sentence.
        kind: ``answers`` or ``maps``.
        made: Units made in this step; those that were there are none.
        seconds: What they took, models not loaded; 0 where the engine does not say.
    """

    done: int
    total: int
    failed: int
    what: str
    kind: str = ""
    made: int = 0
    seconds: float = 0.0


class Worker:
    """A worker on single units of one study; holds one model at a time.

    Args:
        study: what to do.
        retry_failed: do units again that have failed before.

    Attributes:
        seconds: What all units took that were made so far, models not loaded.
        failed: Of those that were made so far, how many failed.
    """

    def __init__(self, study: Study, *, retry_failed: bool = False) -> None:
        self.study = study
        self.retry_failed = retry_failed
        self.seconds, self.failed = 0.0, 0
        self.answers = Records(study.out / "answers")
        self.maps = Records(study.out / "maps")
        self._models = Records(study.out / "models")
        self._held: tuple[str, Any, Any] | None = None
        self._prints: dict[str, str] = {}
        # By identity; the sample is held beside its digest, so that no other one can take its place in memory.
        self._images: dict[int, tuple[Sample, str]] = {}

    # ------------------------------------------------------------------ models

    def fingerprint(self, name: str) -> str:
        """Return the fingerprint of a model's weights. Loads it once, and again only when its files have changed.

        Raises:
            StudyError: it cannot be loaded.
        """
        if not self.knows(name):
            model, _ = self.model(name)
            self.keep_fingerprint(name, model.identity if isinstance(model, Server) else fingerprint(model))
        return self._prints[name]

    def knows(self, name: str) -> bool:
        """Tell whether a model's fingerprint is known without loading it."""
        if name not in self._prints:
            known = self._models.read(model_stamp(self.study, self.study.models[name]))
            if known is not None and "fingerprint" in known:
                self._prints[name] = str(known["fingerprint"])
        return name in self._prints

    def keep_fingerprint(self, name: str, value: str) -> None:
        """Take a model's fingerprint, as somebody found who has loaded it, for this run and later ones."""
        spec = self.study.models[name]
        record = {"model": name, "source": spec.source, "fingerprint": value}
        self._models.write(model_stamp(self.study, spec), record)
        self._prints[name] = value

    def model(self, name: str) -> tuple[Any, Any]:
        """A model and its processor; the one held before is let go first."""
        if self._held is None or self._held[0] != name:
            self.release()
            try:
                self._held = (name, *_load(self.study, self.study.models[name]))
            except (OSError, ValueError, ImportError, RuntimeError, ReplayError) as error:
                raise _NoModel(f"model {name} ({self.study.models[name].source}) cannot be loaded: {error}") from error
        return self._held[1], self._held[2]

    def release(self) -> None:
        """Let go of the model that is held."""
        if self._held is not None:
            if isinstance(self._held[1], Server):
                self._held[1].close()
            self._held = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    # ------------------------------------------------------------------ units

    def answer_key(self, name: str, dataset: str, sample: Sample) -> tuple[str, dict[str, Any]]:
        """Key and content of an answer. An image that cannot be opened has a key too, so that its failure is kept."""
        spec = self.study.models[name]
        content = answer_content(
            self.study,
            dataset,
            sample.id,
            spec,
            self.fingerprint(name),
            image=self._image(sample),
            question=sample.question,
        )
        return digest(content), content

    def _image(self, sample: Sample) -> str:
        """Digest of a sample's image. Every key of every model holds it, and it is taken once."""
        known = self._images.get(id(sample))
        if known is None or known[0] is not sample:
            try:
                settings = self.study.settings
                found = image_digest(sample.shown, sampling=(settings.num_frames, settings.fps))
            except Exception:
                found = "unreadable"
            known = self._images[id(sample)] = (sample, found)
        return known[1]

    def answer(self, name: str, dataset: str, sample: Sample) -> bool:
        """One answer; ``False`` when it was finished before."""
        key, content = self.answer_key(name, dataset, sample)
        if self._finished(self.answers, key):
            return False
        about = {"true_answer": sample.answer, "choices": list(sample.choices), "group": sample.group}
        about |= {name: sample.annotations[name] for name in ("set", "role") if name in sample.annotations}

        def work() -> dict[str, Any]:
            model, processor = self.model(name)
            trace_file = self.answers.path(key, ".h5")
            return answer_unit(self.study, model, processor, sample.shown, sample.question, trace_file)

        self._keep(self.answers, key, {**content, **about}, work)
        return True

    def missing_maps(self, name: str, dataset: str, sample: Sample) -> list[str]:
        """Rows of the tables whose map of this model's answer is still to be made; none where the filter drops it.

        Of rows that ask for the same map there is the first one.
        """
        key, _ = self.answer_key(name, dataset, sample)
        if self.kept(dataset, sample) is not None:
            return []
        return self.missing_rows(key)

    def missing_rows(self, key: str) -> list[str]:
        """Rows whose map of an answer, given by its key, is still to be made, whatever the filter says."""
        units: dict[str, str] = {}
        for row, spec in self.study.methods.items():
            units.setdefault(digest(map_content(self.study, key, spec)), row)
        return [
            row
            for unit, row in units.items()
            if not self._finished(self.maps, unit) or self._lacks_words(unit) is not None
        ]

    def _lacks_words(self, unit: str) -> dict[str, Any] | None:
        """The record of a finished map that a study which now asks for word maps made without them, else ``None``."""
        record = self.maps.read(unit) if self.study.settings.words else None
        if record is None or record["status"] != "done" or record.get("map") is None:
            return None
        again = "words" not in record or (self.retry_failed and "words_failed" in record)
        return {name: value for name, value in record.items() if name != "words_failed"} if again else None

    def map(self, name: str, dataset: str, sample: Sample) -> int:
        """All maps of one answer that are missing; returns their number."""
        missing = self.missing_maps(name, dataset, sample)
        if not missing:
            return 0
        key, _ = self.answer_key(name, dataset, sample)
        self.make_maps(name, key, missing, sample)
        return len(missing)

    def make_maps(self, name: str, key: str, rows: Sequence[str], sample: Sample) -> None:
        """Maps of one answer, given by its key, for some rows of the tables; the answer is opened once for all."""
        player: Replay | None = None
        for row in rows:
            spec = self.study.methods[row]
            content = map_content(self.study, key, spec)
            unit = digest(content)

            finished = self._lacks_words(unit)

            def work(spec: Any = spec, unit: str = unit, finished: Any = finished) -> dict[str, Any]:
                nonlocal player
                if player is None:
                    player = open_replay(self.answers.path(key, ".h5"), *self.model(name))
                file = self.maps.path(unit, ".heat.h5")
                if finished is not None:
                    return {**finished, "words": add_words(self.study, player, spec, Heatmap.read(file), file)}
                return map_unit(self.study, player, spec, sample.annotations, file)

            self._keep(self.maps, unit, content, work, finished)

    def kept(self, dataset: str, sample: Sample) -> str | None:
        """Say why the filter drops a sample, ``None`` when it does not. All models must have answered."""
        records = {}
        for name in self.study.models:
            key, _ = self.answer_key(name, dataset, sample)
            records[name] = self.answers.read(key)
        return verdict(self.study, records)

    def _finished(self, records: Records, key: str) -> bool:
        record = records.read(key)
        return record is not None and not (self.retry_failed and record["status"] == "failed")

    def _keep(
        self,
        records: Records,
        key: str,
        content: dict[str, Any],
        work: Callable[[], dict[str, Any]],
        finished: dict[str, Any] | None = None,
    ) -> None:
        """Do a unit and keep what came of it. A failure is a result; the user's own stop is not, nor is a disk that is
        full, which ends the study. Where word maps were to be added to a ``finished`` record, what it says stays."""
        try:
            made = {"status": "done", **work()}
        except _NoModel:
            raise
        except Exception as error:
            if (disk := _disk_of(error)) is not None:
                told = "; ".join(causes(disk))
                raise StudyError(f"{self.study.out}: {told}; the same command goes on then") from error
            _log.debug("unit %s failed", key, exc_info=True)
            self.failed += 1
            made = {"status": "failed", "error": type(error).__name__, "reason": _first_line(error)}
            if finished is not None:
                made = {**finished, "words": [], "words_failed": f"{made['error']}: {made['reason']}"}
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.seconds += (made.get("measured") or {}).get("unit_seconds") or 0.0
        records.write(key, {**content, **made})


def samples_of(
    study: Study, dataset: str, *, limit: int | None = None, shard: tuple[int, int] = (0, 1)
) -> Iterator[Sample]:
    """The samples of one data set of a study, in order.

    Args:
        limit: Stop after so many, whatever the study says.
        shard: ``(i, n)``: samples number i, i + n, i + 2n, …

    Raises:
        StudyError: the data set cannot be opened, or has no end.
    """
    spec = study.datasets[dataset]
    limits = [value for value in (spec.limit, limit) if value is not None]
    if spec.reader == "demo" and not limits:
        raise StudyError(f"data set {dataset} of demo scenes has no end: give it a limit")
    source = spec.source if spec.reader == "demo" else study.located(spec.source)  # a demo source is no path
    found = open_dataset(spec.reader, source, split=spec.split, open_ended=spec.open_ended, **spec.options)
    for number, sample in enumerate(found):
        if limits and number >= min(limits):
            return
        if number % shard[1] == shard[0]:
            yield sample


def run_study(
    study: Study,
    *,
    limit: int | None = None,
    shard: tuple[int, int] = (0, 1),
    retry_failed: bool = False,
    tell: Callable[[Told], None] | None = None,
) -> Counter[str]:
    """Do all units of a study that are not finished.

    Args:
        limit: At most so many samples of each data set.
        shard: ``(i, n)``: this process does every n-th sample, from the i-th on. All shards may run at once; they share
            the directory.
        retry_failed: Do units again that have failed before.
        tell: Called after every sample.

    Returns:
        counts: ``answers`` and ``maps`` made in this run, and ``finished`` answers found.

    Raises:
        StudyError: a model or a data set cannot be opened, or the disk is full. Units that are finished stay.
    """
    if not (0 <= shard[0] < shard[1]):
        raise StudyError(f"shard i/n is 0/n to {shard[1] - 1}/n; got {shard[0]}/{shard[1]}")
    worker = Worker(study, retry_failed=retry_failed)
    counts: Counter[str] = Counter()
    samples = {name: list(samples_of(study, name, limit=limit, shard=shard)) for name in study.datasets}
    steps = 2 * len(study.models) * sum(len(found) for found in samples.values())
    done = 0

    def advance(kind: str, what: str, made: int, before: float) -> None:
        nonlocal done
        done += 1
        if tell is not None:
            tell(Told(done, steps, worker.failed, what, kind, made, worker.seconds - before))

    for name in study.models:
        for dataset, found in samples.items():
            for sample in found:
                before = worker.seconds
                made = worker.answer(name, dataset, sample)
                counts["answers" if made else "finished"] += 1
                advance("answers", f"{name} answers {dataset} {sample.id}", int(made), before)
    # The model that answered last is still in memory: its maps first.
    for name in reversed(list(study.models)):
        for dataset, found in samples.items():
            for sample in found:
                before = worker.seconds
                maps = worker.map(name, dataset, sample)
                counts["maps"] += maps
                advance("maps", f"maps for {name}, {dataset} {sample.id}", maps, before)
    worker.release()
    return counts


def _load(study: Study, spec: ModelSpec) -> tuple[Any, Any]:
    if spec.server is not None:
        server = connect(spec.server, spec.served_model, journal=study.out / JOURNAL)
        if server.gives != "passes":
            server.close()
            raise ReplayError(f"a study goes by log-probabilities, and {server.name} gives {server.what}")
        return server, None
    options: dict[str, Any] = {"dtype": spec.dtype, "attn": spec.attn, "trust_remote_code": study.trust_remote_code}
    if spec.device_map is not None:
        options["device_map"] = spec.device_map
    else:
        options["device"] = spec.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load(demo.path() if spec.source == "demo" else study.located(spec.source), **options)


def _disk_of(error: Exception) -> OSError | None:
    """The error of a disk, or of this process's open files, that stands behind one; no unit can help it."""
    behind = (one for one in chain_of(error) if isinstance(one, OSError))
    return next((one for one in behind if one.errno in _NOT_THE_UNITS), None)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return text[:500] or type(error).__name__
