"""The shell of every page: template, security policy, assets, and the file written whole.

A page is one HTML file that is complete in itself. Its content security policy forbids every connection, and every
script and style but its own, which it names by their digests. Data stand in it as JSON that cannot end its script
element, and the scripts put each string on the page as text, so an answer may contain any HTML it likes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import os
import re
import urllib.parse
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from lvlm_probe._version import __version__
from lvlm_probe.errors import ReportError
from lvlm_probe.escaping import writable
from lvlm_probe.files import in_the_way, write_whole

_PLAIN_ROWS = 50
_FRAMED = 8_000_000
"""Bytes of the largest page that a notebook gets as a whole."""
_FRAME_HEIGHT = 760
_OTHER_KINDS = (
    ".pdf", ".png", ".jpg", ".jpeg", ".svg", ".tif", ".tiff", ".gif", ".webp", ".csv", ".tsv", ".json", ".jsonl",
    ".yaml", ".yml", ".md", ".tex", ".h5", ".hdf5", ".npz", ".xlsx", ".parquet",
)  # fmt: skip
"""Endings of names that are of no page."""


class Page(type(Path())):  # type: ignore[misc]
    """The path of a page that was written, which shows the page in a notebook.

    A notebook gets the page inside a frame of its own, whose text is part of the notebook: it goes where the notebook
    goes, and the page's own policy holds in it. What is said and a link stand above, for where frames or scripts are
    not let through. A page of many megabytes is linked only.

    Attributes:
        said: what the page says, in words.
    """

    said: str = ""

    def _repr_html_(self) -> str | None:
        if self.suffix.lower() not in (".html", ".htm") or not self.is_file():
            return None
        name = html.escape(writable(self.name))
        link = f'<a href="{html.escape(urllib.parse.quote(os.fsencode(self.as_posix())))}">{name}</a>'
        told = f"<p>{link}{': ' + html.escape(self.said) if self.said else ''}</p>"
        if self.stat().st_size > _FRAMED:
            return told
        text = html.escape(self.read_text(encoding="utf-8"))
        return (
            f'{told}<iframe srcdoc="{text}" title="{name}" width="100%" height="{_FRAME_HEIGHT}" '
            f'sandbox="allow-scripts allow-downloads" style="border:1px solid #8884"></iframe>'
        )


def refuse_existing(path: Path, *, overwrite: bool | None) -> None:
    """Raise ``ReportError`` where a page cannot be written to ``path``: before the work rather than after it.

    ``overwrite`` replaces any file, ``None`` only one that this package wrote. A name that promises another kind of
    file is refused too.
    """
    if path.suffix.lower() in _OTHER_KINDS:
        raise ReportError(f"a page is HTML, and {path.name} names another kind of file: call it {path.stem}.html")
    if path.is_dir():
        raise ReportError(
            f"cannot write the report: {path} is a folder; name a file in it, such as {path / 'report.html'}"
        )
    if (there := in_the_way(path, overwrite=overwrite)) is not None:
        raise ReportError(f"cannot write the report: {there}")


def write_text(path: Path, text: str, *, overwrite: bool | None, said: str = "") -> Page:
    """Write a page, whole or not at all; missing folders are made. Raises ``ReportError``.

    Args:
        said: what it says, in words.

    Returns:
        its path, which a notebook shows as the page.
    """
    try:
        refuse_existing(path, overwrite=overwrite)
        write_whole(path, text)
    except OSError as error:
        raise ReportError(f"cannot write the report to {path}: {error.strerror or error}") from error
    page = Page(path)
    page.said = said
    return page


def page_text(
    template: str, title: str, style: str, script: str, *, body: str = "<body>", beside: bool = False, **parts: str
) -> str:
    """Fill a template under the head of all pages.

    Args:
        template: its name among the assets.
        title: as text; it is escaped here.
        style, script: what the page's policy allows, by their digests, and nothing else.
        body: the opening tag.
        beside: the policy allows scripts that lie beside the page too.
        parts: put in as they are: markup, whose text has been escaped.
    """
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
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], asset("head.html") + asset(template))


def asset(name: str) -> str:
    """Read a template, style or script."""
    return resources.files("lvlm_probe.pages").joinpath("assets", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def json_for_script(value: Any) -> str:
    """Return JSON that cannot end the script element it stands in, nor open a comment in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"})


def without_script(rows: Iterable[str], total: int) -> str:
    """Return what a reader without JavaScript gets: the first rows, and how many more there are."""
    shown = list(itertools.islice(rows, _PLAIN_ROWS))
    if total > _PLAIN_ROWS:
        shown.append(f"<p>… and {total - _PLAIN_ROWS} more.</p>")
    return "\n".join(shown)
