"""Heatmaps, scores and their traces as the plain JSON that the page draws.

A sample is one trace with its maps. Whatever cannot be read (a heatmap loaded without its trace, a trace file that has
gone) leaves a hole in the sample and a sentence in its ``notes``; it never stops the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_probe.drawing import difference, mark_of, overlay
from lvlm_probe.errors import ProbeError
from lvlm_probe.images import make_baseline
from lvlm_probe.metrics.verdict import BASELINE_PROBABILITY
from lvlm_probe.pages.data_uris import data_uri, encode_seen, encode_values, shrink
from lvlm_probe.pages.edits import edits_of
from lvlm_probe.pages.plain import nats, plain, probability, without_folders
from lvlm_probe.replaying.own_scores import Contrast
from lvlm_probe.words import Word, distinct_texts, group_words, spelled

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.heatmap import HeatGrid, Heatmap
    from lvlm_probe.metrics import Score
    from lvlm_probe.metrics.scoring import Explained
    from lvlm_probe.trace import Trace
    from lvlm_probe.video import ClipHeatmap

_THUMB_SIDE = 160
_BASELINE_SIDE = 448
_MODEL_FACTS = (
    "model_id",
    "revision",
    "class",
    "adapter",
    "attn_implementation",
    "torch_dtype",
    "fingerprint",
    "versions",
)


def gather(heats: Sequence[Heatmap], scores: Sequence[Score | None]) -> list[dict[str, Any]]:
    """Group heatmaps by trace, in the order of first appearance, and describe each group as one sample."""
    groups: dict[str, list[tuple[Heatmap, Score | None]]] = {}
    for number, (heat, score) in enumerate(zip(heats, scores, strict=True)):
        groups.setdefault(_trace_id(heat) or f"untraced {number + 1}", []).append((heat, score))
    return [_sample(trace_id, group) for trace_id, group in groups.items()]


def _trace_id(heat: Heatmap) -> str:
    return str(heat.provenance.get("trace_id") or "")


def _sample(trace_id: str, group: Sequence[tuple[Heatmap, Score | None]]) -> dict[str, Any]:
    heats = [heat for heat, _ in group]
    trace = next((heat.trace for heat in heats if heat.trace is not None), None)
    notes: list[str] = []
    if trace is None:
        notes.append(
            "This page was written without the trace, so the image, the question and the probabilities are missing. "
            "Write it again with the trace file at hand."
        )
    answer = answer_of(trace, heats[0], notes)
    baselines: dict[str, str | None] = {}
    images = read(trace, "images", notes) or []
    maps = [_map(heat, score, images, heats[0], baselines) for heat, score in group]
    for entry in maps:
        entry["label"] = _label(entry, maps, answer["words"])
    if trace is not None and read(trace, "status", notes) == "error":
        notes.append(f"The recording is marked as faulty: {read(trace, 'error', notes) or 'no reason given'}")
    if trace is not None and len(images) <= max(heat.image_index for heat in heats):
        notes.append("The image itself is not in the trace: it was recorded without a processor and without images=.")
    shown = {str(index): _image(images, index, heats) for index in sorted({heat.image_index for heat in heats})}
    question = read(trace, "question", notes)
    return {
        "id": trace_id,
        "question": str(question or read(trace, "prompt", notes) or ""),
        "asked": "Question" if question or trace is None else "Prompt",
        **answer,
        "images": shown,
        "strip": strip_of(images) if len(images) > 1 else [],
        "baselines": baselines,
        "maps": maps,
        "sides": _sides(group, images),
        "notes": [without_folders(note) for note in dict.fromkeys(notes)],
        "provenance": _recording(trace, trace_id, notes),
    }


def _sides(group: Sequence[tuple[Heatmap, Score | None]], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Contrasts of which both sides have a map: the two maps, and one against the other, drawn."""
    found = []
    scores = {id(heat): score for heat, score in group}
    for heat in (heat for heat, _ in group if heat.values is not None):
        own = heat.selection.score
        if not isinstance(own, Contrast) or own.turned or heat.image_index >= len(images):
            continue
        same = (heat.method, heat.image_index, own.other_way())
        other = next(
            (o for o, _ in group if o and (o.method, o.image_index, o.selection.score) == same), None
        )  # a heatmap without values is false
        if other is None:
            continue
        small = shrink(images[heat.image_index], _BASELINE_SIDE)
        named = " or ".join(own.texts)
        drawn = [
            overlay(small, np.asarray(one.values), seen=one.seen, mark=mark_of(scores[id(one)]))
            for one in (heat, other)
        ]
        drawn.append(difference(small, np.asarray(heat.values), np.asarray(other.values)))
        captions = [
            f"Speaks for “{own.said}”, against “{named}”",
            f"Speaks for “{named}”, against “{own.said}”",
            f"One against the other: orange for “{own.said}”, blue for “{named}”",
        ]
        found.append(
            {
                "title": f"Why “{own.said}” and not “{named}”?",
                "method": str(heat.method),
                "drawn": [
                    {"src": data_uri(image, quality=84), "text": text}
                    for image, text in zip(drawn, captions, strict=True)
                ],
            }
        )
    return found


