"""A trace for a person's eyes: plain text for a terminal, HTML for a notebook.

Everything shown may come from a stranger's file: control characters (which could drive a terminal) and characters that
turn the direction of writing are shown as escapes, HTML is escaped. A person reads some pages and no more, so texts,
lists of words and notes end there with the number of what follows: a file of megabytes is described in a moment.
"""

from __future__ import annotations

import base64
import datetime
import io
import math
import textwrap
import unicodedata

from lvlm_probe.cards import answer_html, text_html
from lvlm_probe.errors import ProbeError
from lvlm_probe.escaping import escaped
from lvlm_probe.trace.clips import Clip
from lvlm_probe.trace.parts import thumbnail
from lvlm_probe.trace.schema import row_key
from lvlm_probe.trace.stored import StoredAnswer
from lvlm_probe.words import ALPHA

_WIDTH = 80
_LABEL = 10
_BAR = 24
_TEXT_SHOWN = 20_000
"""Characters of one text."""
_WORDS_SHOWN = 2000
_WORD_SHOWN = 200
"""Characters of a word that are looked at; combining marks take no column, so they are more than fit."""
_LINES_SHOWN = 100
"""Entries of a list: notes, images, recorded points."""
_THUMBNAIL = 220


def describe(trace: StoredAnswer) -> str:
    """Returns the trace as text of at most 80 columns: question, answer, LLR of each word, what was recorded."""
    lines = [f"Trace {trace.trace_id}", ""]
    lines += _field("file", f"{trace.path}" + (f", row {trace.row} (of {trace.rows})" if trace.rows > 1 else ""))
    lines += _field("recorded", " ".join(filter(None, [_time(trace.created), _seconds(trace)])))
    lines += _field("status", _status(trace))
    lines += _field("model", _model(trace))
    sizes = list(zip(trace.header.image_sizes, trace.header.image_mimes, strict=True))
    frames = {number for clip in trace.clips for number in clip.images}
    for clip in trace.clips[:_LINES_SHOWN]:
        lines += _field("video", _clip(clip))
    for number, (size, mime) in enumerate(sizes[:_LINES_SHOWN]):
        if number in frames:
            continue
        nbytes = _size(len(trace.image_record(number).data))
        text = f"{size[0]} x {size[1]} {mime.removeprefix('image/')}, {nbytes}"
        lines += _field("image" if number == 0 else "", text)
    lines += _more(len(sizes) - _LINES_SHOWN, "images")
    if not trace.header.image_sizes:
        lines += _field("image", "none kept: masks live in the space of the pixel inputs")
    lines += _field("prompt", _prompt(trace))
    lines += _field("", trace.prompt) if trace.question is None else _field("question", trace.question)
    lines += _field("answer", trace.answer.strip() or "(empty)")
    lines += ["", *_words(trace), ""]
    lines += _recorded(trace)
    for number, note in enumerate(trace.notes[:_LINES_SHOWN]):
        lines += _field("notes" if number == 0 else "", note)
    lines += _more(len(trace.notes) - _LINES_SHOWN, "notes")
    if trace.meta:
        lines += _field("meta", ", ".join(f"{key}={value}" for key, value in trace.meta.items()))
    lines += _field("size", _bytes(trace))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _more(count: int, of: str) -> list[str]:
    return _field("", f"(and {count} more {of})") if count > 0 else []


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}… ({len(text) - length} more characters)"


def _field(label: str, text: str) -> list[str]:
    lines: list[str] = []
    for paragraph in _cut(text, _TEXT_SHOWN).split("\n"):
        lines += textwrap.wrap(_safe(paragraph), _WIDTH - _LABEL, break_on_hyphens=False) or [""]
    return [f"{label if number == 0 else '':<{_LABEL}}{line}" for number, line in enumerate(lines)]


def _safe(text: str) -> str:
    """Shows what would act on a terminal instead of being seen."""
    return escaped(text).replace("\t", r"\t").replace("\n", r"\n")


def _time(created: str) -> str:
    try:
        return f"{datetime.datetime.fromisoformat(created).astimezone(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError):
        return created[:64]


def _seconds(trace: StoredAnswer) -> str:
    known = {name: float(value) for name, value in trace.seconds.items() if type(value) in (int, float)}
    shown = (f"{name} {value:.2f} s" if abs(value) < 1e9 else f"{name} {value:.3g} s" for name, value in known.items())
    return f"({', '.join(shown)})" if known else ""


def _status(trace: StoredAnswer) -> str:
    meaning = {
        "complete": "complete",
        "stopped": "stopped: generation was cut off",
        "error": "error: recording failed on the way, the answer itself is untouched",
    }
    text = meaning[trace.status] + (f" ({trace.error})" if trace.error else "")
    if trace.log_probs_source == "teacher_forced":
        text += "; log-probabilities from a second, teacher-forced pass"
    return text


def _model(trace: StoredAnswer) -> str:
    model = trace.model
    versions = model.get("versions")
    names = [model.get(key) for key in ("class", "model_id", "torch_dtype", "attn_implementation")]
    if isinstance(versions, dict) and "transformers" in versions:
        names.append(f"transformers {versions['transformers']}")
    return ", ".join(str(name) for name in names if name)


def _prompt(trace: StoredAnswer) -> str:
    header = trace.header
    return f"{header.prompt_tokens} tokens, {header.image_tokens} of them image tokens"


def _clip(clip: Clip) -> str:
    many = f"{clip.frames} frames" + (f" of {clip.total}" if clip.total else "")
    times = clip.times
    return many if times is None else f"{many}, from {times[0]:.2f} s to {times[-1]:.2f} s"


