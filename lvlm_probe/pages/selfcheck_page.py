"""The page of ``lvlm-probe selfcheck``: what was found of one model, to read and to send.

It is made as the report is (``shell.py``): one file, nothing from the network, every string as text. It shows the
built-in images, answers about them and numbers; nothing of the machine but the kind of its device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from lvlm_probe.escaping import counted
from lvlm_probe.pages.data_uris import data_uri, shrink
from lvlm_probe.pages.shell import Page, asset, page_text, write_text

_SIDE = 400


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: what.
        passed: ``None`` for what is neither right nor wrong: a figure.
        text: what was found, a sentence at most.
    """

    name: str
    passed: bool | None
    text: str


def checks(record: Mapping[str, Any]) -> list[Check]:
    """Sum a self-check up.

    Args:
        record: what ``selfcheck.json`` holds.
    """
    units: Mapping[str, Mapping[str, Any]] = record.get("units") or {}
    broken = [f"{name}: {unit['problem']}" for name, unit in units.items() if unit.get("problem")]
    found = [Check(one["name"], False, one["text"]) for one in record["findings"] if one["state"] == "mend"]
    found += [Check(text.partition(":")[0], False, text.partition(": ")[2]) for text in broken]
    answers = {name: unit for name, unit in units.items() if "right" in unit}
    if answers:
        found += [*_of_answers(answers)]
    gradient = units.get("gradient") or {}
    if "fault" in gradient:
        found.append(of_gradient(gradient))
    tried = {name.partition(" ")[2]: unit for name, unit in units.items() if name.startswith("method ")}
    if tried:
        found += [*_of_methods(tried, quick=bool(record.get("quick")))]
    if not record.get("finished"):
        found.append(Check("not finished", None, "the same command goes on with what is missing"))
    return found


def _of_answers(answers: Mapping[str, Mapping[str, Any]]) -> Iterator[Check]:
    groups = {
        "scenes": [unit for name, unit in answers.items() if " scene" in name],
        "photographs": [unit for name, unit in answers.items() if " photograph" in name],
    }
    for name, units in groups.items():
        if units:
            right = sum(bool(unit["right"]) for unit in units)
            yield Check(f"answers, {name}", None, f"{right} of {len(units)} name what is asked for")
    worst = max(answers.values(), key=_excess)
    text = (
        f"differs from the recording by at most {_nats(worst['difference'])}, rounding allows {_nats(worst['allowed'])}"
    )
    yield Check("replay", all(unit["same"] for unit in answers.values()), text)
    for name, units in groups.items():
        judged = [unit for unit in units if unit.get("gain") is not None]
        if not judged:
            continue
        said = f"gain {_mean([unit['gain'] for unit in judged]):.3f} in the mean, "
        said += f"{sum(bool(unit['trusted']) for unit in judged)} of {len(judged)} hold up"
        placed = [unit["pointing"] for unit in judged if unit.get("pointing") is not None and unit["right"]]
        if placed:
            said += f"; of right answers, {sum(placed):.3g} of {len(placed)} point at the object"
        yield Check(f"maps, {name}", None, said)


def _excess(unit: Mapping[str, Any]) -> float:
    difference = unit["difference"]
    return math.inf if difference is None else difference / max(unit["allowed"], 1e-12)


def _of_methods(tried: Mapping[str, Mapping[str, Any]], *, quick: bool) -> Iterator[Check]:
    made = [name for name, unit in tried.items() if unit.get("cells")]
    missing = [
        f"{name} ({unit.get('refused') or unit.get('reason')})" for name, unit in tried.items() if name not in made
    ]
    text = f"{len(made)} of {counted(len(tried), 'method')} made a map" + (", the quick ones only" if quick else "")
    yield Check("methods", None if missing else True, text + (f"; not: {'; '.join(missing)}" if missing else ""))
    for what, unit_name, least in (("time", "seconds", 1.0), ("memory", "peak", 1e7)):
        pairs = [
            (unit[unit_name], unit["planned"].get(unit_name))
            for unit in tried.values()
            if unit.get("cells") and unit.get("planned") and unit.get("forward")  # of what runs the model
        ]
        ratios = [have / planned for have, planned in pairs if have and planned and have >= least]
        if ratios:
            low, high = min(ratios), max(ratios)
            said = f"{low:.2f} to {high:.2f} times what was planned, {counted(len(ratios), 'method')}"
            yield Check(
                f"plan, {what}", None, said + (" of a second or more" if what == "time" else " of 10 MB or more")
            )


def of_gradient(found: Mapping[str, Any]) -> Check:
    """Return what the check of the gradients has found.

    Args:
        found: the fields of a ``GradientCheck``.
    """
    if found["fault"]:
        return Check("gradient", False, found["fault"])
    if found.get("gradient") is None or found.get("difference") is None:
        return Check("gradient", True, "not a number")
    text = f"slope along the image {found['gradient']:.5g}, by finite difference {found['difference']:.5g}"
    rounding = f" (rounding: {found['noise']:.2g})" if found.get("noise") is not None else ""
    return Check("gradient", True, text + rounding)


def selfcheck_page(
    record: Mapping[str, Any], shown: Mapping[str, tuple[Image.Image, Image.Image | None] | None], *, out: Path
) -> Page:
    """Write the page; an older one is replaced.

    Args:
        record: what ``selfcheck.json`` holds.
        shown: per answer its image and its map over it, as far as they are at hand.
        out: the file.
    """
    name = str(record["model"]["name"])
    units: Mapping[str, Mapping[str, Any]] = record.get("units") or {}
    answers = [_answer(units[key], shown.get(key)) for key in sorted(units, key=_place) if "right" in units[key]]
    text = page_text(
        "selfcheck.html",
        f"Self-check of {name}",
        asset("page.css") + asset("selfcheck.css"),
        asset("theme.js"),
        facts=_facts(record),
        checks="\n".join(_check(one) for one in checks(record)),
        answers="\n".join(answers) or '<p class="prose">No answer was recorded.</p>',
        methods=_methods(record, units),
        findings=_findings(record["findings"]),
    )
    return write_text(out, text, overwrite=True, said=f"Self-check of {name}")