def strip_of(images: Sequence[Image.Image]) -> list[str]:
    """All images of a prompt, small, as ``data:`` URIs."""
    return [data_uri(shrink(image, _THUMB_SIDE), quality=72) for image in images]


def read(trace: Trace | None, name: str, notes: list[str]) -> Any:
    """An attribute of the trace; None, and a note, when the file does not give it any more."""
    if trace is None:
        return None
    try:
        return getattr(trace, name, None)
    except (ProbeError, OSError) as error:
        notes.append(f"The trace could not be read: {error}")
        return None


def answer_of(trace: Trace | None, heat: Explained, notes: list[str]) -> dict[str, Any]:
    """The answer's tokens and words with their numbers, and which of them the first heatmap is about."""
    selection = heat.selection
    pieces = [str(piece) for piece in (read(trace, "tokens", notes) or selection.tokens)]
    steps = len(pieces)
    special = _flags(read(trace, "special", notes), pieces, selection.skipped)
    with_image = _column(read(trace, "log_probs", notes), steps)
    recorded = _column(read(trace, "baseline_log_probs", notes), steps)
    # The selection's ratios are the replayed ones, on the baseline that was really used: they go first.
    ratios = _column(selection.llr, steps)
    if not np.isfinite(ratios).any():
        ratios = with_image - recorded
    without = with_image - ratios
    words = group_words(pieces, special)
    shown = ["" if flag else piece for piece, flag in zip(pieces, special, strict=True)]
    texts, tail = spelled(shown, words)
    rows = []
    for word, (before, text) in zip(words, texts, strict=True):
        span = slice(word.start, word.stop)
        rows.append(
            {
                "text": text,
                "before": before,
                "tokens": list(range(word.start, word.stop)),
                "p": probability(with_image[span].sum()),
                "p0": probability(without[span].sum()),
                "llr": nats(ratios[span].sum()),
            }
        )
    return {
        "answer": "".join(shown).strip(),
        "words": rows,
        "tail": tail,
        "tokens": [
            {"text": piece, "special": flag, "p": probability(a), "p0": probability(b), "llr": nats(c)}
            for piece, flag, a, b, c in zip(pieces, special, with_image, without, ratios, strict=True)
        ],
        "whole": [int(index) for index in selection.indices],
        "rule": str(selection.rule),
        "alpha": plain(selection.params.get("alpha")),
        "skipped": {str(index): str(reason) for index, reason in selection.skipped.items()},
        "llrKnown": bool(np.isfinite(ratios).any()),
    }


def _flags(special: Any, pieces: Sequence[str], skipped: Mapping[int, str]) -> list[bool]:
    if special is not None and len(special) == len(pieces):
        return [bool(flag) for flag in special]
    return [
        str(skipped.get(index, "")).startswith("special") or (piece.startswith("<") and piece.endswith(">"))
        for index, piece in enumerate(pieces)
    ]


def _column(values: Any, steps: int) -> np.ndarray:
    """Per-token numbers as ``(step,)`` float64, NaN where they are not known."""
    if values is None:
        return np.full(steps, np.nan)
    column = np.asarray(plain(values), dtype=np.float64).reshape(-1)
    return column if column.shape == (steps,) else np.full(steps, np.nan)


def _map(
    heat: Heatmap,
    score: Score | None,
    images: Sequence[Image.Image],
    first: Heatmap,
    baselines: dict[str, str | None],
) -> dict[str, Any]:
    selection = heat.selection
    empty = heat.values is None
    return {
        "method": str(heat.method),
        "image": str(heat.image_index),
        "tokens": [int(index) for index in selection.indices],
        "whole": heat is first
        or (
            (selection.rule, selection.indices, selection.score)
            == (first.selection.rule, first.selection.indices, first.selection.score)
        ),
        "asked": selection.rule in ("words", "span", "indices") or selection.indices != first.selection.indices,
        "scored": None if selection.score is None else selection.score.name,
        "values": None if empty else encode_values(np.asarray(heat.values)),
        "reason": str(heat.reason or "") if empty else "",
        "baseline": _baseline(heat, score, images, baselines),
        "score": None if score is None or empty or score.reason is not None else _score(score),
        "scoring": None if score is None else _without_curves(score),
        "verdict": verdict_of(heat, score),
        "sanity": [*sanity_of(heat), *_said_box(heat)],
        "box": _box_of(heat),
        "edits": edits_of(heat, images),
        "provenance": {
            "method": str(heat.method),
            "parameters": plain(dict(heat.params)),
            "selection": {"rule": str(selection.rule), **plain(dict(selection.params))},
            "image_index": int(heat.image_index),
            **{
                str(key): plain(value)
                for key, value in heat.provenance.items()
                if key not in ("sanity", "edits", "box")
            },
        },
    }


