"""Text made fit for who reads it next: a person, a terminal, a spreadsheet, Markdown, LaTeX."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)
"""What acts on a terminal or turns text instead of being seen: C0 but tab and newline, DEL and C1; marks that turn or
hide text; separators of lines; halves of characters."""


def counted(number: int, noun: str) -> str:
    """Say how many there are of what: "1 map", "2 maps"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def escaped(text: str) -> str:
    """Show what would act on a terminal (``ACTING``) as its escape."""
    return ACTING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def writable(text: str) -> str:
    """A text that can be encoded: halves of characters are written as their escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


_NUMBER = re.compile(r"[-+−]?(inf|\d[\d,]*\.?\d*|\.\d+)([eE][-+]?\d+)?( ?%| ± \d[\d.]*)?")
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t")


def csv_cell(value: Any) -> Any:
    """A cell of a csv file that a spreadsheet shows and does not compute.

    A text that begins as a formula does (``= + - @``, a tab, a carriage return) gets an apostrophe before it, the mark
    of a text in spreadsheets. Numbers, and texts that are one, stay as they are. A carriage return becomes a newline:
    by itself it ends a row for a spreadsheet, and is not quoted by Python.
    """
    if not isinstance(value, str):
        return value
    text = writable(value).replace("\r\n", "\n").replace("\r", "\n")
    begins = value.startswith("\r") or text.lstrip(" \n\u00a0\u200b\ufeff").startswith(_FORMULA)
    return f"'{text}" if begins and _NUMBER.fullmatch(text) is None else text


def one_line(text: str) -> str:
    """On one line, without characters that act instead of being seen."""
    return "".join(sign for sign in " ".join(text.split()) if unicodedata.category(sign) not in ("Cc", "Cs"))


_UNDRAWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def drawable(text: str) -> str:
    """With the replacement character for what no font draws and no XML may hold: control characters, halves of
    characters, what Unicode calls no characters. A byte order mark shows nothing and is left out: matplotlib cannot
    write it to a PDF."""
    return _UNDRAWN.sub("\ufffd", text.replace("\ufeff", ""))


def first_line(error: BaseException, most: int = 500) -> str:
    """What a library's error says, in one line of at most ``most`` characters, its type first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:most] if lines else type(error).__name__


def markdown_text(text: str) -> str:
    """A text that Markdown shows as it is: no tag, no link, no cell or block begins or ends in it."""
    shown = re.sub(r"[\\`\[\]|]", r"\\\g<0>", one_line(text))
    shown = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"\\{shown}" if shown.startswith(("#", "-", "+", "*", "=", "~")) and not _NUMBER.fullmatch(text) else shown


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "−": "$-$",
    "×": r"$\times$", "ρ": r"$\rho$", "λ": r"$\lambda$", "α": r"$\alpha$", "<": "$<$", ">": "$>$", "–": "--",
    "≤": r"$\leq$", "≥": r"$\geq$", "±": r"$\pm$", "†": r"$\dagger$", "·": r"$\cdot$", "σ": r"$\sigma$",
}  # fmt: skip


def tex_text(text: str) -> str:
    """A text that LaTeX sets as it is, on one line."""
    return "".join(_TEX.get(character, character) for character in one_line(text))
