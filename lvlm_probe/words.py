"""Groups the tokens of an answer into the words a person sees.

Tokens are pieces of words (``" cro"``, ``"issant"``), pieces of characters (bytes of an emoji), or whole words; what a
person points at is a word. A token is never cut: a word is a span of tokens, so a token such as ``"red."`` keeps its
full stop. The rules, on the characters of the joined answer:

* letters, digits, marks and ``_`` stick together; so do ``don't``, ``well-known``, ``3.5``, ``1,000`` and ``12:30``;
* a run of other signs (``.``, ``?!``, an emoji) is a word of its own, so that it can be coloured on its own;
* each Chinese or Japanese character is a word of its own (those scripts put no spaces between words);
* whitespace, signs that show nothing (a stray joiner, a control sign, bytes that make no character) and special tokens
  belong to no word, and no word reaches across them.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

ALPHA = 1.0
"""LLR above which a token of the answer is the image's doing, nats (paper, Eq. 6)."""

_LETTER, _SIGN, _IDEOGRAPH, _SPACE = "letter", "sign", "ideograph", "space"
_NO_CHARACTER = "\ufffd"
"""What bytes are decoded to that are no character."""
_JOINS_LETTERS = frozenset("'’-‐‑")
_JOINS_DIGITS = frozenset(".,:٫٬")
# Scripts written without spaces whose single characters carry meaning: iteration marks, kana, Han and its extensions.
_IDEOGRAPHS = (
    (0x3005, 0x3007),
    (0x3041, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9D),
    (0x20000, 0x323AF),
)
# Scripts written without spaces whose words have several letters: Thai, Lao, Tibetan, Burmese, Khmer.
_UNSPACED = ((0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F))
_ZERO_WIDTH_JOINER = "\u200d"
_ALIKE = {ord("’"): "'", ord("‐"): "-", ord("‑"): "-", ord("−"): "-", 0xFE0F: None}


@dataclasses.dataclass(frozen=True)
class Word:
    """A word of the answer: its text without surrounding whitespace, and its tokens ``[start, stop)``."""

    text: str
    start: int
    stop: int


def group_words(pieces: Sequence[str], special: Sequence[bool]) -> list[Word]:
    """Returns the words of an answer, in order; they never overlap.

    ``pieces`` are the display texts of the tokens, ``(step,)``, whose concatenation is the answer; an empty piece (a
    byte of a character that a later token completes) goes with the piece that follows it. ``special``, ``(step,)``,
    marks the special tokens. Raises ``ValueError`` when the two differ in length.
    """
    if len(pieces) != len(special):
        raise ValueError(f"{len(pieces)} pieces but {len(special)} special flags; one flag per piece is needed")
    # A special token reads as one space: whatever its text is, it separates and is never part of a word.
    shown = [" " if flag else piece for piece, flag in zip(pieces, special, strict=True)]
    unit_of = _units("".join(shown))
    words: list[Word] = []
    start: int | None = None
    waiting: int | None = None  # first of the empty pieces that wait for the character they are part of
    last_unit = -1
    offset = 0

    def close(stop: int) -> None:
        nonlocal start
        if start is not None:
            words.append(Word("".join(shown[start:stop]).strip(), start, stop))
        start = None

    for index, piece in enumerate(shown):
        if not piece:
            waiting = index if waiting is None else waiting
            continue
        units = [unit for unit in unit_of[offset : offset + len(piece)] if unit >= 0]
        offset += len(piece)
        first = index if waiting is None else waiting
        waiting = None
        if not units:
            close(first)
            continue
        if start is None or units[0] != last_unit:
            close(first)
            start = first
        last_unit = units[-1]
    # Empty pieces at the very end were cut off in the middle of a character: they stay with the word before them.
    close(len(shown))
    return words


def complete_words(pieces: Sequence[str], special: Sequence[bool]) -> list[Word]:
    """Return those of the words of an answer that grows which no text behind it can change; arguments as above."""
    words = group_words(pieces, special)
    shown = [" " if flag else piece for piece, flag in zip(pieces, special, strict=True)]
    while words:
        behind = "".join(shown[words[-1].stop :])
        # What the last character is (the point of 3.5, or a full stop) may depend on the one that follows it.
        if behind[:1].isspace() or len(behind) > 1:
            break
        words.pop()
    return words


def distinct_texts(words: Iterable[Word]) -> list[str]:
    """Return the words' texts, with a number to one that stands earlier in the answer too: ``cat``, ``cat (2nd)``."""
    times: Counter[str] = Counter()
    told = []
    for word in words:
        text = word.text.strip()
        times[text.casefold()] += 1
        number = times[text.casefold()]
        ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
        told.append(text if number == 1 else f"{text} ({number}{ending})")
    return told


def spelled(pieces: Sequence[str], words: Iterable[Word]) -> tuple[list[tuple[str, str]], str]:
    """Return (text before it, the word) for every word of an answer, and the text after the last one.

    Args:
        pieces: display text of the tokens, ``(step,)``, special ones empty.
        words: of the answer, in order.
    """
    found, end = [], 0
    for word in words:
        text = "".join(pieces[word.start : word.stop])
        before = "".join(pieces[end : word.start]) + text[: len(text) - len(text.lstrip())]
        found.append((before, text.strip()))
        end = word.stop
    return found, "".join(pieces[end:]).rstrip()