def _label(entry: Mapping[str, Any], maps: Sequence[Mapping[str, Any]], words: Sequence[Mapping[str, Any]]) -> str:
    """What the button says: whole answer or the words, plus method and image where the maps differ in them."""
    if entry["scored"] is not None:
        rule = f"“{entry['scored']}”"
    elif not entry["asked"]:
        rule = "Selected words" if all(other["whole"] for other in maps) else "Whole answer"
    else:
        told = distinct_texts(Word(str(word["text"]), 0, 0) for word in words)
        chosen = [text for word, text in zip(words, told, strict=True) if set(word["tokens"]) & set(entry["tokens"])]
        rule = f"“{' '.join(chosen[:4])}{' …' if len(chosen) > 4 else ''}”"
    if len({other["method"] for other in maps}) > 1:
        rule += f" · {entry['method']}"
    if len({other["image"] for other in maps}) > 1:
        rule += f" · image {int(entry['image']) + 1}"
    return rule


def _score(score: Score) -> dict[str, Any]:
    def curve(name: str) -> list[float] | None:
        values = getattr(score, name, None)
        return None if values is None or not len(values) else plain(values)

    gains = [float(gain) for gain in score.random_gains]
    return {
        "deletion": plain(score.deletion),
        "insertion": plain(score.insertion),
        "fractions": plain(score.fractions),
        "deletion_curve": plain(score.deletion_curve),
        "insertion_curve": plain(score.insertion_curve),
        "deletion_raw": curve("deletion_raw"),
        "insertion_raw": curve("insertion_raw"),
        "tie_share": plain(score.tie_share),
        "unit": _unit(score),
        "own": score.params.get("own_score"),
        "remarks": [_sentence(remark) for remark in score.remarks],
        "best_random": max(gains, default=None),
        "randoms": len(gains),
        "center": plain(float(score.center_gain)),
        "synergy": plain(float(score.synergy)),
        "together": plain((score.params.get("synergy") or {}).get("curve", [None])[-1]),
    }


def _unit(score: Score) -> str:
    """What raw curves are in: nats, a probability, or the unit of a score of the user's own."""
    if score.params.get("followed") == "own":
        return "own"
    return "nats" if score.params.get("score") == "log" else "probability"


def _without_curves(score: Score) -> dict[str, Any]:
    return {
        key: value for key, value in plain(score.to_dict()).items() if not isinstance(value, list) or len(value) < 9
    }


def verdict_of(heat: Heatmap | ClipHeatmap, score: Score | None) -> dict[str, Any]:
    """What to believe of a map: a state, a title, and sentences; also where it has few cells, or is an estimate."""
    found = _verdict(heat, score)
    more = [_sentence(said) for said in (heat.coarse, heat.uncertainty) if said is not None]
    return {**found, "reasons": [*found["reasons"], *more]}


def _verdict(heat: Explained, score: Score | None) -> dict[str, Any]:
    if heat.values is None:
        reason = str(heat.reason or "nothing was selected")
        return {"state": "empty", "title": "No map to show.", "reasons": [_sentence(reason)]}
    if score is None:
        server = heat.provenance.get("server")
        gives = server.get("gives") if isinstance(server, Mapping) else None
        way_out = "Run evaluate() and pass its result."
        if gives in ("bounds", "samples"):
            way_out = f"A score takes log-probabilities, and the server gave {gives} alone."
        reasons = [f"No score came with this map, so nothing says whether to believe it. {way_out}"]
        return {"state": "unchecked", "title": "Not checked.", "reasons": reasons}
    if score.verdict.trusted:
        reasons = ["Removing what the map marks takes the words away, showing only that brings them back."]
        return {"state": "trusted", "title": "The map holds up.", "reasons": reasons}
    return {
        "state": "doubted",
        "title": "Do not trust this map:",
        "reasons": [_sentence(str(r)) for r in score.verdict.reasons],
    }


def sanity_of(heat: HeatGrid) -> list[dict[str, str]]:
    """A line for every sanity check that the heatmap carries: its title, its verdict and the verdict's sentence."""
    checks = heat.provenance.get("sanity")
    lines = []
    for name, title in _CHECKS.items():
        record = checks.get(name) if isinstance(checks, Mapping) else None
        state = _STATES.get(str(record.get("verdict"))) if isinstance(record, Mapping) else None
        if record and state:
            said = f"{title}: {record['verdict']}"
            lines.append({"state": state, "title": said, "reason": _sentence(str(record.get("reason") or "")[:600])})
    return lines


