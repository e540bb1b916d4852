"""Units of work: their keys, and their records on disk.

A study is made of two kinds of unit: one *answer* per sample and model, one *map* per answer and method. A unit's key
is a digest of everything that its result depends on, so that a study with one more method, or with other settings for
one of them, does only what is new. A finished unit is one JSON file, written under another name and renamed, as traces
are: whatever is killed, a record is whole or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.errors import ProbeError, StudyError
from lvlm_probe.files import causes, remove_orphans
from lvlm_probe.heatmap_store import read_record, write_record

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.study.spec import MethodSpec, ModelSpec, Study

__all__ = [
    "Records",
    "answer_content",
    "digest",
    "map_content",
    "method_content",
    "model_content",
    "model_stamp",
    "picture_digest",
]

VERSION = 1
"""Of what a unit computes: results of another version are not taken over."""


def digest(content: Mapping[str, Any]) -> str:
    """32 hex digits over JSON-ready content, whatever the order of its names."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def picture_digest(picture: Image.Image) -> str:
    """32 hex digits over a picture's mode, size and pixels: the same for a PNG and its copy elsewhere."""
    head = f"{picture.mode}:{picture.size}:".encode()
    return hashlib.sha256(head + picture.tobytes()).hexdigest()[:32]


def answer_content(
    study: Study, dataset: str, sample: str, model: ModelSpec, fingerprint: str, *, picture: str, question: str
) -> dict[str, Any]:
    """All that one model's answer to one sample depends on.

    Args:
        fingerprint: of the model's weights (``identity.fingerprint``), so that weights trained on make new units.
        picture: ``picture_digest`` of the picture.
    """
    return {
        "unit": "answer",
        "version": VERSION,
        "model": model.name,
        "dataset": dataset,
        "sample": sample,
        "picture": picture,
        "question": question,
        **model_content(study, model, fingerprint),
    }


def model_content(study: Study, model: ModelSpec, fingerprint: str) -> dict[str, Any]:
    """The part of ``answer_content`` that all answers of one model share."""
    return {
        "fingerprint": fingerprint,
        "dtype": model.dtype,
        "attn": model.attn,
        "max_new_tokens": study.settings.max_new_tokens,
        "baseline": study.settings.baseline,
    }


def map_content(study: Study, answer: str, method: MethodSpec) -> dict[str, Any]:
    """All that one method's map of one answer, and its scores, depend on; ``answer`` is the answer's key."""
    return {"unit": "map", "version": VERSION, "answer": answer, **method_content(study, method)}


def method_content(study: Study, method: MethodSpec) -> dict[str, Any]:
    """The part of ``map_content`` that all maps of one method share."""
    settings = study.settings
    return {
        "method": method.method,
        "behaviour": method.behaviour,
        "params": dict(method.params),
        "tokens": method.tokens,
        "alpha": settings.alpha if method.alpha is None else method.alpha,
        "map_baseline": method.baseline or settings.baseline,
        "grid": settings.grid,
        "steps": settings.steps,
        "seed": settings.seed,
    }


def model_stamp(study: Study, model: ModelSpec) -> str:
    """Key under which the fingerprint of a model is kept: changes with the files of a local checkpoint. A hub id has
    none; it names its own version."""
    directory = Path(os.path.expanduser(study.located(model.source)))
    files: list[list[Any]] = []
    if directory.is_dir():
        files = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(directory.iterdir())]
    return digest({"source": model.source, "dtype": model.dtype, "files": files})


_AGAIN = "delete it and resume, and the unit is done again"


class Records:
    """The finished units of one kind in a study's directory, which anybody may have written.

    Args:
        directory: where they are; made when missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"{directory} cannot be made: {causes(error)[0]}; give the study another out") from error
        remove_orphans([directory])  # of runs that were killed

    def path(self, key: str, suffix: str = ".json") -> Path:
        return self.directory / f"{key}{suffix}"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def read(self, key: str) -> dict[str, Any] | None:
        """The record of a unit, ``None`` when it is not finished.

        Raises:
            StudyError: the file is damaged or holds something else; it names the file, which can be deleted to do the
                unit again.
        """
        try:
            record = read_record(self.path(key), way_out=_AGAIN)
        except ProbeError as error:
            raise StudyError(str(error)) from error
        if record is not None and (fault := _fault(record)) is not None:
            raise self._no_record(key, fault)
        return record

    def require(self, key: str, record: Mapping[str, Any], *names: str) -> None:
        """Raise ``StudyError`` where a record lacks what is to be made of it."""
        if (fault := _missing(record, names)) is not None:
            raise self._no_record(key, fault)

    def _no_record(self, key: str, fault: str) -> StudyError:
        return StudyError(f"{self.path(key)} is no record of a unit: {fault}; {_AGAIN}")

    def write(self, key: str, record: Mapping[str, Any]) -> Path:
        """Keep a finished unit. NaN and infinity become ``null``."""
        path = self.path(key)
        try:
            write_record(path, record)
        except OSError as error:
            raise StudyError(f"{path} cannot be written: {error}; free some space and resume") from error
        return path

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Key and record of every finished unit, in order of key."""
        for path in sorted(self.directory.glob("*.json")):
            record = self.read(path.stem)
            if record is not None:
                yield path.stem, record


# --- the shape of a record --------------------------------------------------------------------------------------------

