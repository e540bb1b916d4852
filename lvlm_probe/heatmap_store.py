"""The store of explained and scored heatmaps: where they are kept, how they are found again, how work is resumed.

For one trace, all of this stands in ``explanations/`` beside the trace file::

    cat_what-colour-is-the-cat_igos++_red.46bcba4a.h5            the heatmap
    cat_what-colour-is-the-cat_igos++_red.46bcba4a.png           the overlay, to look at
    cat_what-colour-is-the-cat_igos++_red.46bcba4a.score.json    deletion, insertion, verdict
    clip_red.0c29e1b4.order.json                                 of a video: whether "red" needs the order of frames
    cat_what-colour-is-the-cat_images_red.0c71e5aa.evidence.json what else is known of the answer: shares of its parts

The name is for a person: the image's file, the question, the method, the words. The digest is over everything that
decides the values, the trace included, so a file that exists *is* the result, and an interrupted run goes on where it
stopped. Which trace a map is of stands in the map.

Scores, and the units of a study, are JSON records: one object in one file, written whole (``write_record``) and read as
what anybody may have written (``read_record``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lvlm_probe.errors import ProbeError, TraceError
from lvlm_probe.explainers import needs_of
from lvlm_probe.explainers.explaining import Recipe, frame_of, target_of
from lvlm_probe.files import causes, json_ready, read_small, write_whole
from lvlm_probe.heatmap import HeatGrid, Heatmap, trace_file_of
from lvlm_probe.metrics import CurveRule, Score, evaluate
from lvlm_probe.progress import ProgressChoice
from lvlm_probe.replaying import Replay
from lvlm_probe.serving.journal import Journal
from lvlm_probe.trace import Trace, open_trace
from lvlm_probe.video import ClipHeatmap, Order
from lvlm_probe.video.explaining import explain_by

if TYPE_CHECKING:
    from lvlm_probe.selection import TokenSelection

FOLDER = "explanations"

LARGEST_RECORD = 64 * 2**20
"""Bytes of a JSON record; a score with its curves, or a unit of a study, takes thousands."""

_ORDER = ".order.json"
_MASKS = ".masks.jsonl"
"""Ending of what an unfinished map has learnt so far."""

_EVIDENCE = ".evidence.json"
"""Ending of a record of what else is known of an answer."""

_PART_BYTES = 40
"""Bytes of each part of a file's name: all five and the endings stay below the 255 of the usual file systems."""

_BASELINE_FACTS = ("kind", "strength", "seed", "limit")

Shown = Callable[[str], contextlib.AbstractContextManager[ProgressChoice]]
"""Shows work under a title, and gives what it calls with (done, total)."""


# -------------------------------------------------------------------------------------------------------------- records


