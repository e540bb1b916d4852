"""A model put to the checks that this package's own models are put to, on images that come with it.

Each answer and each method is a unit of its own in ``selfcheck.json``, written as it is finished, so that the work can
be stopped at any time and goes on with what is missing. What is done with the model is what the other commands do:
answers are recorded, verified, explained and scored into a folder of traces, which stays on this machine; file and page
hold numbers, answers to built-in questions and built-in images, and no folder of anybody's disk.

This module imports torch; the command imports it when it runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from lvlm_probe._version import __version__
from lvlm_probe.cli.shared.answers import ask
from lvlm_probe.cli.shared.checkup import environment, model_checks
from lvlm_probe.cli.shared.maps import label_of
from lvlm_probe.cli.shared.models import load_model
from lvlm_probe.cli.shared.terminal import bar, stage
from lvlm_probe.demo import Scene, scenes
from lvlm_probe.errors import ProbeError
from lvlm_probe.explainers import explain, methods
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.heatmap_store import (
    FOLDER,
    MapFile,
    MapSettings,
    explain_one,
    read_record,
    reason_of,
    score_one,
    write_record,
)
from lvlm_probe.metrics import CurveRule, Score, energy_in_region, pointing_game
from lvlm_probe.models.fingerprint import fingerprint
from lvlm_probe.models.prompts import prompt_rule
from lvlm_probe.pages.plain import plain
from lvlm_probe.pages.selfcheck_page import selfcheck_page
from lvlm_probe.planning import Meter, cost_for, expected, pace, plan_for, weight_bytes
from lvlm_probe.replaying import Replay, replay
from lvlm_probe.replaying.gradient_flow import gradient_check
from lvlm_probe.replaying.verification import Verification, verify
from lvlm_probe.selection import select_tokens
from lvlm_probe.trace import Trace, open_trace
from lvlm_probe.words import spelled

DEFAULT_METHOD = "igos++"
POINTING_TOLERANCE = 15
"""Pixels by which the highest value may miss the object, as customary (Zhang et al., 2018)."""

_PHOTOGRAPHS: Mapping[str, tuple[str, ...]] = {
    "chelsea.png": ("cat", "kitten"),
    "coffee.png": ("coffee", "cup", "mug", "espresso"),
    "rocket.jpg": ("rocket", "launch"),
    "motorcycle_left.png": ("motorcycle", "motorbike", "bike"),
    "astronaut.png": ("astronaut", "woman", "space"),
}
"""Photographs in scikit-image's wheel, all CC0 or in the public domain, and words one of which names what is on it."""

_CURVES = CurveRule(sampling="adaptive", tolerance=0.005)
_QUICK_CURVES = CurveRule(sampling="adaptive", tolerance=0.02, tie_orders=1)
"""How the maps of methods are scored: curves would take most of a quick check's time."""
_QUICK_PASSES = 110
"""Images through the model, forward and backward, of the methods that ``quick`` tries: what gradients cost."""
_METERED = 20.0
"""Seconds of a method, at most, that is run once more under the CPU's meter, which keeps every allocation."""
_LONG_SIDE = 512
"""Of photographs, pixels: what larger ones add is time in the encoder of models that take any size."""


@dataclass(frozen=True)
class Asked:
    """A built-in question.

    Attributes:
        name: of the unit.
        image, question: what is asked about.
        words: an answer is right that has a word of each of these groups.
        region: ``(row, col)`` bool over the image, the objects that the answer needs; ``None`` where nobody marked
            them.
        source: where the image comes from.
    """

    name: str
    image: Image.Image
    question: str
    words: tuple[tuple[str, ...], ...]
    region: np.ndarray | None
    source: str

    def is_right(self, answer: str) -> bool:
        """Tell whether an answer names what is asked for."""
        return all(
            any(re.search(rf"\b{re.escape(word)}", answer, re.IGNORECASE) for word in group) for group in self.words
        )


