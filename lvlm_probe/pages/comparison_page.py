"""The page of ``compare``: one file of HTML, every string of the data put on it as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from PIL import Image

from lvlm_probe.drawing import colour_bar
from lvlm_probe.errors import ProbeError
from lvlm_probe.escaping import counted
from lvlm_probe.pages.data_uris import data_uri, shrink
from lvlm_probe.pages.plain import without_folders
from lvlm_probe.pages.ranking import Row, Standing, center_gain, cost_of
from lvlm_probe.pages.samples import answer_of, read, strip_of
from lvlm_probe.pages.shell import asset, page_text
from lvlm_probe.video import ClipHeatmap

if TYPE_CHECKING:
    from lvlm_probe.heatmap import Heatmap
    from lvlm_probe.metrics import Interval, Score

_FRAMES = 8  # of a video
_IMAGE_SIDE = 480
_CELL_SIDE = 336
_SCENE_WIDTH, _CELL_WIDTH = 236, 168
_LONG_ANSWER = 260
_BAR_GROUND = 168
_WASHES = 5
_FIXED_SPACE = "\u00a0"


def filled(columns: Sequence[str], rows: Sequence[Row], standings: Sequence[Standing], title: str) -> str:
    """The whole page as text: one row per answer, one column per method, and all answers together below."""
    widths = f'<col width="{_SCENE_WIDTH}">' + f'<col width="{_CELL_WIDTH}">' * len(columns)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "\n".join(_row(columns, row) for row in rows)
    # The attribute, as the page's policy admits no style of an element's own.
    width = _SCENE_WIDTH + _CELL_WIDTH * len(columns)
    table = (
        f'<table width="{width}"><colgroup>{widths}</colgroup>'
        f'<thead><tr><th scope="col">Answer</th>{head}</tr></thead><tbody>{body}</tbody></table>'
    )
    return page_text(
        "comparison.html",
        title,
        asset("page.css") + asset("comparison.css"),
        asset("theme.js") + asset("comparison.js"),
        body='<body class="comparison">',
        terms=_terms(columns, rows),
        bar=data_uri(colour_bar(ground=_BAR_GROUND)),
        scenes=table,
        standings=_standings(standings, len(rows), center_gain(rows)) if len(rows) > 1 else "",
    )


def _terms(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """What was held equal, and what was not."""
    number = f"{counted(len(columns), 'method')} on {counted(len(rows), 'answer')}"
    said = [f"<p><b>{number}.</b> All heatmaps of a row explain the underlined words of its answer.</p>"]
    judged = [(row, score) for row in rows for score in row.scores if score is not None and score.params]
    if not judged:
        said.append(
            "<p>Nothing here was judged: scores need the model, and only traces or bare heatmaps were given.</p>"
        )
        return "\n".join(said)
    grids = {tuple(score.params.get("grid") or ()) for _, score in judged}
    if any(len(grid) == 3 for grid in grids):
        said.append(
            "<p>Heatmaps of videos are judged on their own cells, time × rows × columns: methods compare by their "
            "scores where those are as many, which each cell says below its scores.</p>"
        )
    elif len(grids) == 1 and (grid := next(iter(grids))):
        said.append(
            f"<p>All are judged on <b>one grid of {grid[0]} × {grid[1]} cells</b> of equal area, whatever a method's "
            f"own resolution, so that coarse and fine heatmaps take the same share of the image away at a step.</p>"
        )
    else:
        named = ", ".join(sorted(f"{grid[0]} × {grid[1]}" for grid in grids if grid))
        said.append(
            f'<p class="warning">The scores were taken on different grids ({escape(named or "unknown")}), so methods '
            f"are not comparable by them: take them again with evaluate(heat, replay, grid=32).</p>"
        )
    ways = {tuple(str(score.params.get(key)) for key in ("score", "auc", "steps", "mode")) for _, score in judged}
    uneven = any(len({str(score.baseline_check.get("kind")) for of, score in judged if of is row}) > 1 for row in rows)
    if len(ways) > 1 or uneven:
        what = "against different baselines" if uneven else "in different ways (score, auc, steps, mode)"
        said.append(f'<p class="warning">Scores of a row were taken {what}, so they are not comparable.</p>')
    return "\n".join(said)


def _row(columns: Sequence[str], row: Row) -> str:
    judged = [score for heat, score in zip(row.heats, row.scores, strict=True) if heat and score is not None]
    gains = [round(score.gain, 2) for score in judged if score.verdict.trusted and math.isfinite(score.gain)]
    best = max(gains, default=None) if len(judged) > 1 else None
    cells = "\n".join(
        _cell(name, heat, score, best) for name, heat, score in zip(columns, row.heats, row.scores, strict=True)
    )
    return f'<tr><th scope="row" class="scene">{_scene(row)}</th>\n{cells}</tr>'


def _scene(row: Row) -> str:
    """The image, the question, and the answer with its explained words."""
    heat = next(heat for heat in row.heats if heat is not None)
    trace = next((one.trace for one in row.heats if one is not None and one.trace is not None), None)
    notes: list[str] = []
    answer = answer_of(trace, heat, notes)
    question, prompt = (str(read(trace, name, notes) or "") for name in ("question", "prompt"))
    parts = [_shown(_original(row), _IMAGE_SIDE, "The image"), _strip(read(trace, "images", notes), heat)]
    if question or prompt:
        label = "" if question else '<span class="label">Prompt</span> '
        parts.append(f'<p class="question" dir="auto">{label}{escape(question or prompt)}</p>')
    long = " long" if len(answer["answer"]) > _LONG_ANSWER else ""
    parts.append(f'<p class="said{long}" dir="auto">{"".join(_words(answer))}</p>')
    score = next((score for score in row.scores if score is not None and score.baseline_check), None)
    if not answer["whole"]:
        parts.append('<p class="facts">No word is explained.</p>')
    if score is not None:
        kept = score.baseline_check.get("mean_probability")
        probability = "" if kept is None else f": the explained words keep {_percent(float(kept))} of probability on it"
        kind = escape(str(score.baseline_check.get("kind") or "unknown"))
        parts.append(f'<p class="facts">Baseline {kind}{probability}.</p>')
        if math.isfinite(score.center_gain):
            floor = f"A blob in the middle of the image, made without looking, has a gain of {score.center_gain:.2f}."
            parts.append(f'<p class="facts">{floor}</p>')
    parts += [f'<p class="facts">{_told(note)}</p>' for note in dict.fromkeys(notes)]
    return "\n".join(parts)


def _strip(images: Sequence[Image.Image] | None, heat: Heatmap | ClipHeatmap) -> str:
    """Which of several images is explained, and all of them."""
    if not images or len(images) < 2:
        return ""
    shown = []
    explained = heat.clip.images if isinstance(heat, ClipHeatmap) else [heat.image_index]
    chosen = list(range(len(images)))
    if isinstance(heat, ClipHeatmap):
        chosen = sorted({*range(heat.clip.first), *(heat.clip.first + frame for frame in heat.clip.spread(_FRAMES))})
    for number, source in zip(chosen, strip_of([images[number] for number in chosen]), strict=True):
        mark = ' class="explained"' if number in explained else ""
        told = "the explained one" if mark else "not explained"
        shown.append(f'<img src="{source}"{mark} alt="Image {number + 1}, {told}">')
    what = f"Image {heat.image_index + 1} of {len(images)}"
    if isinstance(heat, ClipHeatmap):
        what = (
            f"Video of {counted(heat.clip.frames, 'frame')}, from {heat.when(0)} to {heat.when(heat.clip.frames - 1)}"
        )
    return f'<p class="facts">{what}</p><div class="strip">{"".join(shown)}</div>'


def _words(answer: Mapping[str, Any]) -> Iterator[str]:
    if not answer["words"]:
        yield escape(answer["answer"] or "Answer not known")
        return
    for word in answer["words"]:
        yield escape(word["before"])
        pieces = []
        for position, token in enumerate(word["tokens"]):
            piece = str(answer["tokens"][token]["text"])
            explained = ' class="k"' if token in answer["whole"] else ""
            pieces.append(f"<span{explained}>{escape(piece if position else piece.lstrip())}</span>")
        yield f'<span class="word{_wash(word["llr"])}">{"".join(pieces)}</span>'
    yield escape(answer["tail"])


def _wash(llr: float | None) -> str:
    """The class of a word's ground: 6 nats and beyond is full colour, as in the report."""
    if llr is None or abs(llr) < 0.05:
        return ""
    step = max(1, round(_WASHES * min(1.0, abs(llr) / 6) ** 0.65))
    return f" {'with' if llr > 0 else 'against'}{step}"


