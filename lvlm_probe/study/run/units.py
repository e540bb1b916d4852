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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.errors import ProbeError, StudyError
from lvlm_probe.files import causes, remove_orphans
from lvlm_probe.heatmap_store import read_record, write_record

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.study.spec import MethodSpec, ModelSpec, Study

VERSION = 1
"""Of what a unit computes: results of another version are not taken over."""

UNSAID: Mapping[str, Any] = {"search_dtype": None}
"""What keys and records of maps leave out where it is so, as older ones know nothing of it."""


def digest(content: Mapping[str, Any]) -> str:
    """32 hex digits over JSON-ready content, whatever the order of its names."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:32]


def image_digest(image: Image.Image | Path, *, sampling: Sequence[Any] = ()) -> str:
    """32 hex digits over an image's mode, size and pixels: the same for a PNG and its copy elsewhere; or over a video's
    file, and how it is sampled."""
    if isinstance(image, Path):
        with image.open("rb") as file:
            return digest({"video": hashlib.file_digest(file, "sha256").hexdigest(), "sampling": list(sampling)})
    head = f"{image.mode}:{image.size}:".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()[:32]


def answer_content(
    study: Study, dataset: str, sample: str, model: ModelSpec, fingerprint: str, *, image: str, question: str
) -> dict[str, Any]:
    """All that one model's answer to one sample depends on.

    Args:
        fingerprint: of the model's weights (``identity.fingerprint``), so that weights trained on make new units.
        image: ``image_digest`` of the image.
    """
    return {
        "unit": "answer",
        "version": VERSION,
        "model": model.name,
        "dataset": dataset,
        "sample": sample,
        "picture": image,  # the name in keys of units that are kept
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
    content = {"unit": "map", "version": VERSION, "answer": answer, **method_content(study, method)}
    return {name: value for name, value in content.items() if name not in UNSAID or value != UNSAID[name]}


def method_content(study: Study, method: MethodSpec) -> dict[str, Any]:
    """The part of ``map_content`` that all maps of one method share."""
    settings = study.settings
    return {
        "method": method.method,
        "behaviour": method.behaviour,
        "params": dict(method.params),
        "search_dtype": method.search_dtype,
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
    served = {} if model.server is None else {"served_model": model.served_model}
    return digest({"source": model.source, "dtype": model.dtype, "files": files, **served})


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


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


_ENTRIES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "a text",
        _is_text,
        "status error reason model dataset sample image question answer fingerprint source group role text verdict "
        "map machine human_failed words_failed search_dtype",
    ),
    (
        "a number",
        _is_number,
        "log_prob baseline_log_prob drop drop_normalised deletion insertion tie_share center_gain pointing energy "
        "iou seconds average_precision original_probability mean_probability soft_iou rank_correlation auc_judd nss "
        "forward backward unit_seconds processor_seconds judged_seconds measured_peak weights",
    ),
    ("true or false", lambda value: isinstance(value, bool), "trusted"),
    ("a mapping", _is_mapping, "passes measured memory baseline_check release common"),
    ("a list of mappings", _list_of(_is_mapping), "human words"),
    ("a list of texts", _list_of(_is_text), "choices"),
    ("a list of numbers", _list_of(_is_number), "words.tokens"),
    ("a text or a list of texts", lambda value: _is_text(value) or _list_of(_is_text)(value), "true_answer"),
)
_CHECKS = {name: (kind, check) for kind, check, names in _ENTRIES for name in names.split()}
"""What the entries are that something is made of, at any depth; each may be ``null`` or missing besides."""


_NEEDED_IN = {"passes": ("forward", "backward"), "measured": ("seconds",), "words": ("text", "tokens")}


def _fault(record: Mapping[str, Any]) -> str | None:
    """What is wrong with a record that anybody may have written; ``None`` where nothing is."""
    unit, status, file = record.get("unit"), record.get("status"), record.get("map")
    if unit is not None and (unit not in ("answer", "map") or status not in ("done", "failed")):
        return f"it is of a unit {unit!r} with status {status!r}"
    if isinstance(file, str) and (Path(file).name != file or "\\" in file):
        return "map is no name of a file beside it"
    needed = ["sample", "question"] if unit == "answer" else []
    if unit is not None and status == "failed":
        needed += ["error", "reason"]
    elif unit == "answer":
        needed += ["answer", "choices"]
    return _wrong_entry(record, "") or _missing(record, needed)


def _wrong_entry(record: Mapping[str, Any], where: str) -> str | None:
    for name, value in record.items():
        found = _CHECKS.get(f"{where}{name}") or _CHECKS.get(name)
        if value is None or found is None:
            continue
        kind, check = found
        if not check(value):
            return f"{name} is not {kind}"
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                fault = _wrong_entry(item, f"{name}.") or _missing(item, _NEEDED_IN.get(name, ()))
                if fault is not None:
                    return f"{name}: {fault}"
    return None


def _missing(record: Mapping[str, Any], names: Iterable[str]) -> str | None:
    missing = next((name for name in names if record.get(name) is None), None)
    return None if missing is None else f"it has no {missing!r}"
