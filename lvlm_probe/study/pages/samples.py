"""The samples of a study as the plain JSON that the page draws.

A sample has two parts: what it is sorted and filtered by (``index``), which the page holds of all samples, and its
image, words and maps (``detail``), which a page of thousands loads when it is scrolled to.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_probe.errors import ProbeError
from lvlm_probe.heatmap import Heatmap, resample
from lvlm_probe.metrics.similarity import on_grid, spearman
from lvlm_probe.pages.data_uris import data_uri, encode_seen, packed_bits, shrink
from lvlm_probe.pages.plain import rounded, without_folders
from lvlm_probe.progress import Progress
from lvlm_probe.study.pages.changes import Region, changed_region, looking, order_of, question_diff, references, stance
from lvlm_probe.study.pages.stored import Key, Opened, Stored, selected_words, words_of
from lvlm_probe.study.tables.cells import objection

if TYPE_CHECKING:
    from lvlm_probe.study.results import Results

IMAGE_SIDE = 336
"""Longest side of an embedded image, pixels."""

MAP_SIDE = 48
"""A map finer than this along a side is averaged down for the page; scores and agreement are those of the whole map."""

_REGION_SIDE = 96


def gather(results: Results, *, tell: Progress | None = None) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Index and detail of every sample with an answer, sets together, in the study's order.

    Args:
        tell: Called with (done, total) samples.
    """
    stored = Stored(results)
    sets = _sets(stored)
    order = _ordered(stored, sets)
    places = {key: number for number, key in enumerate(order)}
    compared = {
        members[number]: members[other]
        for members in sets.values()
        for number, other in references([_about(stored, key) for key in members]).items()
    }
    for number, key in enumerate(order):
        index, detail = _sample(results, stored, key)
        index["n"] = number
        if key in compared and (compared[key] in places):
            index["ref"] = places[compared[key]]
            _compare(stored, key, compared[key], index, detail)
        yield index, detail
        if tell is not None:
            tell(number + 1, len(order))


def rank_correlation(first: Heatmap, second: Heatmap) -> float | None:
    """Spearman's ρ over the cells that both see, as ``compare_maps`` has it; ``None`` where it is not defined, or scipy
    is not installed."""
    if first.values is None or second.values is None or first.image_size != second.image_size:
        return None
    assert first.seen is not None and second.seen is not None
    right = on_grid(np.asarray(second.values), first.shape)
    seen = first.seen & (on_grid(second.seen.astype(np.float32), first.shape) > 0)
    try:
        return rounded(spearman(np.asarray(first.values, dtype=np.float64)[seen], right[seen]), 3)
    except ProbeError:
        return None


# ------------------------------------------------------------------------------------------------------------- samples


def _sets(stored: Stored) -> dict[tuple[str, str], list[Key]]:
    """(data set, set) → its members, the original first; sets of one are none."""
    found: dict[tuple[str, str], list[Key]] = {}
    for key in stored.answers:
        name = _about(stored, key).get("set")
        if name is not None:
            found.setdefault((key[0], str(name)), []).append(key)
    for members in found.values():
        members.sort(key=lambda key: order_of(_about(stored, key).get("role")))
    return {name: members for name, members in found.items() if len(members) > 1}


def _ordered(stored: Stored, sets: Mapping[tuple[str, str], Sequence[Key]]) -> list[Key]:
    """All samples, those of a set one after the other, so that few files hold them."""
    of = {key: members for members in sets.values() for key in members}
    found: dict[Key, None] = {}
    for key in stored.answers:
        found.update(dict.fromkeys(of.get(key, [key])))
    return list(found)


def _about(stored: Stored, key: Key) -> Mapping[str, Any]:
    """What all models' records say of a sample."""
    return next(iter(stored.answers[key].values()))