def _cell(name: str, heat: Heatmap | ClipHeatmap | None, score: Score | None, best: float | None) -> str:
    save = ""
    if heat is not None and heat.values is not None:
        save = (
            '<button type="button" class="quiet save" '
            f'data-name="{escape(f"{name} {heat.selection.label[:40]}".strip())}" '
            f'aria-label="Save the heatmap of {escape(name)}">Save</button>'
        )
    # Names of methods may be broken at their underscores, and there only.
    parts = [f'<p class="name"><span>{escape(name).replace("_", "_<wbr>")}</span>{save}</p>']
    if heat is None:
        parts.append('<p class="none">No heatmap was given.</p>')
    elif heat.values is None:
        parts.append(f'<p class="none"><b>No heatmap</b>{_told(str(heat.reason))}</p>')
    else:
        parts.append(_shown(heat.preview(_CELL_SIDE, score=score), _CELL_SIDE, f"Heatmap of {name} over the image"))
        parts += _scores(heat, score, best)
    return f'<td class="cell">{"".join(parts)}</td>'


def _scores(heat: Heatmap | ClipHeatmap, score: Score | None, best: float | None) -> Iterator[str]:
    if score is None:
        why = heat.provenance.get("not_judged") or "judging needs the model"
        yield f'<p class="facts">Not judged: {_told(str(why), capital=False)}</p>'
    elif (reason := score.reason) is not None:
        yield '<p class="gain"><b>–</b> gain</p>'
        yield f'<p class="facts">No score: {_told(reason, capital=False)}</p>'
        yield from _doubts(score)
    else:
        first = best is not None and score.verdict.trusted and round(score.gain, 2) == best
        mark = '<em class="best">best</em>' if first else ""
        yield f'<p class="gain"><b>{_number(score.gain)}</b> gain{mark}</p>'
        low, high = sorted(100 * min(1.0, max(0.0, edge)) for edge in (score.deletion, score.insertion))
        kind = "reach" if score.insertion >= score.deletion else "back"
        yield (
            '<svg class="span" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
            '<rect class="track" x="0" y="3" width="100" height="2"/>'
            f'<rect class="{kind}" x="{low:.1f}" y="1" width="{max(1.0, high - low):.1f}" height="6"/></svg>'
        )
        yield f'<p class="pair">del {_number(score.deletion)} · ins {_number(score.insertion)}</p>'
        yield from (f'<p class="facts">{_told(remark)}</p>' for remark in score.remarks)
        if score.verdict.trusted:
            yield '<p class="stands"><i class="dot trusted"></i>holds up</p>'
        else:
            yield from _doubts(score)
    cost, seconds = cost_of(heat), heat.provenance.get("seconds")
    facts = [] if cost is None else [f"{cost[0]} + {cost[1]} passes" if any(cost) else "no pass"]
    facts += [] if heat.search_dtype is None or cost is None or not any(cost) else [f"searched in {heat.search_dtype}"]
    facts += [] if seconds is None else [f"{float(seconds):.2f} s"]
    facts.append(" × ".join(map(str, () if heat.values is None else heat.values.shape)))
    yield f'<p class="facts">{escape(" · ".join(fact.replace(" ", _FIXED_SPACE) for fact in facts))}</p>'
    yield from (f'<p class="facts">{_told(said)}</p>' for said in (heat.coarse, heat.uncertainty) if said is not None)


