"""The report: one HTML file that shows which part of a picture made a model say each word, and whether to trust that.

`report` gathers what the page needs as plain JSON (``samples.py``), encodes the pictures (``pictures.py``) and fills
the template ``page.html`` with it, with ``page.css`` and five scripts. ``comparison.py`` writes the page of several
methods side by side. A page is complete in itself: it carries a content security policy that forbids every connection
and every script but its own, and it puts each string of the data on the page as text, so an answer may contain any HTML
it likes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.errors import ReportError
from lvlm_probe.files import write_whole

if TYPE_CHECKING:
    from lvlm_probe.heatmap import Heatmap
    from lvlm_probe.metrics import Score

__all__ = ["report"]

SCRIPTS = ("draw.js", "answer.js", "trial.js", "theme.js", "page.js")
DEFAULT_TITLE = "Where the answer came from"


def report(
    heats: Heatmap | Iterable[Heatmap],
    *,
    scores: Score | Iterable[Score | None] | None = None,
    out: str | os.PathLike[str],
    title: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write one self-contained HTML page about one or more explained answers.

    Heatmaps of one trace share a sample of the page: its first one is the map on show, the others are reached by their
    words. Heatmaps of several traces make a page with several samples.

    Args:
        heats: The heatmaps, in the order of showing; one or many.
        scores: What `evaluate` said of each heatmap, in the same order; ``None`` for one that was not evaluated. The
            page says "not checked" of every map without a score.
        out: The file to write. Missing folders are made.
        title: Headline of the page.
        overwrite: Replace ``out`` if it exists.

    Returns:
        The path written.

    Raises:
        ReportError: no heatmaps, not one score per heatmap, things that are neither; ``out`` exists or cannot be
            written.
    """
    from lvlm_probe.heatmap import Heatmap
    from lvlm_probe.metrics import Score
    from lvlm_probe.pages.samples import gather

    heat_list: list[Any] = list(heats) if isinstance(heats, Iterable) else [heats]
    score_list: list[Any] = list(scores) if isinstance(scores, Iterable) else [scores]
    if scores is None:
        score_list = [None] * len(heat_list)
    for thing in heat_list:
        if not isinstance(thing, Heatmap):
            raise ReportError(f"report() shows heatmaps, as explain() returns them; got a {type(thing).__name__}")
    for thing in score_list:
        if not (thing is None or isinstance(thing, Score)):
            raise ReportError(f"scores are what evaluate() returns, or None; got a {type(thing).__name__}")
    if not heat_list:
        raise ReportError("report() was given no heatmaps: pass at least one, report([heat], out=...)")
    if len(score_list) != len(heat_list):
        raise ReportError(
            f"report() was given {len(heat_list)} heatmaps but {len(score_list)} scores: "
            "pass one score per heatmap, in the same order, None where there is none"
        )
    path = Path(out)
    _refuse(path, overwrite=overwrite)
    samples = gather(heat_list, score_list)
    text = _fill(samples, title or DEFAULT_TITLE)
    _write(path, text, overwrite=overwrite)
    return path


def _refuse(path: Path, *, overwrite: bool) -> None:
    """Raise before the work rather than after it."""
    if path.is_dir():
        raise ReportError(
            f"cannot write the report: {path} is a folder; name a file in it, such as {path / 'report.html'}"
        )
    if path.exists() and not overwrite:
        raise ReportError(f"cannot write the report: {path} exists; name another file, or pass overwrite=True")


def _write(path: Path, text: str, *, overwrite: bool) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse(path, overwrite=overwrite)
        write_whole(path, text)
    except OSError as error:
        raise ReportError(f"cannot write the report to {path}: {error.strerror or error}") from error


def _fill(samples: list[dict[str, Any]], title: str) -> str:
    script = "\n".join(_asset(name) for name in SCRIPTS)
    data = _json_for_script({"samples": samples})
    return _page("page.html", title, _asset("page.css"), script, summary=_summary(samples), data=data)


def _page(
    template: str, title: str, style: str, script: str, *, body: str = "<body>", beside: bool = False, **parts: str
) -> str:
    """A template under the head of all pages, with its style and script, which the page's policy allows by their
    digests, and nothing else; with ``beside``, scripts that lie beside the page too.

    ``parts`` are put in as they are: markup, whose text has been escaped. ``title`` is escaped here.
    """
    from datetime import UTC, datetime

    from lvlm_probe._version import __version__

    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"style-src '{_digest(style)}'",
            # A page opened from disk has no origin of its own to allow, only the scheme.
            f"script-src '{_digest(script)}'" + (" 'self' file:" if beside else ""),
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    parts |= {
        "policy": policy,
        "body": body,
        "title": html.escape(title),
        "writer": html.escape(f"lvlm_probe {__version__}"),
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "style": style,
        "script": script,
    }
    # One pass, so that a "{{...}}" inside a title or an answer stays what it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("head.html") + _asset(template))


def _asset(name: str) -> str:
    from importlib import resources

    return resources.files(__name__).joinpath("assets", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json_for_script(value: Any) -> str:
    """JSON that cannot end the script element it stands in, nor open a comment in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"})


def _summary(samples: Sequence[Mapping[str, Any]]) -> str:
    """What a reader without JavaScript gets: each question, answer and verdict, as escaped text."""
    rows = []
    for sample in samples:
        verdict = sample["maps"][0]["verdict"]
        said = " ".join([verdict["title"], *verdict["reasons"]])
        rows.append(
            f"<p><b>{html.escape(sample['question'] or 'Question not known')}</b><br>"
            f"{html.escape(sample['answer'] or 'Answer not known')}<br>{html.escape(said)}</p>"
        )
    return "\n".join(rows)