def _sample(results: Results, stored: Stored, key: Key) -> tuple[dict[str, Any], dict[str, Any]]:
    study, records, opened = results.study, stored.answers[key], stored.open(key)
    about = _about(stored, key)
    models, rows = list(study.models), list(study.methods)
    truth = about.get("true_answer")
    index: dict[str, Any] = {
        "dataset": list(study.datasets).index(key[0]),
        "id": key[1],
        "group": about.get("group"),
        "set": about.get("set"),
        "role": about.get("role"),
        "question": about["question"],
        "truth": truth if truth is None or isinstance(truth, str) else " / ".join(dict.fromkeys(map(str, truth))),
        "dropped": _told(results.dropped.get(key[0], {}).get(key[1])),
        "size": None if opened.image is None else list(opened.image.size),
        "answers": [_answer(records.get(model)) for model in models],
        "maps": [[_scores(stored.maps.get(key, {}).get((model, row))) for row in rows] for model in models],
    }
    heats = opened.heats
    by_models = [_pairs([heats.get((model, row)) for model in models]) for row in rows]
    by_methods = [_pairs([heats.get((model, row)) for row in rows]) for model in models]
    index["agree"] = {"models": [_mean(pairs) for pairs in by_models], "methods": [_mean(p) for p in by_methods]}
    detail: dict[str, Any] = {
        "image": None if opened.image is None else data_uri(shrink(opened.image, _wide(opened)), quality=74),
        "words": [_words(opened, records.get(model), model) for model in models],
        "maps": [[_map(stored, opened, key, model, row) for row in rows] for model in models],
        "pairs": {"models": by_models, "methods": by_methods},
        "notes": [_told(note) for note in opened.notes],
    }
    return index, detail


def _wide(opened: Opened, side: int = IMAGE_SIDE) -> int:
    """A side for one image; twice as much for a sheet of frames."""
    return side * (2 if opened.is_sheet else 1)


