"""Maps on disk: where a heatmap, its picture and its score are kept, how they are found again, and how work is resumed.

For one trace, all of this stands in ``explanations/`` beside the trace file::

    <trace>.<method>.<words>.<digest>.h5            the heatmap
    <trace>.<method>.<words>.<digest>.png           the overlay, to look at
    <trace>.<method>.<words>.<digest>.score.json    deletion, insertion, verdict

The digest is over everything that decides the values, so a file that exists *is* the result, and an interrupted run
goes on where it stopped.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.cli.shared.terminal import bar
from lvlm_probe.errors import ProbeError, TraceError
from lvlm_probe.files import write_whole

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.heatmap import Heatmap
    from lvlm_probe.metrics import Score
    from lvlm_probe.replaying import Replay
    from lvlm_probe.selection import TokenSelection

__all__ = [
    "FOLDER",
    "MapFile",
    "Settings",
    "baseline_from",
    "explain_one",
    "find_maps",
    "score_one",
]

FOLDER = "explanations"
_FACTS = ("kind", "strength", "seed", "limit")


@dataclass(frozen=True)
class Settings:
    """How maps are made: what ``explain`` and ``evaluate`` of the library are given besides the tokens."""

    method: str
    params: Mapping[str, Any]
    image: int = 0
    seed: int = 0
    scored: bool = True
    mode: str = "fast"


@dataclass(frozen=True)
class MapFile:
    """One stored heatmap."""

    path: Path

    @property
    def picture(self) -> Path:
        """The overlay."""
        return self.path.with_suffix(".png")

    @property
    def score_path(self) -> Path:
        """The score as JSON."""
        return self.path.with_suffix(".score.json")

    def read(self) -> Heatmap:
        """The heatmap, with its trace where that is still beside it. Raises ``TraceError``."""
        from lvlm_probe.heatmap import Heatmap

        return Heatmap.read(self.path)

    def score(self) -> Score | None:
        """The stored score; ``None`` when the map was not scored. Raises ``ProbeError`` for a damaged file."""
        from lvlm_probe.metrics import Score

        if not self.score_path.is_file():
            return None
        try:
            return Score.from_dict(json.loads(self.score_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, ArithmeticError, AttributeError, RecursionError, ProbeError) as error:
            raise ProbeError(
                f"{self.score_path} is not a score that can be read ({error}); delete it and run evaluate again"
            ) from error

    def write_score(self, score: Score) -> None:
        """Writes the score, complete or not at all."""
        write_whole(self.score_path, json.dumps(score.to_dict(), ensure_ascii=False, indent=1, allow_nan=False))


def explain_one(
    replay: Replay, selection: TokenSelection, label: str, settings: Settings, directory: Path
) -> tuple[MapFile, bool]:
    """Makes, draws and scores one map, or finds it finished.

    Args:
        label: the words, for the file name and the progress line.
        directory: where it goes; made if missing.

    Returns:
        The file, and whether it was there already.
    """
    from lvlm_probe import explain

    directory.mkdir(parents=True, exist_ok=True)
    found = MapFile(directory / _file_name(replay, selection, label, settings))
    finished = _is_readable(found)
    if not finished:
        with bar(f"explaining {label}, {settings.method}") as progress:
            heat = explain(
                replay,
                method=settings.method,
                tokens=selection,
                image=settings.image,
                seed=settings.seed,
                progress=progress,
                **settings.params,
            )
        heat.write(found.path)
    if settings.scored and (not finished or _lacks_score(found)):
        score_one(replay, found, mode=settings.mode)
    if not found.picture.is_file():
        heat = found.read()
        if heat.values is not None:
            heat.save(found.picture)
    return found, finished


def score_one(replay: Replay, found: MapFile, **options: Any) -> Score:
    """Scores a stored map against the baseline it was made with, and stores the score beside it."""
    from lvlm_probe import evaluate

    heat = found.read()
    with bar("scoring") as progress:
        score = evaluate(heat, replay, progress=progress, **options)
    found.write_score(score)
    return score


def find_maps(paths: Sequence[Path]) -> list[MapFile]:
    """The stored maps behind paths: a map, a trace (its maps), or a directory (all maps).

    Raises:
        ProbeError: a path is missing, or there are no maps behind it; the message says how to make some.
    """
    found: list[MapFile] = []
    for path in paths:
        if not path.exists():
            raise TraceError(f"there is no file or directory {path}")
        here = list(_maps_behind(path))
        if not here:
            raise ProbeError(f"no explanations of {path} yet; make some: lvlm-probe explain {path}")
        found += [item for item in here if item not in found]
    return found


def _maps_behind(path: Path) -> Iterator[MapFile]:
    if path.is_dir():
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        yield from (MapFile(file) for file in _by_age(folder.glob("*.h5")) if folder.name == FOLDER or _is_map(file))
        return
    if _is_map(path):
        yield MapFile(path)
        return
    from lvlm_probe.trace import open_trace

    with open_trace(path) as trace:
        folder = trace.explanations_dir
    yield from (MapFile(file) for file in _by_age(folder.glob(f"{glob.escape(path.stem)}.*.h5")))


def _by_age(files: Iterable[Path]) -> list[Path]:
    """Oldest first, so that the whole answer's map comes before those of its words."""
    return sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name))


def _is_map(path: Path) -> bool:
    from lvlm_probe.heatmap import Heatmap

    try:
        Heatmap.read(path)
    except TraceError:
        return False
    return True


def _is_readable(found: MapFile) -> bool:
    return found.path.is_file() and _is_map(found.path)


def _lacks_score(found: MapFile) -> bool:
    try:
        return found.score() is None
    except ProbeError:
        return True


def _file_name(replay: Replay, selection: TokenSelection, label: str, settings: Settings) -> str:
    # What tells this baseline from others: parameters, and the pixels, when it is the user's picture.
    facts, pixels = {key: replay.baseline.get(key) for key in _FACTS}, replay.baseline.get("sha256")
    decisive = [
        replay.trace_id,
        settings.method,
        dict(settings.params),
        settings.image,
        settings.seed,
        list(selection.indices),
        json.dumps([facts, [pixels] if pixels else []], sort_keys=True),
    ]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:8]
    trace: Any = replay.trace
    row = f".r{trace.row}" if getattr(trace, "rows", 1) > 1 else ""
    method, words = _plain(settings.method), _plain(label) or "nothing"
    return f"{trace.path.stem}{row}.{method}.{words}.{digest}.h5"


def _plain(text: str) -> str:
    return re.sub(r"[^\w+-]+", "-", text).strip("-")[:40]


def baseline_from(value: str | None) -> str | Image.Image | None:
    """``--baseline``: a kind, or a picture's path."""
    from lvlm_probe.images.baselines import KINDS

    if value is None or value in KINDS:
        return value
    if Path(value).suffix or os.sep in value:
        from lvlm_probe.trace.image_files import open_picture

        return open_picture(Path(value))
    raise ProbeError(f"--baseline {value!r}: choose one of {', '.join(KINDS)}, or give a picture's path")