def _place(unit: str) -> tuple[bool, int, str]:
    """Scenes in the order of their numbers, photographs after them."""
    number = re.search(r"\d+$", unit)
    return number is None, int(number[0]) if number else 0, unit


def _facts(record: Mapping[str, Any]) -> str:
    model = record["model"]
    said = [record["made_by"]]
    if "class" in model:
        millions = model["parameters"] / 1e6
        size = f"{millions / 1000:.3g} billion" if millions >= 1000 else f"{millions:.3g} million"
        said = [f"{model['class']}, {size} parameters in {model['dtype']}"]
        said += [f"on {model['device']}, attention by {model['attention']}", record["made_by"]]
    return escape("; ".join(str(one) for one in said))


def _check(one: Check) -> str:
    kind, mark = {True: ("good", "✓"), False: ("bad", "✗"), None: ("plain", "–")}[one.passed]
    cells = f'<td class="mark">{mark}</td><th scope="row">{escape(one.name)}</th><td>{escape(one.text)}</td>'
    return f'<tr class="{kind}">{cells}</tr>'


def _answer(unit: Mapping[str, Any], pair: tuple[Image.Image, Image.Image | None] | None) -> str:
    original, heat = pair or (None, None)
    images = [_image(original, "The image")] if original is not None else []
    images += [_image(heat, f"Map of {unit['method']} over the image")] if heat is not None else []
    right = '<em class="yes">right</em>' if unit["right"] else '<em class="no">not what was expected</em>'
    words = "".join(
        escape(before) + (f'<b title="{ratio:.1f} nats">{escape(word)}</b>' if (ratio or 0.0) > 1 else escape(word))
        for before, word, ratio in unit["words"]
    )
    facts = [
        f"expected: {', '.join(unit['expected'])}",
        unit["source"],
        f"replay differs by {_nats(unit['difference'])}",
    ]
    if unit.get("gain") is None:
        facts.append(f"no score: {unit.get('reason') or unit.get('verdict') or 'none'}")
    else:
        facts.append(f"{unit['method']}: gain {unit['gain']:.2f}, {unit['verdict'].partition(':')[0]}")
    if unit.get("pointing") is not None:
        facts.append("points at the object" if unit["pointing"] >= 0.5 else "points beside the object")
    question = escape(str(unit["question"] or "no question (a captioner)"))
    listed = "".join(f"<li>{escape(str(fact))}</li>" for fact in facts)
    return (
        f'<article><div class="pair">{"".join(images)}</div><p class="asked">{question}</p>'
        f'<p class="said" dir="auto">{words} {right}</p><ul class="facts">{listed}</ul></article>'
    )


def _image(image: Image.Image, alt: str) -> str:
    small = shrink(image, _SIDE)
    size = f'width="{small.width}" height="{small.height}"'
    return f'<img src="{data_uri(small, quality=82)}" {size} alt="{escape(alt)}">'


def _methods(record: Mapping[str, Any], units: Mapping[str, Mapping[str, Any]]) -> str:
    tried = {name.partition(" ")[2]: unit for name, unit in units.items() if name.startswith("method ")}
    if not tried:
        return ""
    on = record.get("methods_on") or {}
    heads = ("method", "gain ↑", "verdict", "cells", "passes", "seconds", "planned", "peak memory", "planned")
    head = "".join(f'<th scope="col"{" class=number" if place else ""}>{one}</th>' for place, one in enumerate(heads))
    order = sorted(tried, key=lambda name: ("seconds" not in tried[name], tried[name].get("seconds") or 0.0, name))
    rows = "\n".join(_method(name, tried[name]) for name in order)
    asked = escape(f"{on.get('question') or ''} {on.get('answer') or ''}")
    return (
        f'<section><h2>Methods, on one answer</h2><p class="prose">{asked} All are ranked on 32 × 32 cells. Memory: '
        "tensors alive at once beside the weights; – where it was not metered, as the method takes long.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Methods">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _method(name: str, unit: Mapping[str, Any]) -> str:
    said = unit.get("problem") or unit.get("refused") or unit.get("reason")
    if said:
        return f'<tr><td>{escape(name)}</td><td colspan="8">no map: {escape(str(said))}</td></tr>'
    planned = unit.get("planned") or {}
    cells = [
        "–" if unit.get("gain") is None else f"{unit['gain']:.3f}",
        "–" if unit.get("trusted") is None else "holds up" if unit["trusted"] else "do not trust",
        " × ".join(map(str, unit["cells"])),
        "none" if not unit["forward"] else f"{unit['forward']} + {unit['backward']}",
        *(_seconds(one) for one in (unit["seconds"], planned.get("seconds"))),
        *(_bytes(one) for one in (unit.get("peak"), planned.get("peak"))),
    ]
    return f"<tr><td>{escape(name)}</td>" + "".join(f'<td class="number">{escape(one)}</td>' for one in cells) + "</tr>"


def _findings(found: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f'<tr><th scope="row">{escape(str(one["name"]))}</th><td>{escape(str(one["text"]))}</td></tr>' for one in found
    ]
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _nats(value: float | None) -> str:
    return "no number" if value is None else f"{value:.2g} nats"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _bytes(value: float | None) -> str:
    from lvlm_probe.planning import show_bytes

    return "–" if value is None else show_bytes(value)