def _words(trace: StoredAnswer) -> list[str]:
    """One line per word: its text, log-probability, LLR, and a bar."""
    if not trace.words:
        return ["(no words)"]
    llr = trace.llr
    words = trace.words[:_WORDS_SHOWN]
    more = [f"  (and {len(trace.words) - len(words)} more words)"] if len(trace.words) > len(words) else []
    # No more than what could fit is looked at: a model that repeats one sign makes a word of thousands.
    shown = [_fit(_safe(word.text[:_WORD_SHOWN]), 28, cut=len(word.text) > _WORD_SHOWN) for word in words]
    width = max(8, *(_columns(text) for text in shown))
    log_probs = [float(trace.log_probs[word.start : word.stop].sum()) for word in words]
    if llr is None:
        rows = [f"  {_pad(text, width)}  {value:8.2f}" for text, value in zip(shown, log_probs, strict=True)]
        remark = "no LLR: the pass with the baseline image was deferred"
        return [f"  {_pad('word', width)}  {'log P':>8}", *rows, *more, "", f"  {remark}"]
    ratios = [float(llr[word.start : word.stop].sum()) for word in words]
    chosen = [bool((llr[word.start : word.stop] > ALPHA).any()) for word in words]
    top = max([abs(ratio) for ratio in ratios if math.isfinite(ratio)] + [ALPHA])
    lines = [f"  {_pad('word', width)}  {'log P':>8}  {'LLR':>8}"]
    for text, value, ratio, marked in zip(shown, log_probs, ratios, chosen, strict=True):
        lines.append(f"{'*' if marked else ' '} {_pad(text, width)}  {value:8.2f}  {ratio:+8.2f}  {_bar(ratio, top)}")
    kind = (trace.baseline or {}).get("kind", "baseline")
    remark = f"LLR = log P(with the image) - log P(with the baseline: {_safe(str(kind)[:32])})"
    return [*lines, *more, "", f"  {remark}", f"  *: a token above {ALPHA:g}"]


def _bar(value: float, top: float) -> str:
    if not math.isfinite(value):
        return "?" if math.isnan(value) else ("█" if value > 0 else "░") * _BAR
    return ("█" if value > 0 else "░") * round(_BAR * min(1.0, abs(value) / top))


def _columns(text: str) -> int:
    """Terminal columns: wide characters take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.category(char) in ("Mn", "Me", "Cf") for char in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _columns(text))


def _fit(text: str, width: int, *, cut: bool = False) -> str:
    """The text, or as much of its beginning as fits into ``width`` columns with a dot for the rest."""
    if not cut and _columns(text) <= width:
        return text
    columns = 0
    for length, char in enumerate(text):
        columns += _columns(char)
        if columns > width - 1:
            return text[:length] + "…"
    return text + "…"


def _recorded(trace: StoredAnswer) -> list[str]:
    lines: list[str] = []
    for number, point in enumerate(trace.header.points[:_LINES_SHOWN]):
        axes = ", ".join(f"{axis} {size}" for axis, size in zip(point.axes, point.shape, strict=True))
        lines += _field("points" if number == 0 else "", f"{point.name} ({axes}) {point.dtype}, {_size(point.nbytes)}")
    lines += _more(len(trace.header.points) - _LINES_SHOWN, "points")
    return lines or _field("points", "nothing inside the model")


def _bytes(trace: StoredAnswer) -> str:
    text = f"{_size(trace.nbytes)} of data"
    if trace.header.steps:
        text += f", {_size(round(trace.nbytes / trace.header.steps))} per token"
        inside = sum(point.nbytes for point in trace.header.points)
        if inside:
            text += f" ({_size(round(inside / trace.header.steps))} of it from inside the model)"
    return f"{text}; the file has {_size(trace.path.stat().st_size)}"


def _size(nbytes: int) -> str:
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def to_html(trace: StoredAnswer) -> str:
    """Returns a small self-contained card: the image, the question, the answer coloured by LLR. Readable on dark."""
    asked = trace.question if trace.question is not None else f"Prompt: {trace.prompt}"
    question = text_html(asked)
    facts = [trace.status, _model(trace), f"{trace.header.steps} tokens", _size(trace.nbytes)]
    details = " · ".join(text_html(_cut(str(fact), 400)) for fact in facts if fact)
    llr = None if trace.llr is None else trace.llr.tolist()
    marked = [] if llr is None else [step for step, ratio in enumerate(llr) if ratio > ALPHA]
    remark = "colour: log-likelihood ratio of each word; underlined: above 1"
    if llr is None:
        remark = "no log-likelihood ratios: the pass with the baseline image was deferred"
    return (
        '<div style="display:flex;gap:1em;align-items:flex-start;font-family:system-ui,sans-serif;max-width:60em">'
        f"{_thumbnail(trace)}<div>"
        f'<div dir="auto" style="opacity:.7">{question}</div>'
        f"{answer_html(trace.tokens, trace.special.tolist(), llr=llr, marked=marked)}"
        f'<div style="font-size:.8em;opacity:.6">{details}<br>{text_html(remark)}<br>'
        f"<code>{text_html(trace.trace_id)}</code></div></div></div>"
    )


def _thumbnail(trace: StoredAnswer) -> str:
    try:
        key = f"{row_key(trace.row)}/images/000"
        image = thumbnail(trace.image_record(0), trace.path, key, side=_THUMBNAIL)
    except ProbeError:
        return ""
    if image is None:
        width, height = trace.header.image_sizes[0]
        return f'<div style="opacity:.6">(image of {width} × {height} pixels)</div>'
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="" src="data:image/png;base64,{data}" style="border-radius:.4em;max-width:220px">'