def _answer(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if record is None:
        return None
    if record["status"] != "done":
        return {"failed": _told(f"{record['error']}: {record['reason']}")}
    return {"text": record["answer"].strip(), "correct": record["correct"], "drop": rounded(record.get("drop"), 4)}


def _scores(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What rows are sorted by; ``None`` where there is no map of that kind."""
    if record is None or record["status"] != "done" or record["map"] is None:
        return None
    return {
        "deletion": rounded(record.get("deletion"), 4),
        "insertion": rounded(record.get("insertion"), 4),
        "trusted": record.get("trusted"),
        **({} if objection(record) is None else {"counts": False}),
        **({} if record.get("pointing") is None else {"pointing": rounded(record["pointing"], 3)}),
    }


def _words(opened: Opened, record: Mapping[str, Any] | None, model: str) -> dict[str, Any] | None:
    """The answer's words with their ratios; one piece without ratios where the trace is gone."""
    if record is None or record["status"] != "done":
        return None
    trace = opened.traces.get(model)
    if trace is None:
        return {"words": [], "tail": record["answer"].strip()}
    words, tail = words_of(trace)
    return {"words": [[before, text, rounded(llr, 2)] for before, text, llr in words], "tail": tail}


def _map(stored: Stored, opened: Opened, key: Key, model: str, row: str) -> dict[str, Any] | None:
    record = stored.maps.get(key, {}).get((model, row))
    if record is None:
        return None
    if record["status"] != "done":
        return {"none": _told(f"{record['error']}: {record['reason']}")}
    if record["map"] is None:
        return {"none": _told(str(record["reason"]))}
    heat, trace = opened.heats.get((model, row)), opened.traces.get(model)
    if heat is None:
        return {"none": "the file of the map cannot be read"}
    found: dict[str, Any] = {
        "values": _encoded(np.asarray(heat.values), _wide(opened, MAP_SIDE)),
        "seen": encode_seen(np.asarray(heat.seen)),
        "selected": [] if trace is None else selected_words(trace, heat.selection.indices),
        "text": record.get("text"),
        "verdict": _told(record.get("verdict")),
        "words": {},
    }
    for entry in opened.words.get((model, row), ()):
        places = [] if trace is None else selected_words(trace, tuple(entry["tokens"]))
        for place in places[:1]:
            if entry.get("map") == "values":
                found["words"][str(place)] = True  # the answer's map, which explains this word alone
            elif "values" in entry:
                found["words"][str(place)] = _encoded(entry["values"], _wide(opened, MAP_SIDE))
            else:
                found["words"][str(place)] = _told(str(entry.get("reason")))
    return found


# ---------------------------------------------------------------------------------------------------------------- sets


def _compare(stored: Stored, key: Key, other: Key, index: dict[str, Any], detail: dict[str, Any]) -> None:
    """What changed from ``other`` to ``key``, and whether each map follows it."""
    study, here, there = stored.study, stored.open(key), stored.open(other)
    mine, theirs = stored.answers[key], stored.answers[other]
    about, before = _about(stored, key), _about(stored, other)
    region = Region(None, "it is the same image")
    if about["picture"] != before["picture"]:
        region = Region(None, "an image is not at hand")
        if here.image is not None and there.image is not None:
            region = changed_region(there.image, here.image)
    differ = about.get("true_answer") != before.get("true_answer")
    same: list[bool | None] = []
    for model in study.models:
        pair = mine.get(model), theirs.get(model)
        if any(record is None or record["status"] != "done" for record in pair):
            same.append(None)
            continue
        first, second = (stance(record["answer"], record.get("choices") or ()) for record in pair if record)
        same.append(first == second)
    looks = [
        [looking(here.heats.get((model, row)), there.heats.get((model, row)), region) for row in study.methods]
        for model in study.models
    ]
    index["same"] = same
    index["fooled"] = [None if one is None or about.get("true_answer") is None else one and differ for one in same]
    index["looked"] = [[_lift(look) for look in of] for of in looks]
    asked = None
    if about["question"] != before["question"]:
        asked = [list(part) for part in question_diff(before["question"], about["question"])]
    detail["change"] = {
        "question": asked,
        "image": about["picture"] != before["picture"],
        "region": None if region.mask is None else _bits(region.mask),
        "share": rounded(region.share, 4),
        "reason": region.reason,
        "truth": differ,
        "looks": [[_rounded_look(look) for look in of] for of in looks],
    }


def _rounded_look(look: Mapping[str, float | None] | None) -> dict[str, float | None] | None:
    return None if look is None else {name: rounded(value, 4) for name, value in look.items()}


def _lift(look: Mapping[str, float | None] | None) -> float | None:
    """How many times its share of the area a region has of a map."""
    if look is None or look["mass"] is None or not look["area"]:
        return None
    return rounded(look["mass"] / look["area"], 3)


# ------------------------------------------------------------------------------------------------------------- numbers


def _pairs(heats: Sequence[Heatmap | None]) -> list[float | None]:
    """Rank correlations of all pairs, ``(0, 1), (0, 2), …, (1, 2), …``."""
    return [
        None if first is None or second is None else rank_correlation(first, second)
        for first, second in itertools.combinations(heats, 2)
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return rounded(sum(known) / len(known), 3) if known else None


def _encoded(values: np.ndarray, side: int = MAP_SIDE) -> dict[str, Any]:
    """A map as ``{w, h, data}``: bytes in base64, 255 = its highest value."""
    grid = np.asarray(values, dtype=np.float32)
    if max(grid.shape) > side:
        scale = side / max(grid.shape)
        grid = resample(grid, (max(1, round(grid.shape[0] * scale)), max(1, round(grid.shape[1] * scale))))
    peak = float(grid.max())
    packed = np.rint(grid / peak * 255 if peak > 0 else grid).astype(np.uint8)
    return {"w": grid.shape[1], "h": grid.shape[0], "data": base64.b64encode(packed.tobytes()).decode()}


def _bits(mask: np.ndarray) -> dict[str, Any]:
    """A region as ``{w, h, data}`` of packed bits: cells that lie in it by a third, or else the fullest ones."""
    scale = min(1.0, _REGION_SIDE / max(mask.shape))
    shape = (max(1, round(mask.shape[0] * scale)), max(1, round(mask.shape[1] * scale)))
    share = resample(mask.astype(np.float32), shape)
    coarse = share >= min(1 / 3, float(share.max()))
    return packed_bits(coarse)


def _told(text: str | None) -> str | None:
    return None if text is None else without_folders(text)