_NUMBER, _TEXT, _FLAG = "a number", "a text", "true or false"
_KINDS: Mapping[str, Callable[[Any], bool]] = {
    _NUMBER: lambda value: (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    ),
    _TEXT: lambda value: isinstance(value, str),
    _FLAG: lambda value: isinstance(value, bool),
}


@dataclass(frozen=True)
class _Shape:
    """What a value is: one of some kinds, ``None`` too where it is ``optional``, and a list of such where ``many``; or
    a mapping with known entries, of which the ``needed`` ones have to be there."""

    kinds: tuple[str, ...] = ()
    optional: bool = False
    many: bool = False
    entries: Mapping[str, _Shape] = field(default_factory=dict)
    needed: tuple[str, ...] = ()

    def fault(self, value: Any, where: str) -> str | None:
        if self.many and isinstance(value, list):
            return next((found for item in value if (found := self._of_one(item, where)) is not None), None)
        if value is None and self.optional:
            return None
        return f"{where} is no list" if self.many and not self.optional else self._of_one(value, where)

    def _of_one(self, value: Any, where: str) -> str | None:
        if self.kinds:
            return None if any(_KINDS[kind](value) for kind in self.kinds) else f"{where} is not {self.kinds[0]}"
        if not isinstance(value, dict):
            return f"{where} is no mapping"
        missing = next((name for name in self.needed if name not in value), None)
        if missing is not None:
            return f"{where} has no {missing!r}"
        known = ((name, shape) for name, shape in self.entries.items() if name in value)
        return next((found for name, shape in known if (found := shape.fault(value[name], name)) is not None), None)


def _all(shape: _Shape, *names: str) -> dict[str, _Shape]:
    return dict.fromkeys(names, shape)


_SCORE = _Shape((_NUMBER,), optional=True)
_WORDS = _Shape((_TEXT,))
_AREAS = _Shape(entries=_all(_SCORE, "deletion", "insertion"), needed=("deletion", "insertion"))
_PEOPLE = ("soft_iou", "rank_correlation", "auc_judd", "nss")
_RECORD = _Shape(
    entries={
        **_all(_WORDS, "status", "error", "model", "dataset", "sample", "picture", "question", "answer"),
        **_all(_WORDS, "fingerprint", "source", "human_failed", "words_failed"),
        **_all(_Shape((_TEXT,), optional=True), "reason", "group", "role", "text", "verdict"),
        **_all(_SCORE, "log_prob", "baseline_log_prob", "drop", "drop_normalised", "deletion", "insertion"),
        **_all(_SCORE, "tie_share", "pointing", "energy", "average_precision", "iou"),
        "set": _Shape((_TEXT, _NUMBER), optional=True),
        "true_answer": _Shape((_TEXT,), optional=True, many=True),
        "choices": _Shape((_TEXT,), many=True),
        "map": _Shape((_TEXT,), optional=True),
        "trusted": _Shape((_FLAG,), optional=True),
        "passes": _Shape(entries=_all(_Shape((_NUMBER,)), "forward", "backward"), needed=("forward", "backward")),
        "baseline_check": _Shape(entries=_all(_SCORE, "original_probability", "mean_probability"), optional=True),
        "release": _AREAS,
        "common": _Shape(
            entries={
                **_AREAS.entries,
                "trusted": _Shape((_FLAG,), optional=True),
                "verdict": _Shape((_TEXT,), optional=True),
                "baseline_check": _Shape(entries=_all(_SCORE, "original_probability", "mean_probability")),
            },
            needed=_AREAS.needed,
        ),
        "human": _Shape(entries=_all(_SCORE, *_PEOPLE), needed=_PEOPLE, many=True),
        "words": _Shape(
            entries={**_all(_WORDS, "text", "map", "reason"), "tokens": _Shape((_NUMBER,), many=True)},
            needed=("text", "tokens"),
            many=True,
        ),
        "measured": _Shape(
            entries={
                **_all(_Shape((_NUMBER,)), "seconds", "unit_seconds", "processor_seconds", "judged_seconds"),
                "machine": _WORDS,
                "memory": _Shape(entries=_all(_SCORE, "measured_peak", "weights"), optional=True),
            },
            needed=("seconds",),
        ),
    }
)
"""Entries of a record that something is read from; of others, anything may stand there."""

_NEEDED = {
    ("answer", "done"): ("sample", "question", "answer", "true_answer", "choices", "group", "drop", "drop_normalised"),
    ("answer", "failed"): ("sample", "question", "group", "error", "reason"),
    ("map", "done"): ("map",),
    ("map", "failed"): ("error", "reason"),
}


def _fault(record: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a record that anybody may have written; ``None`` where nothing is."""
    found = _RECORD.fault(record, "it")
    if found is not None:
        return found
    unit, status = record.get("unit"), str(record.get("status"))
    if unit is None:
        return None  # of a model
    if not isinstance(unit, str) or (unit, status) not in _NEEDED:
        return f"it is of a unit {unit!r} with status {status!r}"
    if record.get("map") is not None and (Path(record["map"]).name != record["map"] or "\\" in record["map"]):
        return "map is no name of a file beside it"
    empty = unit == "map" and status == "done" and record.get("map") is None
    return _missing(record, (*_NEEDED[unit, status], *(("reason",) if empty else ())))


def _missing(record: Mapping[str, Any], names: Iterable[str]) -> str | None:
    missing = next((name for name in names if name not in record), None)
    return None if missing is None else f"it has no {missing!r}"
