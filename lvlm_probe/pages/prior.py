"""The page of the language-prior meter: thousands of answers in one file, to rank, filter and search."""

from __future__ import annotations

import html
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.pages.plain import rounded, spelled, without_folders
from lvlm_probe.pages.shell import asset, json_for_script, page_text, refuse_existing, without_script, write_text

if TYPE_CHECKING:
    from lvlm_probe.importing.meter import Reading, Unread

__all__ = ["write_page"]

DEFAULT_TITLE = "From the image, or from habit?"
_BAND_NAMES: dict[str, str] = {
    "habit": "from habit",
    "mixed": "mixed",
    "picture": "from the image",
    "unknown": "not known",
}


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
    pictures: dict[bytes, int] = {}
    sources: list[str] = []
    rows = [_row(reading, pictures, sources) for reading in readings]
    data = {
        "rows": rows,
        "pictures": sources,
        "unread": [{"source": one.source, "reason": without_folders(one.reason)} for one in unread],
    }
    text = page_text(
        "prior.html",
        title,
        asset("page.css") + asset("prior.css"),
        asset("theme.js") + asset("prior.js"),
        body='<body class="prior">',
        lead=_lead(readings, unread),
        alpha=f"{readings[0].alpha:g}" if readings else "1",
        plain=_plain(readings),
        data=json_for_script(data),
    )
    write_text(path, text, overwrite=overwrite)
    return path


def _row(reading: Reading, pictures: dict[bytes, int], sources: list[str]) -> dict[str, Any]:
    texts, _ = spelled(reading.pieces, reading.words)
    words = [[*text, rounded(llr)] for text, llr in zip(texts, reading.llr, strict=True)]
    return {
        "source": reading.source,
        "id": reading.id,
        "question": reading.question,
        "answer": reading.answer,
        "words": words,
        "band": reading.band,
        "drop": rounded(reading.drop, 4),
        "normalised": rounded(reading.drop_normalised, 4),
        "share": rounded(reading.share, 4),
        "llr": rounded(reading.mean_llr, 4),
        "total": rounded(reading.log_prob - reading.baseline_log_prob),
        "seen": [sum(reading.counts), len(reading.seen)],
        "baseline": reading.baseline,
        "elsewhere": reading.elsewhere,
        "picture": _picture(reading, pictures, sources),
    }


def _picture(reading: Reading, known: dict[bytes, int], sources: list[str]) -> int | None:
    """The number of the image among those of the page; questions on one image share it."""
    from lvlm_probe.pages.data_uris import data_uri

    if reading.picture is None:
        return None
    key = repr(reading.picture.size).encode() + reading.picture.tobytes()
    if key not in known:
        known[key] = len(sources)
        sources.append(data_uri(reading.picture, quality=70))
    return known[key]


def _lead(readings: Sequence[Reading], unread: Sequence[Unread]) -> str:
    """How many answers are in each band, as in the paper's Table 1, and a bar of it."""
    bands: Counter[str] = Counter(reading.band for reading in readings)
    number = len(readings)
    shares = {name: bands[name] / number if number else 0.0 for name in _BAND_NAMES}
    said = [
        f"<p><b>{number} answer{'s' * (number != 1)}.</b> Of their probability, {_baseline(readings)} takes away less "
        f"than 30 % for <b>{_percent(shares['habit'])}</b>, 30 to 70 % for <b>{_percent(shares['mixed'])}</b>, and "
        f"more for <b>{_percent(shares['picture'])}</b>.</p>"
    ]
    edge, parts = 0.0, []
    for name, share in shares.items():
        if share:
            parts.append(
                f'<rect class="band-{name}" x="{100 * edge:.3f}" y="0" width="{100 * share:.3f}" height="10">'
                f"<title>{_BAND_NAMES[name]}: {_percent(share)}</title></rect>"
            )
            edge += share
    legend = "".join(
        f'<span><i class="dot band-{name}"></i>{_BAND_NAMES[name]} {bands[name]}</span>'
        for name, share in shares.items()
        if share
    )
    said.append(
        f'<svg class="bands" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
        f'aria-label="Shares of the bands">{"".join(parts)}</svg><p class="shares">{legend}</p>'
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
        f"{_BAND_NAMES[reading.band]}, drop {_percent(reading.drop)}</p>"
        for reading in readings
    )
    return without_script(rows, len(readings))


def _percent(share: float) -> str:
    if math.isnan(share):
        return "not known"
    return f"{100 * share:.1f} %" if share >= 0 else "none"
