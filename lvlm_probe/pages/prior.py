"""The page of the language-prior meter: thousands of answers in one file, worst words first, to filter."""

from __future__ import annotations

import html
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.escaping import counted
from lvlm_probe.importing.meter import worst_words
from lvlm_probe.importing.word_origins import LEAST_FROM_IMAGE, SURPRISE
from lvlm_probe.pages.plain import rounded, without_folders
from lvlm_probe.pages.shell import asset, json_for_script, page_text, refuse_existing, without_script, write_text
from lvlm_probe.words import ALPHA, spelled

if TYPE_CHECKING:
    from lvlm_probe.importing.meter import Reading, Unread
    from lvlm_probe.importing.word_origins import MeteredWord

DEFAULT_TITLE = "From the image, or from habit?"
_ORIGINS: dict[str, str] = {
    "unlikely": "not from this model",
    "habit": "from habit",
    "image": "from the image",
    "unknown": "not known",
}
_WORST = 12
"""Words in the list at the top of the page."""


def write_page(
    readings: Sequence[Reading],
    out: str | os.PathLike[str],
    *,
    unread: Sequence[Unread] = (),
    title: str = DEFAULT_TITLE,
    overwrite: bool = False,
) -> Path:
    """Write readings as one self-contained HTML page, to sort, filter and search.

    Args:
        readings: in the order in which they are ranked, the first rank first.
        out: the file to write.
        unread: what could not be measured.
        title: headline of the page.
        overwrite: replace ``out`` if it exists.

    Raises:
        ReportError: ``out`` exists or cannot be written.
    """
    path = Path(out)
    refuse_existing(path, overwrite=overwrite)
    known: dict[bytes, int] = {}
    sources: list[str] = []
    rows = [_row(reading, known, sources) for reading in readings]
    data = {
        "rows": rows,
        "images": sources,
        "worst": [
            [word.text, word.instead, rounded(word.surprise, 1), readings.index(reading)]
            for word, reading in worst_words(readings)[:_WORST]
        ],
        "unread": [{"source": one.source, "reason": without_folders(one.reason)} for one in unread],
    }
    text = page_text(
        "prior.html",
        title,
        asset("page.css") + asset("prior.css"),
        asset("theme.js") + asset("prior.js"),
        body='<body class="prior">',
        lead=_lead(readings, unread),
        alpha=f"{readings[0].alpha:g}" if readings else f"{ALPHA:g}",
        threshold=f"{readings[0].threshold:g}" if readings else f"{SURPRISE:g}",
        times=f"{math.exp(min(readings[0].threshold if readings else SURPRISE, 20)):,.0f}",
        plain=_plain(readings),
        data=json_for_script(data),
    )
    write_text(path, text, overwrite=overwrite)
    return path


def _row(reading: Reading, known: dict[bytes, int], sources: list[str]) -> dict[str, Any]:
    texts, _ = spelled(reading.pieces, reading.words)
    figures = reading.figures
    sentences = [sentence.origin for sentence in reading.sentences]
    return {
        "source": reading.source,
        "id": reading.id,
        "question": reading.question,
        "answer": reading.answer,
        "words": [[*text, *_numbers(word)] for text, word in zip(texts, reading.words, strict=True)],
        "origin": reading.origin,
        "counts": [figures.words, *(len(reading.from_(origin)) for origin in ("unlikely", "habit", "image"))],
        "sentences": [len(sentences), sentences.count("unlikely"), sentences.count("habit")],
        "llr": rounded(figures.mean_llr),
        "logp": rounded(reading.mean_log_prob),
        "bound": reading.bound,
        "baseline": reading.baseline,
        "elsewhere": reading.elsewhere,
        "image": _image(reading, known, sources),
    }


