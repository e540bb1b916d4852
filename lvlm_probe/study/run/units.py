"""Units of work: their keys, and their records on disk.

A study is made of two kinds of unit: one *answer* per sample and model, one *map* per answer and method. A unit's key
is a digest of everything that its result depends on, so that a study with one more method, or with other settings for
one of them, does only what is new. A finished unit is one JSON file, written under another name and renamed, as traces
are: whatever is killed, a record is whole or not there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.errors import StudyError
from lvlm_probe.files import remove_orphans, write_whole

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


class Records:
    """The finished units of one kind in a study's directory.

    Args:
        directory: where they are; made when missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        remove_orphans([directory])  # of runs that were killed

    def path(self, key: str, suffix: str = ".json") -> Path:
        return self.directory / f"{key}{suffix}"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def read(self, key: str) -> dict[str, Any] | None:
        """The record of a unit, ``None`` when it is not finished.

        Raises:
            StudyError: the file is damaged; it names the file, which can be deleted to do the unit again.
        """
        path = self.path(key)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise StudyError(
                f"{path} is damaged ({error}); delete it and resume, and the unit is done again"
            ) from error
        if not isinstance(record, dict):
            raise StudyError(f"{path} is no record of a unit; delete it and resume, and the unit is done again")
        return record

    def write(self, key: str, record: Mapping[str, Any]) -> Path:
        """Keep a finished unit. NaN and infinity become ``null``."""
        path = self.path(key)
        text = json.dumps(_finite(record), sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
        try:
            write_whole(path, text)
        except OSError as error:
            raise StudyError(f"{path} cannot be written: {error}; free some space and resume") from error
        return path

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Key and record of every finished unit, in order of key."""
        for path in sorted(self.directory.glob("*.json")):
            record = self.read(path.stem)
            if record is not None:
                yield path.stem, record

    def forget(self, key: str) -> None:
        """Drop a unit, so that it is done again."""
        self.path(key).unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str | bytes):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