def phrase_spans(phrase: str, text: str) -> list[tuple[int, int]]:
    """``(start, stop)``, in characters, of a phrase in a text, as whole words and whatever its case, any run of white
    space between them; where it stands nowhere so, as parts of words with a hyphen or an apostrophe.

    Both are taken as ``written_alike`` writes them; a sign that this leaves out belongs to the one before it.
    """
    said = written_alike(phrase).split()
    if not said:
        return []
    alike: list[str] = []
    origin: list[int] = []
    # A letter goes with its accents, as these may stand in another order, or be one character with it.
    starts = [at for at, char in enumerate(text) if at == 0 or not unicodedata.combining(char)]
    for start, stop in itertools.pairwise([*starts, len(text)]):
        alike.append(written_alike(text[start:stop]))
        origin += [start] * len(alike[-1])
    origin.append(len(text))
    body = r"\s+".join(map(re.escape, said))
    whole = "".join(alike)
    cut = word_cuts(whole)
    spans = [match.span() for match in re.finditer(body, whole, re.IGNORECASE)]
    spans = [(start, stop) for start, stop in spans if "whole" not in (cut[start], cut[stop])]
    spans = [(start, stop) for start, stop in spans if cut[start] is cut[stop] is None] or spans
    return [(origin[start], origin[stop]) for start, stop in spans]


def tokens_at(pieces: Sequence[str], spans: Iterable[tuple[int, int]]) -> list[int]:
    """Tokens that hold characters ``[start, stop)`` of an answer, of one span or another, ascending.

    Tokens that only begin the first character of a span, and show nothing of it themselves, are among them.

    Args:
        pieces: display texts of the tokens, ``(step,)``, whose concatenation is the answer.
        spans: none of them empty.
    """
    ends = list(itertools.accumulate(map(len, pieces)))
    found: set[int] = set()
    for start, stop in spans:
        shown = bisect.bisect_right(ends, start)  # the token that shows the first character
        begin = ends[shown - 1] if shown else 0
        first = bisect.bisect_left(ends, begin) + 1 if begin else 0
        found.update(range(first, bisect.bisect_left(ends, stop) + 1))
    return sorted(found)


def written_alike(text: str) -> str:
    """A text with its accents, apostrophes, hyphens and emoji written in one way of several that look alike."""
    return unicodedata.normalize("NFD", text.translate(_ALIKE))


def word_cuts(text: str) -> list[Literal["whole", "part"] | None]:
    """Return what a cut in front of each character goes through, and one behind the last: ``(character + 1,)``.

    ``"whole"``: letters of one word, digits of one number, a character and its marks, an emoji. ``"part"``: the sign
    that joins parts of one word (``well-known``), the minus of a number. ``None``: nothing, as between words, signs,
    and letters of scripts without spaces, whose words only a reader can tell.
    """
    kinds = _kinds(text)
    found: list[Literal["whole", "part"] | None] = [None]
    for at, (before, char) in enumerate(itertools.pairwise(text), start=1):
        marked = unicodedata.category(char)[0] == "M" or 0x1F3FB <= ord(char) <= 0x1F3FF  # an accent, a skin colour
        if marked or _ZERO_WIDTH_JOINER in (before, char):
            found.append("whole")
        elif char.isdigit() and before in "-−" and (at < 2 or not text[at - 2].isalnum()):
            found.append("part")
        elif kinds[at - 1 : at + 1] != [_LETTER, _LETTER] or _unspaced(before) or _unspaced(char):
            found.append(None)
        else:
            joint = at - (before in _JOINS_LETTERS)
            thousands = text[joint] in "'’" and text[joint - 1].isdigit() and text[joint + 1 : joint + 2].isdigit()
            found.append("part" if text[joint] in _JOINS_LETTERS and not thousands else "whole")
    return [*found, None]


def _unspaced(char: str) -> bool:
    return any(low <= ord(char) <= high for low, high in _UNSPACED)


def _units(text: str) -> list[int]:
    """Returns for each character the number of the unit it belongs to, -1 for whitespace."""
    kinds = _kinds(text)
    units: list[int] = []
    unit = -1
    previous = _SPACE
    for char, kind in zip(text, kinds, strict=True):
        alone = kind == _IDEOGRAPH and not _belongs_to_the_one_before(char)
        if kind != _SPACE and (kind != previous or alone):
            unit += 1
        units.append(-1 if kind == _SPACE else unit)
        previous = kind
    return units


def _kinds(text: str) -> list[str]:
    kinds: list[str] = []
    for index, char in enumerate(text):
        category = unicodedata.category(char)
        if char.isspace() or category == "Cc" or char == _NO_CHARACTER:
            kind = _SPACE
        elif any(low <= ord(char) <= high for low, high in _IDEOGRAPHS):
            kind = _IDEOGRAPH
        elif _belongs_to_the_one_before(char):
            alone = _SPACE if category == "Cf" else _LETTER
            kind = kinds[-1] if kinds and kinds[-1] != _SPACE else alone
        elif category[0] in "LN" or char == "_" or _is_inner(text, index):
            kind = _LETTER
        else:
            kind = _SIGN
        kinds.append(kind)
    return kinds


def _belongs_to_the_one_before(char: str) -> bool:
    """True for accents, the marks of kana, variation selectors and joiners."""
    category = unicodedata.category(char)
    return category[0] == "M" or category == "Cf"


def _is_inner(text: str, index: int) -> bool:
    """True for a sign inside a word: the apostrophe of ``don't``, the hyphen of ``well-known``, the point of 3.5."""
    if not 0 < index < len(text) - 1:
        return False
    before, char, after = text[index - 1], text[index], text[index + 1]
    if char in _JOINS_LETTERS:
        return before.isalnum() and after.isalnum()
    return char in _JOINS_DIGITS and before.isdigit() and after.isdigit()
