"""Stored files of a sample: its image, the traces of its answers, their maps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_probe.errors import ProbeError
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.heatmap_store import MapFile
from lvlm_probe.study.run.word_maps import read_words
from lvlm_probe.trace import Trace, open_trace
from lvlm_probe.video.heatmap import film_sheet
from lvlm_probe.words import spelled

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.study.results import Results

Key = tuple[str, str]
"""Data set and sample id."""


@dataclass(frozen=True)
class Opened:
    """The files of one sample, as far as they are at hand.

    Attributes:
        image: the original image, RGB, or a sheet of a video's frames; ``None`` where no trace holds it.
        is_sheet: Whether it is a sheet.
        traces: model → trace of its answer, where the file can be read.
        heats: (model, row) → heatmap with values; of a video the one over its sheet.
        words: (model, row) → word maps as ``read_words`` gives them.
        notes: What could not be read, and why.
    """

    image: Image.Image | None
    traces: Mapping[str, Trace]
    heats: Mapping[tuple[str, str], Heatmap]
    words: Mapping[tuple[str, str], list[dict[str, Any]]]
    notes: tuple[str, ...] = field(default=())
    is_sheet: bool = False


class Stored:
    """The records of a study by sample, and their files; a few samples are kept open, as those of a set are needed
    more than once.

    Attributes:
        answers: sample → model → record of the answer, in the study's order of samples.
        maps: sample → (model, row) → record of the map.
    """

    def __init__(self, results: Results) -> None:
        self.study = results.study
        self.answers: dict[Key, dict[str, Mapping[str, Any]]] = {}
        for record in results.answers:
            self.answers.setdefault((record["dataset"], record["sample"]), {})[record["model"]] = record
        self.maps: dict[Key, dict[tuple[str, str], Mapping[str, Any]]] = {}
        for record in results.maps:
            here = self.maps.setdefault((record["dataset"], record["sample"]), {})
            here[record["model"], record["row"]] = record
        self.open = functools.lru_cache(maxsize=24)(self._open)

    def _open(self, key: Key) -> Opened:
        notes: list[str] = []
        traces: dict[str, Trace] = {}
        image: Image.Image | None = None
        is_sheet = False
        for model, record in self.answers[key].items():
            if record["status"] != "done":
                continue
            try:
                trace = open_trace(self.study.out / "answers" / f"{record['key']}.h5")
                if image is None and trace.images:
                    image = trace.images[0].convert("RGB")
                    if is_sheet := bool(trace.clips):
                        image = film_sheet(trace.images, trace.clips[0])
                traces[model] = trace
            except (ProbeError, OSError) as error:
                notes.append(f"the trace of {model} cannot be read: {error}")
        heats: dict[tuple[str, str], Heatmap] = {}
        words: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for (model, row), record in self.maps.get(key, {}).items():
            if record["status"] != "done" or record["map"] is None:
                continue
            file = self.study.out / "maps" / record["map"]
            try:
                heat, entries = _read(file, traces.get(model), record)
                if heat.values is not None:
                    heats[model, row], words[model, row] = heat, entries
            except (ProbeError, OSError) as error:
                notes.append(f"the map of {row} for {model} cannot be read: {error}")
        return Opened(image, traces, heats, words, tuple(notes), is_sheet)


def _read(file: Path, trace: Trace | None, record: Mapping[str, Any]) -> tuple[Heatmap, list[dict[str, Any]]]:
    """A map and those of its words, all over the sheet where they are of a video."""
    entries = read_words(record, file)
    heat = MapFile(file).read(trace)
    if isinstance(heat, Heatmap):
        return heat, entries
    for entry in entries:
        if "values" in entry:
            entry["values"] = dataclasses.replace(heat, values=entry["values"], seen=None).on_sheet().values
    return heat.on_sheet(), entries


def selected_words(trace: Trace, indices: tuple[int, ...]) -> list[int]:
    """Numbers of the words that tokens belong to."""
    chosen = set(indices)
    return [n for n, word in enumerate(trace.words) if chosen.intersection(range(word.start, word.stop))]


def words_of(trace: Trace) -> tuple[list[list[Any]], str]:
    """The answer word by word, ``[text before it, the word, its log-likelihood ratio or None]``, and what follows."""
    llr = trace.llr
    shown = ["" if special else piece for piece, special in zip(trace.tokens, trace.special.tolist(), strict=True)]
    texts, tail = spelled(shown, trace.words)
    found: list[list[Any]] = []
    for word, (before, text) in zip(trace.words, texts, strict=True):
        ratio = float("nan") if llr is None else float(np.asarray(llr[word.start : word.stop], dtype=np.float64).sum())
        found.append([before if found else before.lstrip(), text, ratio])
    return found, tail


def with_sets(results: Results) -> Results:
    """Results whose answers know their ``set`` and ``role``, taken from the data where a study did not keep them.

    Raises:
        StudyError: the data are not at hand.
    """
    from lvlm_probe.study.run.runner import samples_of

    known: dict[Key, Mapping[str, Any]] = {}
    for dataset in results.study.datasets:
        wanted = {record["sample"] for record in results.answers if record["dataset"] == dataset}
        for sample in samples_of(results.study, dataset) if wanted else ():
            found = {name: sample.annotations[name] for name in ("set", "role") if name in sample.annotations}
            known[dataset, sample.id] = found
            wanted.discard(sample.id)
            if not wanted:
                break  # a reader may go on for ever, or for long
    answers = ({**record, **known.get((record["dataset"], record["sample"]), {})} for record in results.answers)
    return dataclasses.replace(results, answers=tuple(answers))