def read_record(path: Path, *, way_out: str = "") -> dict[str, Any] | None:
    """Read a JSON record; ``None`` where there is no file.

    Args:
        way_out: what to do about a file that is no record, for the message.

    Raises:
        ProbeError: the file cannot be read, is too large or nested too deep, or holds something else than one object.
    """
    then = f"; {way_out}" if way_out else ""
    try:
        record = json.loads(read_small(path, limit=LARGEST_RECORD).decode("utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ProbeError(f"{path} cannot be read: {'; '.join(causes(error))}") from error
    except RecursionError as error:
        raise ProbeError(f"{path} is damaged (nested too deep){then}") from error
    except ValueError as error:
        raise ProbeError(f"{path} is damaged ({error}){then}") from error
    if not isinstance(record, dict):
        raise ProbeError(f"{path} is no record: it holds no object{then}")
    return record


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON record, whole or not at all; NaN and infinity become ``null``. Raises ``OSError``."""
    text = json.dumps(json_ready(record), sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False)
    write_whole(path, text + "\n")


# ----------------------------------------------------------------------------------------------------------------- maps


@dataclass(frozen=True)
class MapSettings(Recipe):
    """Settings of stored maps: how they are made, by which image, and whether and in which ``mode`` they are scored.

    An ``image`` that is a frame of a video stands for the whole video.
    """

    image: int = 0
    scored: bool = True
    mode: str = "fast"


@dataclass(frozen=True)
class MapFile:
    """One stored heatmap."""

    path: Path

    @property
    def overlay_path(self) -> Path:
        """The overlay."""
        return self.path.with_suffix(".png")

    @property
    def score_path(self) -> Path:
        """The score as JSON."""
        return self.path.with_suffix(".score.json")

    def read(self, trace: Trace | None = None) -> Heatmap | ClipHeatmap:
        """The heatmap, of an image or of a video, with its trace where that is still beside it. Raises
        ``TraceError``."""
        return cast("Heatmap | ClipHeatmap", HeatGrid.read(self.path, trace=trace))

    def score(self) -> Score | None:
        """The stored score; ``None`` when the map was not scored. Raises ``ProbeError`` for a damaged file."""
        try:
            record = read_record(self.score_path)
            return None if record is None else Score.from_dict(record)
        except (ValueError, ArithmeticError, AttributeError, ProbeError) as error:
            raise ProbeError(
                f"{self.score_path} is not a score that can be read ({error}); delete it and run evaluate again"
            ) from error

    def score_taken_by(self, options: Mapping[str, Any]) -> Score | None:
        """The stored score, where it was taken in this very way; else ``None``.

        Args:
            options: of ``evaluate``: score, steps, mode, chance, curve, and grid, the cells of a side, ``None`` where
                those of the map count. A score of every point is one of adaptive sampling too.
        """
        try:
            score = self.score()
        except ProbeError:
            return None
        if score is None:
            return None
        side = options["grid"]
        curve: CurveRule = options["curve"]
        wanted = {"score": options["score"], "auc": curve.auc, "mode": options["mode"], "seed": curve.seed}
        cells = list(score.params.get("grid") or [1]) if side is None else [side, side]
        wanted |= {"grid": cells, "held_out": False, "center": True}
        if not curve.release:
            wanted["steps"] = min(options["steps"] or 50, math.prod(cells))
        same = all(score.params.get(key) == value for key, value in wanted.items())
        if "sampling" in score.params:
            tolerance = score.params.get("tolerance")
            near = isinstance(tolerance, float) and tolerance <= curve.tolerance
            same = same and near and curve.sampling == "adaptive"
        return score if same and len(score.random_gains) == options["chance"] else None

    def write_score(self, score: Score) -> None:
        """Write the score, complete or not at all."""
        write_record(self.score_path, score.to_dict())

    def rewrite(self, heat: Heatmap | ClipHeatmap) -> None:
        """The map with what was added to its provenance, of the age it was: maps are shown in the order of making."""
        made = self.path.stat()
        heat.write(self.path)
        os.utime(self.path, ns=(made.st_atime_ns, made.st_mtime_ns))

    def draw(self, heat: Heatmap | ClipHeatmap, score: Score | None) -> None:
        """Draw the overlay with the score's verdict, where there are values to draw."""
        if heat.values is not None:
            heat.save(self.overlay_path, score=score)


def explain_one(
    replay: Replay,
    selection: TokenSelection,
    label: str,
    settings: MapSettings,
    directory: Path,
    *,
    shown: Shown = lambda title: contextlib.nullcontext(False),
) -> tuple[MapFile, bool]:
    """Make, draw and score one map, or find it finished.

    Args:
        label: the words, for the file name and the progress line.
        directory: where it goes; made if missing.
        shown: shows how far the work is.

    Returns:
        The file, and whether it was there already.
    """
    directory.mkdir(parents=True, exist_ok=True)
    found = MapFile(directory / map_name(replay, selection, label, settings))
    finished = found.path.is_file() and is_map(found.path)
    if not finished:
        with (
            shown(f"explaining {label}, {settings.method}") as progress,
            _goes_on(replay, found.path, settings.method) as source,
        ):
            explain_by(
                source,
                target=target_of(source, settings.image),
                tokens=selection,
                progress=progress,
                **settings.asked,
            ).write(found.path)
    if settings.scored and (not finished or _lacks_score(found)):
        score_one(replay, found, shown=shown, mode=settings.mode)
    if not found.overlay_path.is_file():
        found.draw(found.read(), found.score())
    return found, finished


@contextlib.contextmanager
def _goes_on(replay: Replay, path: Path, method: str) -> Iterator[Replay]:
    """The replay for a map; of a method that sends masks and nothing else, one that remembers what they gave."""
    if needs_of(method) != {"passes"} or not isinstance(replay, Replay):
        yield replay
        return
    with going_on(replay, path) as source:
        yield source


@contextlib.contextmanager
def going_on(replay: Replay, path: Path) -> Iterator[Replay]:
    """A replay that remembers what masks gave, for work whose end is a file.

    What a stop leaves of it stands beside that file, and goes when the work is done or cannot be done.
    """
    journal = Journal(path.with_suffix(_MASKS))
    try:
        yield replay.journalled(journal)
    except Exception:
        path.with_suffix(_MASKS).unlink(missing_ok=True)
        raise
    finally:
        journal.close()
    path.with_suffix(_MASKS).unlink(missing_ok=True)


def score_one(
    replay: Replay, found: MapFile, *, shown: Shown = lambda title: contextlib.nullcontext(False), **options: Any
) -> Score:
    """Score a stored map against the baseline it was made with, and store the score beside it.

    An overlay that is there is drawn anew: it says what the score says.
    """
    heat = found.read()
    with shown("scoring") as progress:
        score = evaluate(heat, replay, progress=progress, **options)
    found.write_score(score)
    if found.overlay_path.is_file():
        found.draw(dataclasses.replace(heat, trace=replay.trace), score)  # type: ignore[arg-type]
    return score


def not_made(
    source: Replay | Trace,
    method: str,
    selection: TokenSelection,
    error: Exception,
    *,
    image: int = 0,
    params: Mapping[str, Any] | None = None,
) -> Heatmap:
    """Return what stands for a heatmap that could not be made: one without values, whose reason is the error."""
    sizes = [one.size for one in source.images] if isinstance(source, Trace) else source.image_sizes
    return Heatmap(
        None,
        sizes[image],
        image,
        selection=selection,
        method=method,
        params=dict(params or {}),
        provenance={"trace_id": source.trace_id, "baseline": dict(source.baseline or {})},
        reason=reason_of(error),
        trace=source if isinstance(source, Trace) else source.trace,  # type: ignore[arg-type]
    )


def reason_of(error: Exception) -> str:
    """Return an error as the reason that stands in the place of a result."""
    text = str(error).strip() or "no message"
    return text if isinstance(error, ProbeError) else f"something unexpected happened, {type(error).__name__}: {text}"


# --------------------------------------------------------------------------------------------------------- finding them


def write_order(order: Order, trace: Trace) -> Path:
    """Keep what an answer needs of a video's time, where ``orders_of`` finds it; returns the file."""
    name = f"{_for_a_name(trace.path.stem)}_{_for_a_name(order.text)}"
    path = _beside(trace.explanations_dir, name, [order.trace_id, order.text], _ORDER)
    return _keep(path, order.to_dict())


def orders_of(heats: Iterable[Heatmap | ClipHeatmap]) -> list[Order]:
    """Return what is kept on the order of frames, of the answers about videos that these heatmaps explain.

    Raises:
        ProbeError: what is kept is damaged.
    """
    traces = {heat.trace.trace_id: heat.trace for heat in heats if isinstance(heat, ClipHeatmap) and heat.trace}
    orders = []
    for path in _kept(_ORDER, (trace.explanations_dir for trace in traces.values())):
        try:
            order = Order.from_dict(read_record(path) or {})
        except ProbeError as error:
            raise ProbeError(f"{path} cannot be read ({error}); delete it and run lvlm-probe frames again") from error
        if order.trace_id in traces:
            orders.append(order)
    return orders


def find_maps(paths: Sequence[Path]) -> list[MapFile]:
    """Return the stored maps behind paths: a map, a trace (its maps), or a directory (all maps).

    Raises:
        ProbeError: a path is missing, or there are no maps behind it; the message says how to make some.
    """
    found: list[MapFile] = []
    for path in paths:
        if not path.exists():
            raise TraceError(f"there is no file or directory {path}")
        here = list(_maps_behind(path))
        if not here:
            raise ProbeError(f"no explanations of {path} yet; make some: lvlm-probe explain {shlex.quote(str(path))}")
        found += [item for item in here if item not in found]
    return found


def by_trace(found: Iterable[MapFile]) -> list[tuple[Trace, list[MapFile]]]:
    """Return maps by the trace that they explain. Raises ``ProbeError`` where one is not there any more."""
    traces: dict[tuple[Path, int], tuple[Trace, list[MapFile]]] = {}
    for item in found:
        trace = item.read().trace
        if trace is None:
            raise ProbeError(f"{item.path}: its trace is not beside it any more; put the trace file back")
        traces.setdefault((trace.path, trace.row), (trace, []))[1].append(item)
    return list(traces.values())


def _maps_behind(path: Path) -> Iterator[MapFile]:
    if path.is_dir():
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        yield from (MapFile(file) for file in _by_age(folder.glob("*.h5")) if folder.name == FOLDER or is_map(file))
        return
    if is_map(path):
        yield MapFile(path)
        return
    with open_trace(path) as trace:
        folder = trace.explanations_dir
    for file in _by_age(folder.glob("*.h5")):
        if file.name.startswith(f"{path.stem}.") or trace_file_of(file) == path.resolve():
            yield MapFile(file)


def _by_age(files: Iterable[Path]) -> list[Path]:
    """Oldest first, so that the whole answer's map comes before those of its words; links to nowhere are left out, and
    what others delete meanwhile."""
    found = []
    for file in files:
        with contextlib.suppress(OSError):
            state = file.stat()
            if stat.S_ISREG(state.st_mode):
                found.append((state.st_mtime_ns, file.name, file))
    return [file for *_, file in sorted(found)]


def is_map(path: Path) -> bool:
    """Tell whether a file is a heatmap that can be read."""
    try:
        MapFile(path).read()
    except TraceError:
        return False
    return True


def _lacks_score(found: MapFile) -> bool:
    try:
        return found.score() is None
    except ProbeError:
        return True


def map_name(replay: Replay, selection: TokenSelection, label: str, settings: MapSettings) -> str:
    """Return the name of a map's file: for a person, and a digest of everything that decides its values."""
    # What separates this baseline from others: parameters, and the pixels, when it is the user's image.
    facts = {key: replay.baseline.get(key) for key in _BASELINE_FACTS}
    pixels = replay.baseline.get("sha256")
    clip = frame_of(replay, settings.image)
    decisive = [
        replay.trace_id,
        settings.method,
        dict(settings.params),
        settings.image if clip is None else clip.first,
        settings.seed,
        list(selection.indices),
        json.dumps([facts, [pixels] if pixels else []], sort_keys=True),
    ]
    decisive += [] if selection.score is None else [selection.score.to_dict()]
    decisive += [] if settings.search_dtype is None else [settings.search_dtype]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:8]
    kind, number = ("image", settings.image) if clip is None else ("video", list(replay.trace.clips).index(clip))
    shown = [settings.method, label or "nothing"]
    return f"{_named(replay.trace, kind, number, shown)}.{digest}.h5"  # type: ignore[arg-type]


def keep_evidence(directory: Path, trace: Trace, kind: str, label: str, record: Mapping[str, Any]) -> Path:
    """Keep what is known of an answer beside its heatmaps, where ``stored_evidence`` finds it; the same again replaces
    it.

    Args:
        directory: where it goes; made if missing.
        kind: of evidence, for its reader.
        label: what it is about, for the file name; with the kind it tells it from others of the answer.
        record: JSON-ready.

    Raises:
        ProbeError: it cannot be written.
    """
    return _keep(evidence_path(directory, trace, kind, label), {**record, "kind": kind})


def evidence_path(directory: Path, trace: Trace, kind: str, label: str) -> Path:
    """Return where ``keep_evidence`` keeps it."""
    return _beside(directory, _named(trace, "image", 0, [kind, label]), [trace.trace_id, kind, label], _EVIDENCE)


def stored_evidence(found: Iterable[MapFile]) -> dict[Path, dict[str, Any]]:
    """Return the records that ``keep_evidence`` wrote beside heatmaps, oldest first. Raises ``ProbeError`` for one that
    is damaged."""
    records: dict[Path, dict[str, Any]] = {}
    for file in _kept(_EVIDENCE, (item.path.parent for item in found)):
        if (record := read_record(file, way_out="delete it")) is not None:
            records[file] = record
    return records


def _beside(directory: Path, name: str, about: Sequence[str], ending: str) -> Path:
    """A file beside heatmaps; ``about`` tells it from others of its kind."""
    return directory / f"{name}.{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]}{ending}"


def _keep(path: Path, record: Mapping[str, Any]) -> Path:
    try:
        write_record(path, record)
    except OSError as error:
        raise ProbeError(f"{path} cannot be written: {'; '.join(causes(error))}") from error
    return path


def _kept(ending: str, folders: Iterable[Path]) -> list[Path]:
    """The files of such an ending, folder by folder, in each oldest first."""
    return [file for folder in dict.fromkeys(folders) for file in _by_age(folder.glob(f"*{ending}"))]


def _named(trace: Trace, kind: str, number: int, more: Sequence[str]) -> str:
    """For a person: the file of the image or video, the question, and what else is given."""
    files = trace.meta.get(f"{kind}_files") if isinstance(getattr(trace, "meta", None), dict) else None
    file = files[number] if isinstance(files, list) and number < len(files) else ""
    row = f"row {trace.row}" if getattr(trace, "rows", 1) > 1 else ""
    question = str(getattr(trace, "question", None) or "").lower()
    return "_".join(filter(None, map(_for_a_name, [Path(str(file)).stem, question, row, *more])))


def _for_a_name(text: str) -> str:
    """A text as a part of a file name on any system: letters, digits, few signs; ended at a word where it is long."""
    plain = re.sub(r"[^\w+-]+", "-", text.replace("_", "-")).strip("-")
    cut = plain.encode()[:_PART_BYTES].decode(errors="ignore")
    return (cut.rpartition("-")[0] or cut) if len(cut) < len(plain) else cut
