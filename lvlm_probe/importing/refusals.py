"""Why a row of somebody's file is not taken: in words that are short, can be written, and can be counted by kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from lvlm_probe.errors import ProbeError
from lvlm_probe.escaping import writable

_SHOWN = 400
"""Characters of a reason: what stands in a row may be megabytes."""

_PARTICULAR = re.compile(r"(?<=the image )(?!in |given )\S+|'[^']*'|\"[^\"]*\"|\([^)]*\)|[^\s,;:]*[./\\][^\s,;:]+|\d+")
"""What differs between two rows that are refused for the same reason: quotations, names of files, numbers."""


class BadRow(Exception):
    """A row that cannot be taken over; the message is the reason, in characters that can be written to a file."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason_of(reason))


def reason_of(error: object) -> str:
    """Why a row is not taken over, as a text of bounded length that can be encoded."""
    text = str(error) if isinstance(error, str | BadRow | ProbeError) else f"{type(error).__name__}: {error}"
    return writable(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")


def shortened(value: object, width: int = 60) -> str:
    """A value of a row for a message. Of images as text, their beginning and their length: nobody reads base64."""
    text = value if isinstance(value, str) else repr(value)[: width + 1]
    if len(text) <= width:
        return text
    shown = text[: min(width, 24)] if isinstance(value, str) and " " not in text[:width] else text[: width - 1]
    return f"{shown}… ({len(text):,} characters)" if isinstance(value, str) else f"{shown}…"


def by_kind(reasons: Iterable[str]) -> list[tuple[str, int]]:
    """Reasons by kind, the commonest first: the words up to the first colon or semicolon, without particulars."""
    kinds = (re.split(r"[:;]", _PARTICULAR.sub("…", reason), maxsplit=1)[0].strip(" …")[:100] for reason in reasons)
    return Counter(kinds).most_common()