def _doubts(score: Score) -> Iterator[str]:
    reasons = "".join(f"<li>{_told(reason)}</li>" for reason in score.verdict.reasons)
    yield (
        f'<details><summary class="doubt"><i class="dot doubted"></i>do not trust</summary><ul>{reasons}</ul></details>'
    )


def _standings(found: Sequence[Standing], answers: int, middle: float | None) -> str:
    lines = []
    floor = "" if middle is None else f" A blob in the middle of the image has a gain of {middle:.3f} in the mean."
    for one in found:
        cells = [f'<td class="name">{escape(one.method)}</td>']
        cells += [
            f'<td class="number">{"–" if value is None else _interval(value)}</td>'
            for value in (one.gain, one.deletion, one.insertion)
        ]
        passes = "–" if one.forward is None or one.backward is None else f"{one.forward:.0f} + {one.backward:.0f}"
        seconds = "–" if one.seconds is None else f"{one.seconds:.2f}"
        entering = 0 if one.gain is None else one.gain.n
        counts = (f"{entering} of {one.judged}", f"{one.trusted} of {one.judged}", f"{one.maps} of {answers}")
        cells += [f'<td class="number">{value}</td>' for value in (*counts, passes, seconds)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    heads = ("gain ↑", "deletion ↓", "insertion ↑", "in means", "trusted", "heatmaps", "passes", "seconds")
    head = '<th scope="col">method</th>' + "".join(f'<th scope="col" class="number">{name}</th>' for name in heads)
    return (
        f'<section class="standings"><h2>All {answers} answers together</h2>'
        '<p class="prose">Mean and 95 % bootstrap interval over the answers; passes and seconds are means of a '
        "heatmap. Intervals of two methods may overlap although one is better on nearly every answer: compare them "
        f"paired, <code>metrics.paired_difference</code>.{floor}</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Means over answers">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f"{_left_out(found)}</section>"
    )


def _left_out(found: Sequence[Standing]) -> str:
    """Which scores enter no mean, and why."""
    items = [
        f"<li>{escape(one.method)}: {count} × {_told(reason)}</li>"
        for one in found
        for reason, count in one.left_out.items()
    ]
    if not items:
        return ""
    return (
        '<details class="left-out"><summary>Scores that enter no mean, as they measure nothing</summary>'
        f"<ul>{''.join(items)}</ul></details>"
    )


def _interval(interval: Interval) -> str:
    estimate, low, high = (_number(value) for value in (interval.estimate, interval.low, interval.high))
    return f"{estimate} [{low}, {high}]" if interval.n > 1 else estimate


def _original(row: Row) -> Image.Image | None:
    for heat in row.heats:
        if heat is not None:
            try:
                return heat.image(0) if isinstance(heat, ClipHeatmap) else heat.image()
            except ProbeError:
                continue
    return None


def _shown(image: Image.Image | None, side: int, alt: str) -> str:
    if image is None:
        return '<p class="facts">The image itself is not at hand.</p>'
    small = shrink(image, side)
    size = f'width="{small.width}" height="{small.height}"'
    return f'<img src="{data_uri(small, quality=82)}" {size} alt="{escape(alt)}">'


def _told(text: str, *, capital: bool = True) -> str:
    """A reason as a sentence, without folders of somebody's disk. The name of a parameter keeps its small letter."""
    text = without_folders(text.strip())
    if capital and text.split(" ")[0].isalpha():
        text = text[:1].upper() + text[1:]
    return escape(text + ("" if text.endswith((".", "!", "?")) else "."))


def _percent(share: float) -> str:
    return "under 0.1 %" if share < 0.001 else f"{100 * share:.2g} %"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
