"""Work of one unit: a model answers a question; a method explains an answer, and the judges score the map.

A unit returns a record, JSON-ready. What varies from run to run (seconds, memory) stands under ``measured``; all else
is the same however often, on however many machines and in whatever order the units are done.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lvlm_probe.errors import ExplainError, ProbeError
from lvlm_probe.explainers import explain
from lvlm_probe.files import part_path
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.importing.drops import drop_of
from lvlm_probe.metrics import (
    CurveRule,
    average_precision,
    energy_in_region,
    evaluate,
    human_agreement,
    iou,
    pointing_game,
    tube_energy,
    tube_iou,
    tube_pointing,
)
from lvlm_probe.recording.answering import record_answer
from lvlm_probe.replaying import Replay, replay
from lvlm_probe.serving import Server
from lvlm_probe.study.run.cost_record import Stopwatch, map_memory
from lvlm_probe.study.run.token_rules import tokens_by
from lvlm_probe.study.run.units import method_content
from lvlm_probe.study.run.word_maps import add_words
from lvlm_probe.trace import Trace, open_trace
from lvlm_probe.video import ClipHeatmap
from lvlm_probe.video import explain as explain_clip

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.study.spec import MethodSpec, Study

POINTING_TOLERANCE = 15
"""Pixels by which the highest point may miss the region: the margin of the pointing game (Zhang et al., 2018)."""


def answer_unit(
    study: Study,
    model: torch.nn.Module | Server,
    processor: Any,
    image: Image.Image | Path,
    question: str,
    trace_file: Path,
) -> dict[str, Any]:
    """A model's greedy answer, recorded as a trace, and how much of its probability the image is worth.

    Args:
        image: an image, or the file of a video.
        trace_file: where the trace goes; appears there whole or not at all.

    Raises:
        ProbeError: nothing was recorded, or the recording is faulty.
    """
    watch = Stopwatch()
    # A name of its own: machines that share the directory may both do a unit that one seemed to have lost.
    directory = part_path(trace_file)
    most, baseline = study.settings.max_new_tokens, study.settings.baseline
    try:
        if isinstance(model, Server):
            if isinstance(image, Path):
                raise ProbeError("a server is sent images, no videos: load the model here")
            made = model.ask(image, question, out=directory, max_tokens=most, baseline=baseline)
        else:
            shown: dict[str, Any] = {"images": [image]}
            if isinstance(image, Path):
                settings = study.settings
                shown = {"images": [], "videos": [image], "num_frames": settings.num_frames, "fps": settings.fps}
            made = record_answer(
                model, processor, question=question, directory=directory, generate={"max_new_tokens": most},
                baseline=baseline, **shown,
            )  # fmt: skip
        os.replace(made.path, trace_file)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    trace = open_trace(trace_file)
    return {
        "answer": trace.answer,
        "tokens": len(trace.token_ids),
        **drops(trace),
        "measured": {
            "seconds": watch.seconds(),
            **watch.taken("cpu" if isinstance(model, Server) else next(model.parameters()).device),
        },
    }


def drops(trace: Trace) -> dict[str, float]:
    """Measure the fall of an answer's probability on the baseline image, as a share of what it was (paper, §4.2).

    Returns:
        the fields of ``drops.Drop``, no infinity among them: a record holds none.

    Raises:
        ExplainError: the trace holds no baseline pass, or no token but special ones.
    """
    if trace.llr is None:
        why = "".join(f" ({note})" for note in trace.notes if "log-likelihood ratios" in note)
        raise ExplainError(f"the trace holds no log-likelihood ratios{why}, so nothing says what the image is worth")
    found = dataclasses.asdict(drop_of(trace.log_probs, trace.llr, trace.special))
    return {name: max(value, -sys.float_info.max) for name, value in found.items()}


def map_unit(
    study: Study, player: Replay, method: MethodSpec, annotations: Mapping[str, Any], map_file: Path
) -> dict[str, Any]:
    """A method's map of one answer, stored, with its scores.

    Deletion and insertion are taken against the baseline that the map was made with, on the tokens that it explains, as
    in the paper. Where a row explains other tokens, or uses another baseline, than the study does, ``common`` holds the
    scores on the study's own, which rows can be compared by; ``None`` where the study's own rule selects nothing.
    Rows that do as the published code does also get ``release``: the areas by that code's rule, for the ledger.

    Args:
        player: the answer on its model.
        annotations: of the sample: ``region`` (mask or boxes that the answer needs), ``human`` (human attention).
        map_file: where the heatmap goes.
    """
    settings, watch = study.settings, Stopwatch()
    alpha = settings.alpha if method.alpha is None else method.alpha
    own = tokens_by(method.tokens, player, alpha=alpha)
    usual = tokens_by("llr", player, alpha=settings.alpha)
    over = player.over(method.baseline or settings.baseline)
    made = explain_clip if player.clips else explain
    heat = made(over, tokens=own, seed=settings.seed, progress=False, **method.asked)
    heat.write(map_file)
    if not heat:
        empty = {"map": None, "reason": heat.reason, "text": heat.selection.text}
        return {**empty, "measured": {"seconds": heat.provenance["seconds"], **watch.taken(player.device)}}
    judged = Stopwatch()
    scores = _scores(study, heat, over)
    measured = {"seconds": heat.provenance["seconds"], "judged_seconds": judged.seconds()}
    same = method_content(study, method)  # rows that ask for one map share it
    costed = any(9 in row.tables for row in study.methods.values() if method_content(study, row) == same)
    memory = map_memory(over, method, heat, own, seed=settings.seed, measure=costed)
    if method.behaviour == "release":
        own_rule = evaluate(
            heat,
            over,
            grid=_grid(study, heat),
            center=False,
            curve=CurveRule(auc="release", seed=settings.seed),
            progress=False,
        )
        scores["release"] = {"deletion": own_rule.deletion, "insertion": own_rule.insertion}
    record: dict[str, Any] = {
        "map": map_file.name,
        "text": heat.selection.text,
        "selected": len(heat.selection.indices),
        "passes": dict(heat.provenance["passes"]),
        **scores,
    }
    if usual and (usual.indices != heat.selection.indices or method.baseline not in (None, settings.baseline)):
        common = player.over(settings.baseline).strengthened(usual.decided)
        record["common"] = _scores(study, dataclasses.replace(heat, selection=usual), common, own_baseline=True)
    elif not usual:
        record["common"] = {"deletion": None, "insertion": None}
    record |= _places(heat, annotations) if isinstance(heat, Heatmap) else _places_in_time(heat, annotations)
    if settings.words:
        record["words"] = add_words(study, player, method, heat, map_file)
    record["measured"] = {**measured, "memory": memory, **watch.taken(player.device)}
    return record


def open_replay(trace_file: Path, model: torch.nn.Module | Server, processor: Any) -> Replay:
    """The answer of a trace on its model; on a server, what offers as much of a replay as that can."""
    return replay(open_trace(trace_file), model, processor)  # type: ignore[arg-type, return-value]


def _grid(study: Study, heat: Heatmap | ClipHeatmap) -> int | None:
    """What a map is ranked on: one of a video on its own cells."""
    return study.settings.grid if isinstance(heat, Heatmap) else None


def _scores(study: Study, heat: Heatmap | ClipHeatmap, player: Replay, *, own_baseline: bool = False) -> dict[str, Any]:
    settings = study.settings
    baseline = player.baseline if own_baseline else None
    score = evaluate(
        heat, player, baseline=baseline, steps=settings.steps, grid=_grid(study, heat),
        curve=CurveRule(seed=settings.seed),         progress=False,
    )  # fmt: skip
    return {
        "deletion": score.deletion,
        "insertion": score.insertion,
        "tie_share": score.tie_share,
        "center_gain": score.center_gain if math.isfinite(score.center_gain) else None,
        "baseline_check": dict(score.baseline_check),
        "trusted": score.verdict.trusted,
        "verdict": str(score.verdict),
    }


def _places_in_time(heat: ClipHeatmap, annotations: Mapping[str, Any]) -> dict[str, Any]:
    """Scores against the boxes of a video, of each frame those that hold at its number in the file."""
    region = annotations.get("region")
    if not isinstance(region, Mapping) or heat.clip.indices is None:
        return {}
    begun = [[start for start in region if start <= index] for index in heat.clip.indices]
    tube = {number: region[max(starts)] for number, starts in enumerate(begun) if starts and region[max(starts)]}
    if not tube:
        return {}  # none of the frames that were sampled shows it
    return {"pointing": tube_pointing(heat, tube), "energy": tube_energy(heat, tube), "iou": tube_iou(heat, tube)}


def _places(heat: Heatmap, annotations: Mapping[str, Any]) -> dict[str, Any]:
    """Scores against what the sample is annotated with."""
    found: dict[str, Any] = {}
    region = annotations.get("region")
    if region is not None:
        found["pointing"] = pointing_game(heat, region, tolerance=POINTING_TOLERANCE)
        found["energy"] = energy_in_region(heat, region)
        found["average_precision"] = average_precision(heat, region)
        found["iou"] = iou(heat, region)
    humans = annotations.get("human")
    if humans is not None:
        maps = [np.asarray(item) for item in (humans if isinstance(humans, list | tuple) else [humans])]
        try:
            found["human"] = [human_agreement(heat, item).to_dict() for item in maps]
        except ProbeError as error:  # scipy is missing, or an annotation is faulty: the map and its scores are not
            found["human_failed"] = str(error)
    return found