def _numbers(word: MeteredWord) -> list[Any]:
    """The LLR of a word, and of an unlikely one what the model would rather have said, and by how much."""
    if word.origin != "unlikely":
        return [rounded(word.llr)]
    behind = rounded(word.surprise, 1)
    return [rounded(word.llr), "beyond all numbers" if behind is None else behind, word.instead]


def _image(reading: Reading, known: dict[bytes, int], sources: list[str]) -> int | None:
    """The number of the image among those of the page; questions on one image share it."""
    from lvlm_probe.pages.data_uris import data_uri

    if reading.thumbnail is None:
        return None
    key = repr(reading.thumbnail.size).encode() + reading.thumbnail.tobytes()
    if key not in known:
        known[key] = len(sources)
        sources.append(data_uri(reading.thumbnail, quality=70))
    return known[key]


def _lead(readings: Sequence[Reading], unread: Sequence[Unread]) -> str:
    """How many answers are of each class, and a bar of it."""
    bands: Counter[str] = Counter(reading.origin for reading in readings)
    number = len(readings)
    shares = {name: bands[name] / number if number else 0.0 for name in _ORIGINS}
    said = [
        f"<p><b>{counted(number, 'answer')}.</b> <b>{_percent(shares['unlikely'])}</b> hold words that this "
        f"model would not have said, <b>{_percent(shares['habit'])}</b> are from habit (fewer than "
        f"{100 * LEAST_FROM_IMAGE:g} % of their words need more than {_baseline(readings)}), and "
        f"<b>{_percent(shares['image'])}</b> are from the image.</p>"
    ]
    edge, parts = 0.0, []
    for name, share in shares.items():
        if share:
            parts.append(
                f'<rect class="band-{name}" x="{100 * edge:.3f}" y="0" width="{100 * share:.3f}" height="10">'
                f"<title>{_ORIGINS[name]}: {_percent(share)}</title></rect>"
            )
            edge += share
    legend = "".join(
        f'<span><i class="dot band-{name}"></i>{_ORIGINS[name]} {bands[name]}</span>'
        for name, share in shares.items()
        if share or name != "unknown"  # the bars of single answers have these colours too
    )
    said.append(
        f'<svg class="bands" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
        f'aria-label="Shares of the answers">{"".join(parts)}</svg><p class="shares">{legend}</p>'
    )
    if bound := sum(reading.bound for reading in readings):
        said.append(
            f"<p>Of {bound} of the answers it is not recorded what the model would rather have said: −ln P is taken, "
            "the most by which a word can be less likely.</p>"
        )
    if any(reading.elsewhere for reading in readings):
        elsewhere = sum(reading.elsewhere for reading in readings)
        who = "These answers were" if elsewhere == number else f"{elsewhere} of the answers were"
        said.append(f"<p>{who} not generated here: they were given elsewhere and replayed on this model.</p>")
    if unread:
        items = "".join(
            f"<li>{html.escape(one.source)}: {html.escape(without_folders(one.reason))}</li>" for one in unread
        )
        said.append(f"<details><summary>{len(unread)} could not be measured</summary><ul>{items}</ul></details>")
    return "\n".join(said)


def _baseline(readings: Sequence[Reading]) -> str:
    kinds = {reading.baseline.split(" ")[0].rstrip(",") for reading in readings}
    known = {"blur": "a blurred image", "blank": "a black image", "noise": "an image of noise"}
    known["mean"] = "an image of one colour"
    return known.get(next(iter(kinds)), "the baseline image") if len(kinds) == 1 else "the baseline image"


def _plain(readings: Sequence[Reading]) -> str:
    rows = (
        f"<p><b>{html.escape(reading.question)}</b><br>{html.escape(reading.answer)}<br>"
        f"{_ORIGINS[reading.origin]}{_worst(reading)}</p>"
        for reading in readings
    )
    return without_script(rows, len(readings))


def _worst(reading: Reading) -> str:
    words = reading.from_("unlikely")
    return f": {html.escape(', '.join(word.text for word in words))}" if words else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