def questions(*, quick: bool = False) -> list[Asked]:
    """Return the built-in questions: drawn scenes, and photographs where scikit-image is installed."""
    found = [_drawn(scene) for scene in scenes(2 if quick else 12)]
    spec = importlib.util.find_spec("skimage")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "data"
    for name, words in list(_PHOTOGRAPHS.items())[: 1 if quick else None]:
        if folder is not None and (folder / name).is_file():
            with Image.open(folder / name) as file:
                image = file.convert("RGB")
            image.thumbnail((_LONG_SIDE, _LONG_SIDE))
            question = "What is in the image?"
            title = f"photograph {Path(name).stem.partition('_')[0]}"
            found.append(Asked(title, image, question, (words,), None, f"scikit-image, {name} (public domain)"))
    return found


def _drawn(scene: Scene) -> Asked:
    words = tuple((word,) for word in scene.visual_words)
    return Asked(f"scene {scene.index}", scene.image, scene.question, words, scene.mask, "drawn by this package")


class Selfcheck:
    """The checks of one model, kept in a folder.

    Args:
        spec: model directory, hub id, or ``"demo"``.
        folder: where ``selfcheck.json``, ``selfcheck.html`` and the traces go.
        quick: few questions, and methods that take few passes, scored by few points.
        loading: device, dtype, attn, trust_remote_code.
        tell: called with (unit, record) whenever one is there.
    """

    def __init__(
        self,
        spec: str,
        folder: Path,
        *,
        quick: bool,
        loading: Mapping[str, Any],
        tell: Callable[[str, Mapping[str, Any]], None] = lambda unit, record: None,
    ) -> None:
        self.spec, self.folder, self.quick, self._loading, self._tell = spec, folder, quick, dict(loading), tell
        self.page, self.results = folder / "selfcheck.html", folder / "selfcheck.json"
        self.record: dict[str, Any] = {"made_by": f"lvlm_probe {__version__}", "quick": quick, "finished": False}
        self.units: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """What the model is called on the page: of a directory its own name alone."""
        place = Path(self.spec)
        return (place.name or place.resolve().name) if place.exists() else self.spec

    def run(self) -> dict[str, Any]:
        """Make all checks that are missing, and the page. What a check runs into is its result; Ctrl-C is not."""
        self._look()
        if not any(one["state"] == "mend" for one in self.record["findings"] if one["of"] == "model"):
            try:
                model, processor = load_model(self.spec, **self._loading)
            except ProbeError as error:
                self._found("model", {"name": "loading", "state": "mend", "text": str(error), "install": ()})
            else:
                self._resume(model)
                self._answers(model, processor)
                self._methods(model, processor)
                self.record["finished"] = True
        return self.write()

    @property
    def begun(self) -> bool:
        """Whether it is known which model is checked, and so what of the folder is of it."""
        return "key" in self.record

    def write(self) -> dict[str, Any]:
        """Write what there is so far, as a file and as a page."""
        public = self._save()
        with stage("writing the page"):
            shown = {name: self._images(name, unit) for name, unit in self.units.items() if unit.get("trace")}
            selfcheck_page(public, shown, out=self.page)
        return public

    # ------------------------------------------------------------------------------------------------ what is looked at

    def _look(self) -> None:
        """What ``doctor`` says of the environment and, without its weights, of the model."""
        self.record |= {"model": {"name": self.name}, "findings": [], "created": _now()}
        for one in environment():
            self._found("environment", vars(one))
        for one in model_checks(self.spec, **self._loading, attempt=False):
            self._found("model", vars(one))

    def _found(self, of: str, one: Mapping[str, Any]) -> None:
        self.record["findings"].append({"of": of, **one})
        if of == "model" or one["state"] == "mend":
            self._tell("finding", self.record["findings"][-1])

    def _resume(self, model: Any) -> None:
        """Facts of the loaded model; what was found of this very model before is kept."""
        weight = next(model.parameters())
        self.record["model"] |= {
            "class": type(model).__name__,
            "family": str(getattr(model.config, "model_type", "")),
            "parameters": sum(one.numel() for one in model.parameters()),
            "weights": weight_bytes(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(weight.device),
            "attention": str(getattr(model.config, "_attn_implementation", "")),
        }
        decisive = [
            fingerprint(model),
            __version__,
            *(self.record["model"][key] for key in ("dtype", "device", "attention")),
        ]
        self.record["key"] = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]
        before = read_record(self.results, way_out="delete it, or name another folder with --out") or {}
        if before.get("key") == self.record["key"] and isinstance(before.get("units"), dict):
            self.units = {name: unit for name, unit in before["units"].items() if not unit.get("problem")}
        self.record["units"] = self.units

    def _unit(self, name: str, work: Callable[[], dict[str, Any]], *, again: bool = False) -> None:
        """One unit: found finished, or made; whatever it runs into stands in its place."""
        if again or name not in self.units:
            try:
                self.units[name] = plain(work())  # as it is read again: no number that JSON has no place for
            except Exception as error:  # the check of the next one goes on
                self.units[name] = {"problem": reason_of(error)}
            self._save()
        self._tell(name, self.units[name])

    def _save(self) -> dict[str, Any]:
        """Write the file; return what stands in it."""
        public = plain({**self.record, "units": self.units})
        text = json.dumps(public)
        if Path(self.spec).name not in ("", self.spec):  # not of ".", which stands in every number
            text = text.replace(json.dumps(self.spec)[1:-1], json.dumps(self.name)[1:-1])
        cleaned: dict[str, Any] = json.loads(text)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_record(self.results, cleaned)
        return cleaned

    # ---------------------------------------------------------------------------------------------------------- answers

    def _answers(self, model: Any, processor: Any) -> None:
        for asked in questions(quick=self.quick):
            name = f"answer {asked.name}"
            unit = self.units.get(name, {})
            again = bool(unit.get("begun")) or self._trace(unit) is None
            self._unit(name, partial(self._answer, name, asked, model, processor), again=again)

    def _answer(self, name: str, asked: Asked, model: Any, processor: Any) -> dict[str, Any]:
        """An answer and its map; a stop between the two keeps the answer."""
        record = dict(self.units.get(name, {}))
        trace = self._trace(record)
        if trace is None:
            rule = prompt_rule(processor, model)
            question = asked.question if rule is None or rule.asks else None
            trace = ask(model, processor, [asked.image], question, self.folder / "traces", max_new_tokens=32)
            record = {"question": question, **_answered(asked, trace, verify(trace, model, processor))}
            self.units[name] = {**record, "begun": True}
            self._save()
        record.pop("begun", None)
        try:
            player = replay(trace, model, processor)
            stored = self._map(player, MapSettings(DEFAULT_METHOD, {}))
        except ProbeError as error:  # the answer stands, whatever keeps it from being explained
            return {**record, "method": DEFAULT_METHOD, "reason": str(error)}
        return {**record, "map": stored.path.name, **_judged(_of_image(stored), stored.score(), asked.region)}

    def _map(self, player: Replay, settings: MapSettings) -> MapFile:
        """The map of what the image decides of an answer, stored beside its trace."""
        selection, shown = select_tokens(player), partial(bar, timed=False)
        folder = self.folder / "traces" / FOLDER
        return explain_one(player, selection, label_of(selection), settings, folder, shown=shown)[0]

    def _trace(self, unit: Mapping[str, Any]) -> Trace | None:
        """The trace of an answer's unit, while it is there."""
        try:
            return open_trace(self.folder / "traces" / Path(str(unit["trace"])).name)
        except (ProbeError, OSError, KeyError):
            return None

    def _images(self, name: str, unit: Mapping[str, Any]) -> tuple[Image.Image, Image.Image | None] | None:
        """The image of an answer, and its map over it."""
        stored = MapFile(self.folder / "traces" / FOLDER / Path(str(unit.get("map"))).name)
        try:
            heat = _of_image(stored)
            return heat.image(), None if heat.values is None else heat.preview(400, score=stored.score())
        except ProbeError:
            return None

    # ---------------------------------------------------------------------------------------------------------- methods

    def _methods(self, model: Any, processor: Any) -> None:
        """Gradients, and every method, on one answer: the first right one, else the first one."""
        answers = [unit for unit in self.units.values() if unit.get("trace")]
        best = next((unit for unit in answers if unit["right"] and unit.get("gain") is not None), None)
        chosen = best or next(iter(answers), None)
        trace = None if chosen is None else self._trace(chosen)
        if trace is None:
            return
        self.record["methods_on"] = {"question": trace.question, "answer": trace.answer.strip()}
        try:
            player = replay(trace, model, processor)
        except ProbeError as error:  # in memory that an answer had
            self.units["methods"] = {"problem": str(error)}
            self._tell("methods", self.units["methods"])
            return
        self._unit("gradient", lambda: asdict(gradient_check(player, player.replica, player.anatomy.decoder)))
        there = {name: self.units[unit] for name in methods() if (unit := f"method {name}") in self.units}
        missing = [name for name in methods() if name not in there and not (self.quick and _is_long(player, name))]
        seconds = {name: (unit.get("planned") or {}).get("seconds") for name, unit in there.items()}
        seconds |= dict.fromkeys(missing)
        if missing:
            # What goes wrong there, methods say themselves.
            with stage("timing a few passes"), suppress(ProbeError):
                seconds |= expected(player, missing, pace(player))
        for name in sorted(seconds, key=lambda name: _or_infinite(seconds[name])):
            self._unit(f"method {name}", partial(self._method, player, name, seconds[name]))

    def _method(self, player: Replay, name: str, seconds: float | None) -> dict[str, Any]:
        """One method: what the plan says of it, what it took, and how good its map is."""
        record: dict[str, Any] = {"planned": {"seconds": seconds}}
        try:
            planned = plan_for(player, name, {})
            record["planned"] |= {"peak": planned.peak, "forward": planned.forward, "backward": planned.backward}
            stored = self._map(player, MapSettings(name, {}, scored=False))
            heat = _of_image(stored)
            record["peak"] = _peak(player, name, heat)
            if heat.values is None:
                return {**record, "refused": heat.reason}
            curve = _QUICK_CURVES if self.quick else _CURVES
            scored = score_one(player, stored, shown=partial(bar, timed=False), grid=32, curve=curve)
            return record | _judged(heat, scored, None)
        except ProbeError as error:  # what a method cannot do on a model is a result
            return {**record, "refused": str(error)}