def _box_of(heat: Heatmap) -> list[float] | None:
    """The box (or point) that the answer says, in shares of the image: left, top, right, bottom."""
    record = heat.provenance.get("box")
    pixels = record.get("pixels") if isinstance(record, Mapping) else None
    if not isinstance(pixels, list | tuple) or not all(isinstance(value, int | float) for value in pixels):
        return None
    shares = [float(value) / heat.image_size[k % 2] for k, value in enumerate(pixels)]
    if len(shares) not in (2, 4) or not all(abs(value) < 1e6 for value in shares):
        return None
    return shares if len(shares) == 4 else [*shares, *shares]


def _said_box(heat: Heatmap) -> list[dict[str, str]]:
    """Whether the map looks where the answer says, as a line beside those of the sanity checks."""
    record = heat.provenance.get("box")
    state = _BOXES.get(str(record.get("verdict"))) if isinstance(record, Mapping) else None
    if record is None or state is None:
        return []
    title = str(record.get("label") or record.get("kind") or "box")[:100]
    p = record.get("p")
    if isinstance(p, float):
        title += f", P {p:.2g}"
    return [{"state": state, "title": title, "reason": _sentence(str(record.get("sentence") or "")[:600])}]


_BOXES = {"agrees": "trusted", "elsewhere": "doubted", "partly": "unchecked", "cannot say": "unchecked"}
_CHECKS = {
    "weights": "Random weights",
    "answers": "Other words",
    "seeds": "Other random numbers",
    "prompts": "Another wording",
}
_STATES = {"passes": "trusted", "fails": "doubted", "cannot say": "unchecked"}


def _sentence(text: str) -> str:
    text = without_folders(text.strip())
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _baseline(
    heat: Heatmap, score: Score | None, images: Sequence[Image.Image], baselines: dict[str, str | None]
) -> dict[str, Any]:
    """What the baseline was, and whether it hides the explained words; its small image goes into `baselines`."""
    facts = dict(heat.provenance.get("baseline") or {})
    check = dict(score.baseline_check) if score is not None else {}
    measured = check.get("mean_probability", facts.get("mean_probability"))
    kind = str(facts.get("kind") or "")
    settings = {key: facts[key] for key in ("strength", "seed") if facts.get(key) is not None}
    if facts.get("limit"):  # the blur's limit, an infinite strength, has none to name
        name = f"{kind}, down to the {facts['limit']}"
        kind, settings = "mean", {}
    else:
        name = ", ".join([kind, *(f"{key} {plain(value)}" for key, value in settings.items())])
    shown = f"{heat.image_index}: {name}"
    if heat.values is not None and shown not in baselines:
        baselines[shown] = _remade(images, heat.image_index, kind, settings)
    return {
        "name": name,
        "probability": plain(measured),
        "original": plain(check.get("original_probability")),
        "threshold": plain(check.get("limit", BASELINE_PROBABILITY)),
        "image": shown,
    }


def _remade(images: Sequence[Image.Image], index: int, kind: str, settings: Mapping[str, Any]) -> str | None:
    """The baseline, made again from its description; None where that is not possible (a user's own image)."""
    if kind not in ("blur", "blank", "noise", "mean") or index >= len(images):
        return None
    return data_uri(shrink(make_baseline(images[index], kind, **settings).image, _BASELINE_SIDE), quality=78)


def _image(images: Sequence[Image.Image], index: int, heats: Sequence[Heatmap]) -> dict[str, Any]:
    heat = next(heat for heat in heats if heat.image_index == index)
    width, height = heat.image_size
    entry: dict[str, Any] = {"src": None, "thumb": None, "w": int(width), "h": int(height), "seen": None}
    if heat.seen is not None:
        entry["seen"] = encode_seen(np.asarray(heat.seen))
    if index < len(images):
        entry["src"] = data_uri(shrink(images[index]))
        entry["thumb"] = data_uri(shrink(images[index], _THUMB_SIDE), quality=72)
    return entry


def _recording(trace: Trace | None, trace_id: str, notes: list[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {"trace_id": trace_id}
    if trace is None:
        return facts
    path = read(trace, "path", notes)
    if path:
        facts["file"] = PurePath(str(path)).name
    for name in ("row", "status", "created", "meta"):
        value = read(trace, name, notes)
        if value not in (None, "", {}):
            facts[name] = plain(value)
    model = read(trace, "model", notes) or {}
    for name in _MODEL_FACTS:
        if model.get(name) not in (None, "", {}):
            facts[name] = plain(model[name])
    recorded = read(trace, "notes", notes)
    if recorded:
        facts["not_recorded"] = plain(list(recorded))
    return facts