def _of_image(stored: MapFile) -> Heatmap:
    """A map of one of the built-in images."""
    return cast(Heatmap, stored.read())


def _or_infinite(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


def _answered(asked: Asked, trace: Trace, found: Verification) -> dict[str, Any]:
    """What an answer is, and whether its replay says the same."""
    llr = [None if trace.llr is None else float(trace.llr[word.start : word.stop].sum()) for word in trace.words]
    shown = ["" if flag else piece for piece, flag in zip(trace.tokens, trace.special, strict=True)]
    spellings, _ = spelled(shown, trace.words)
    return {
        "trace": trace.path.name,
        "source": asked.source,
        "expected": [" or ".join(group) for group in asked.words],
        "answer": trace.answer.strip(),
        "right": asked.is_right(trace.answer),
        "words": [[*parts, ratio] for parts, ratio in zip(spellings, llr, strict=True)],
        "difference": found.largest_difference,
        "allowed": found.allowed(found.step),
        "same": found.within(),
    }


def _is_long(player: Replay, name: str) -> bool:
    cost = cost_for(player, name)
    return cost.forward is None or cost.forward + (cost.backward or 0) > _QUICK_PASSES


def _peak(player: Replay, name: str, heat: Heatmap) -> int | None:
    """Most bytes alive at once beside the weights, of one more run; ``None`` where it takes long or is not metered."""
    if not Meter.counts(player.device) or float(heat.provenance.get("seconds") or 0.0) > _METERED:
        return None
    meter = Meter(player.device)
    with meter.running():
        explain(player, method=name, tokens=heat.selection, progress=False)
    return meter.reading.peak


def _judged(heat: Heatmap, score: Score | None, region: np.ndarray | None) -> dict[str, Any]:
    """A map's numbers: cost, scores, verdict, and where it points where the region is known."""
    passes = heat.provenance.get("passes") or {}
    record: dict[str, Any] = {
        "method": heat.method,
        "seconds": heat.provenance.get("seconds"),
        "forward": passes.get("forward"),
        "backward": passes.get("backward"),
        "reason": heat.reason,
        "cells": None if heat.values is None else list(heat.shape),
    }
    if score is not None and heat.values is not None:
        record |= {"deletion": score.deletion, "insertion": score.insertion, "gain": score.gain}
        record |= {"trusted": score.verdict.trusted, "verdict": str(score.verdict)}
    if region is not None and heat.values is not None:
        record["pointing"] = pointing_game(heat, region, tolerance=POINTING_TOLERANCE)
        record["energy"] = energy_in_region(heat, region)
    return record


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
